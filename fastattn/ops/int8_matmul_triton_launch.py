"""Launches the INT8 kernels of the Triton backend: allocates outputs, chooses tiles. Without torch.library: see
int8_matmul_triton.py."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastattn.ops import triton_autotune
from fastattn.ops.triton_launch import Device, as_rows, device_of, launch, next_power_of_2

# Rows of up to this many elements stay in registers while they are quantised: 32 a thread of 512.
QUANTIZE_MAX_DEPTH = 16384
QUANTIZE_LONG = {"BLOCK_DEPTH": 4096, "num_warps": 8}
# int8_linear quantises inside the product up to here: one launch instead of two, and one tile of rows, so that no row
# is quantised for more than one column of tiles more often than L2 can serve.
FUSED_MAX_ROWS = 16
# Strides beyond this are copied: a tile's 256 rows are addressed by 32 bits.
MAX_STRIDE = 1 << 22
GROUP_ROWS = 8


class Tile(NamedTuple):
    rows: int
    columns: int
    depth: int
    warps: int
    stages: int

    def shared_bytes(self, itemsize: int = 1) -> int:
        """At most; ``itemsize`` is that of a's elements, floating ones if they are quantised inside."""
        return self.stages * (self.rows * itemsize + self.columns) * self.depth


# By rows, from the largest to the smallest. A tile of r x c reads r + c bytes for r * c products, so large is best
# where it leaves no multiprocessor idle; 128 x 256 and 256 x 128 spill registers. 128 of depth are one row of shared
# memory as swizzled for wgmma and mma; 64 let sm_86 and sm_89, with 99 KiB, keep three stages of the largest tile. Few
# rows are bound by the bandwidth of b: deep tiles and many stages keep enough of it on its way.
_TILES: dict[int, tuple[Tile, ...]] = {
    16: (Tile(16, 64, 256, 4, 4), Tile(16, 32, 256, 4, 6), Tile(16, 32, 256, 4, 3)),
    32: (Tile(32, 128, 128, 4, 4), Tile(32, 64, 128, 4, 4), Tile(32, 32, 256, 4, 4)),
    64: (Tile(64, 128, 128, 4, 4), Tile(64, 64, 128, 4, 4)),
    128: (
        Tile(128, 128, 128, 8, 4),
        Tile(128, 128, 128, 8, 3),
        Tile(128, 128, 64, 8, 3),
        Tile(64, 128, 128, 4, 3),
        Tile(64, 64, 128, 4, 4),
    ),
}
# Rows of float32, quantised inside, in 64 KiB: on AMD's GPUs.
_SMALLEST = Tile(16, 32, 128, 4, 3)


def candidates(rows: int, device: Device, itemsize: int = 1) -> tuple[Tile, ...]:
    """The tiles for this many rows that the device's shared memory holds."""
    tile_rows = min(max(next_power_of_2(rows), 16), 128)
    fitting = tuple(tile for tile in _TILES[tile_rows] if tile.shared_bytes(itemsize) < device.shared_bytes)
    return fitting or (_SMALLEST,)


