"""Tiles, warps and pipeline stages of attention's Triton kernels, by architecture, dtype and head_dim."""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import torch

from fastattn._triton import is_interpreted
from fastattn.ops.triton_launch import device_of


class Gpu(NamedTuple):
    """What tiles are chosen for. capability (0, 0): Triton's interpreter; (0, 1): any of AMD's."""

    capability: tuple[int, int]


INTERPRETER = Gpu((0, 0))


def gpu_of(tensor: torch.Tensor) -> Gpu:
    return INTERPRETER if is_interpreted() else Gpu(device_of(tensor).capability)


class Tile(NamedTuple):
    block_q: int
    block_k: int
    num_warps: int
    num_stages: int
    all_registers: bool = False  # a thread may take 255: ptxas would otherwise spill some to fit one more block
    # How much of head_dim is multiplied at once, with both operands read again for every tile; 0: all of it, with the
    # program's own operand read once and, but for wgmma and tcgen05, kept in registers.
    head_dim_slice: int = 0
    # Keys and values come by TMA, through descriptors that the host makes: of the forward alone.
    tma: bool = False

    def launch_options(self) -> dict[str, int]:
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}
        return options | {"maxnreg": 255} if self.all_registers else options


# Those of the launches that compute one thing: of dk and dv together, or of dv and of dk.
Tiling = tuple[Tile, ...]

# Interpreted, a tile costs much the same whatever its size; small ones give short tests tiles of every kind.
_INTERPRETED = Tile(32, 32, 4, 1)
_Entry = TypeVar("_Entry")
_Table = dict[int, dict[int, tuple[Tile, ...]]]  # by compute capability and head_dim
# float32 products run on the CUDA cores. Triton unrolls them over the whole inner dim, with all that a thread
# multiplies in registers: no more than 32 keys or rows, or of head_dim one cache line of each row. 64 rows of sums by 8
# warps give each thread tiles of 4 x 4 sums, two multiplications for each number that it reads.
_FLOAT32 = Tile(64, 32, 8, 1, True, 32)
_FLOAT32_DKDV: dict[int, Tile | tuple[Tile, Tile]] = {
    64: Tile(32, 64, 8, 1, True, 32), 128: Tile(32, 32, 8, 1, True, 32), 256: (Tile(32, 32, 8, 1, True, 32),) * 2,
}  # fmt: skip

# By head_dim, padded; each entry: dot products alone, one of mask, dropout, ALiBi, softcap, several of them (the last
# stands for what follows). A warp takes 16 rows of a tile (of keys, for dk and dv): with fewer rows, warps repeat each
# other's products, which only entries of head_dim 256 do, and of the scores alone. The products of compute capability
# 8.x take both operands from registers, so that its inner tiles are narrow; wgmma (9.0) and tcgen05 (10.0) read them
# from shared memory. Dropout draws for 32 keys at a time: block_k is a multiple of 32.
_FORWARD: _Table = {
    8: {64: (Tile(128, 64, 8, 3), Tile(128, 32, 8, 2, True)), 128: (Tile(128, 32, 8, 3), Tile(128, 32, 8, 2)),
        256: (Tile(32, 64, 8, 1),)},
    9: {64: (Tile(128, 128, 8, 3), Tile(128, 64, 8, 2)), 128: (Tile(128, 64, 8, 3), Tile(128, 32, 8, 2)),
        256: (Tile(128, 32, 8, 2), Tile(64, 32, 8, 1))},
}  # fmt: skip
# Sums held in tensor memory pass through registers to be rescaled.
_FORWARD[10] = _FORWARD[9] | {64: (Tile(128, 64, 8, 3), Tile(128, 64, 8, 2))}
_DQ: _Table = {
    8: {64: (Tile(128, 32, 8, 3), Tile(128, 32, 8, 2)),
        128: (Tile(128, 32, 8, 2), Tile(64, 32, 8, 2), Tile(64, 64, 8, 1)),
        256: (Tile(32, 64, 8, 1),)},
    9: {64: (Tile(128, 64, 8, 3), Tile(128, 32, 8, 2)), 128: (Tile(128, 64, 8, 3), Tile(128, 32, 8, 2)),
        256: (Tile(128, 32, 8, 2), Tile(128, 32, 8, 2), Tile(64, 32, 8, 1, True, 64))},
}  # fmt: skip
_DQ[10] = _DQ[9] | {64: (Tile(128, 64, 8, 3), Tile(128, 32, 8, 1))}
# dk and dv are two sums as wide as head_dim: the tile of one pass that makes both or, where the registers do not hold
# them together, those of a pass for dv and of one for dk, which has a product more: at head_dim 256 it keeps neither k
# nor v, and has registers for the 64 keys that wgmma wants.
_WIDE_DK = Tile(16, 64, 8, 1, True, 64)
_DKDV: dict[int, dict[int, tuple[Tile | tuple[Tile, Tile], ...]]] = {
    8: {64: (Tile(32, 128, 8, 2), Tile(16, 128, 8, 2)),
        128: (Tile(16, 128, 8, 2), (Tile(16, 128, 8, 2, True), Tile(32, 64, 8, 2, True))),
        256: ((Tile(32, 32, 8, 1, True),) * 2, (Tile(32, 32, 8, 1, True), _WIDE_DK))},
    9: {64: (Tile(32, 128, 8, 2),), 128: (Tile(16, 128, 8, 2), (Tile(16, 128, 8, 2),) * 2),
        256: ((Tile(16, 128, 8, 2),) * 2, (Tile(16, 128, 8, 1), _WIDE_DK))},
}  # fmt: skip
# Triton compiles the single pass at head_dim 256 to nothing at all; tests/triton_aot.py looks out for that.
_DKDV[10] = _DKDV[9] | {128: (Tile(16, 128, 8, 1),), 256: ((Tile(16, 128, 8, 1), _WIDE_DK),)}