def matmul_tile(rows: int, columns: int, device: Device, itemsize: int = 1) -> Tile:
    """The largest tile of which there are enough for all multiprocessors, else the smallest."""
    tiles = candidates(rows, device, itemsize)
    for tile in tiles:
        if -(-rows // tile.rows) * -(-columns // tile.columns) >= device.multiprocessors:
            return tile
    return tiles[-1]


# --- Launches --------------------------------------------------------------------------------------------------------


def quantize(input: Tensor) -> tuple[Tensor, Tensor]:
    """``input`` (..., depth) floating -> int8 of its shape, and float32 scales (...)."""
    depth, leading = input.shape[-1], input.shape[:-1]
    rows = leading.numel()
    q = torch.empty(input.shape, dtype=torch.int8, device=input.device)
    scale = torch.empty(leading, dtype=torch.float32, device=input.device)
    if rows == 0:
        return q, scale
    from fastattn.ops import int8_matmul_triton_kernels as kernels

    x, stride = as_rows(input.float() if input.dtype == torch.float64 else input, rows, depth)
    if depth > QUANTIZE_MAX_DEPTH:
        launch(
            x, kernels.quantize_long_rows_kernel, (rows,), x, q, scale, depth, stride,
            **QUANTIZE_LONG, enable_fp_fusion=False,
        )  # fmt: skip
        return q, scale
    block_depth = max(32, next_power_of_2(depth))
    block_rows = max(1, 2048 // block_depth)
    # 16 elements a thread: two 16-byte loads of 16-bit inputs, one 16-byte store of q.
    warps = min(max(block_rows * block_depth // (32 * 16), 1), 16)
    launch(
        x, kernels.quantize_rows_kernel, (-(-rows // block_rows),), x, q, scale, rows, depth, stride,
        BLOCK_ROWS=block_rows, BLOCK_DEPTH=block_depth, num_warps=warps, enable_fp_fusion=False,
    )  # fmt: skip
    return q, scale


def _addressable(matrix: Tensor) -> tuple[Tensor, int]:
    rows, depth = matrix.shape
    matrix, stride = as_rows(matrix, rows, depth)
    return (matrix, stride) if stride <= MAX_STRIDE else (matrix.contiguous(), depth)


def matmul(
    a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, bias: Tensor | None, activation: str, out_dtype: torch.dtype
) -> Tensor:
    (rows, depth), columns = a.shape, b.shape[0]
    # float64 is computed in float32, as on every backend.
    computed = torch.float32 if out_dtype == torch.float64 else out_dtype
    out = torch.empty((rows, columns), dtype=computed, device=a.device)
    if out.numel() > 0:
        from fastattn.ops import int8_matmul_triton_kernels as kernels

        (a, stride_a), (b, stride_b) = _addressable(a), _addressable(b)
        operands = (a, b, a_scale.contiguous(), b_scale.contiguous(), None if bias is None else bias.contiguous(), out)

        def product(tile: Tile) -> None:
            launch(
                a, kernels.int8_matmul_kernel, (_programs(rows, columns, tile.rows, tile.columns),),
                *operands, rows, columns, depth, stride_a, stride_b, ACTIVATION=activation, BLOCK_ROWS=tile.rows,
                BLOCK_COLUMNS=tile.columns, BLOCK_DEPTH=tile.depth, GROUP_ROWS=GROUP_ROWS, num_warps=tile.warps,
                num_stages=tile.stages, enable_fp_fusion=False,
            )  # fmt: skip

        product(_tile(kernels.int8_matmul_kernel, product, a, (rows, columns, depth), out.dtype))
    return out.to(out_dtype)


def _tile(
    kernel: Any, product: Callable[[Tile], None], a: Tensor, sizes: tuple[int, int, int], out_dtype: torch.dtype
) -> Tile:
    """The table's tile or, if the user wants it, the fastest, for matrices of (rows, columns, depth)."""
    rows, columns, depth = sizes
    device, itemsize = device_of(a), a.element_size()
    default = matmul_tile(rows, columns, device, itemsize)
    if not triton_autotune.is_on():
        return default
    key = (a.dtype, out_dtype, next_power_of_2(rows), columns, depth)
    tiles = candidates(rows, device, itemsize)
    return triton_autotune.fastest(kernel, key, tiles, default, lambda tile: partial(product, tile), a)


def _programs(rows: int, columns: int, tile_rows: int, tile_columns: int) -> int:
    return -(-rows // tile_rows) * -(-columns // tile_columns)


def linear(input: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    (columns, depth), leading = weight.shape, input.shape[:-1]
    rows = leading.numel()
    if rows > FUSED_MAX_ROWS or rows * columns == 0:
        q, scale = quantize(input)
        out = matmul(q.view(rows, depth), weight, scale.view(rows), weight_scale, bias, activation, input.dtype)
        return out.view(*leading, columns)
    from fastattn.ops import int8_matmul_triton_kernels as kernels

    wide = input.dtype == torch.float64
    x, stride_x = as_rows(input.float() if wide else input, rows, depth)
    weight, stride_b = _addressable(weight)
    out = torch.empty((*leading, columns), dtype=x.dtype, device=x.device)
    others = weight_scale.contiguous(), None if bias is None else bias.contiguous()

    def product(tile: Tile) -> None:
        launch(
            x, kernels.int8_linear_kernel, (-(-columns // tile.columns),), x, weight, *others, out,
            rows, columns, depth, stride_x, stride_b, ACTIVATION=activation, BLOCK_ROWS=tile.rows,
            BLOCK_COLUMNS=tile.columns, BLOCK_DEPTH=tile.depth, num_warps=tile.warps, num_stages=tile.stages,
            enable_fp_fusion=False,
        )  # fmt: skip

    product(_tile(kernels.int8_linear_kernel, product, x, (rows, columns, depth), out.dtype))
    return out.to(input.dtype)