def width(block_d: int) -> int:
    return 64 if block_d <= 64 else 128 if block_d <= 128 else 256


def _interpreted(dtype: torch.dtype) -> Tile:
    return _INTERPRETED._replace(head_dim_slice=_FLOAT32.head_dim_slice if dtype == torch.float32 else 0)


def _without_table(gpu: Gpu, dtype: torch.dtype) -> Tile | None:
    if gpu is INTERPRETER:
        return _interpreted(dtype)
    return _FLOAT32 if dtype == torch.float32 else None


def _look_up(table: dict[int, dict[int, tuple[_Entry, ...]]], gpu: Gpu, block_d: int, features: int) -> _Entry:
    major = gpu.capability[0]
    entries = (table.get(major) or table[9 if major == 10 else 8])[width(block_d)]
    return entries[min(features, len(entries) - 1)]


def fit(tile: Tile, gpu: Gpu) -> Tile:
    if gpu.capability not in ((8, 0), (8, 7)) and gpu.capability[0] not in (9, 10):
        # 99 KiB of shared memory instead of 163, or 64 (AMD); of GPUs yet unknown, as little: no third stage.
        tile = tile._replace(num_stages=min(tile.num_stages, 2))
    return tile._replace(all_registers=tile.all_registers or gpu.capability[0] == 10)


def _tile(table: _Table, gpu: Gpu, dtype: torch.dtype, block_d: int, features: int) -> Tile:
    return _without_table(gpu, dtype) or fit(_look_up(table, gpu, block_d, features), gpu)


def forward(gpu: Gpu, dtype: torch.dtype, block_d: int, features: int) -> Tiling:
    return (_tile(_FORWARD, gpu, dtype, block_d, features),)


def dq(gpu: Gpu, dtype: torch.dtype, block_d: int, features: int) -> Tiling:
    return (_tile(_DQ, gpu, dtype, block_d, features),)


def dkdv(gpu: Gpu, dtype: torch.dtype, block_d: int, features: int) -> Tiling:
    """The tile of one pass for both, or those of a pass for dv and a pass for dk."""
    if gpu is INTERPRETER:
        return (_interpreted(dtype),)
    float32 = _FLOAT32_DKDV[width(block_d)] if dtype == torch.float32 else None
    found = float32 or _look_up(_DKDV, gpu, block_d, features)
    return (fit(found, gpu),) if isinstance(found, Tile) else tuple(fit(tile, gpu) for tile in found)


def scores(gpu: Gpu, dtype: torch.dtype, block_d: int) -> Tile:
    """For the kernels that make one tile of scores of a shape of their own: weights and the mask's gradient."""
    tile = _INTERPRETED if gpu is INTERPRETER else fit(Tile(64, 32, 8, 1, True), gpu)
    # No operand is needed twice, so that slices cost nothing.
    return tile._replace(head_dim_slice=32 if dtype == torch.float32 else min(64, block_d))


# Attention to a cache: of up to 16 rows (queries of the heads that share keys), 32, or more. Few rows wait for memory,
# which tiles on their way hide; more multiply, as in the forward, with the registers of as many rows' addresses gone.
_CACHED: dict[int, tuple[Tile, Tile, Tile]] = {
    64: (Tile(16, 64, 4, 3), Tile(32, 64, 4, 3), Tile(64, 64, 4, 2, True)),
    128: (Tile(16, 64, 4, 3), Tile(32, 64, 4, 2, True), Tile(64, 64, 8, 2)),
    256: (Tile(16, 32, 4, 2), Tile(32, 32, 4, 2), Tile(64, 32, 8, 1)),
}


def cached(gpu: Gpu, dtype: torch.dtype, block_d: int, rows: int) -> Tile:
    """For attention of ``rows`` rows of a kv head to a cache."""
    which = 0 if rows <= 16 else 1 if rows <= 32 else 2
    if gpu is INTERPRETER:
        return _interpreted(dtype)._replace(block_q=16 if which == 0 else 32)
    if dtype == torch.float32:
        return _FLOAT32._replace(block_q=(16, 32, 64)[which], num_warps=(4, 4, 8)[which])
    return fit(_CACHED[width(block_d)][which], gpu)
