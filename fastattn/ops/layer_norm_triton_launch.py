"""Launches the Triton kernels of the norms: allocates outputs, chooses tiles. Without torch.library: see
layer_norm_triton.py."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastattn.ops import triton_autotune
from fastattn.ops.triton_launch import Device, as_rows, device_of, launch, next_power_of_2

# The longest rows that stay in registers: 32 float32 values a thread of 512. The backward holds five such tiles
# (x_hat, dout, weight, dweight, dbias), hence half the length.
FWD_MAX_COLS = 16384
BWD_MAX_COLS = 8192
KEEP_WEIGHT_MAX_COLS = 4096
# What the kernels for longer rows take at once.
LOOP_COLS = 4096
LOOP_WARPS = 8
# partial_sums_kernel and column_sums_kernel. Partial sums are few columns by many rows: tall tiles spread them out.
PARTIAL_TILE = {"BLOCK_ROWS": 4, "BLOCK_COLS": 1024, "num_warps": 8}
COLUMN_TILE = {"BLOCK_ROWS": 128, "BLOCK_COLS": 32, "num_warps": 8}


class Tile(NamedTuple):
    rows: int
    cols: int
    warps: int


def _tile(rows: int, cols: int, elements: int, per_thread: int, device: Device) -> Tile:
    """Whole rows: about ``elements`` of them, fewer where that would leave multiprocessors idle.

    A thread then has ``per_thread`` elements, two or more 16-byte loads, enough to cover the latency of memory.
    """
    block_cols = max(32, next_power_of_2(cols))
    block_rows = max(1, elements // block_cols)
    while block_rows > 1 and rows < 2 * block_rows * device.multiprocessors:
        block_rows //= 2
    warps = min(max(block_rows * block_cols // (32 * per_thread), 1), 16)
    return Tile(block_rows, block_cols, warps)


def fwd_tile(rows: int, cols: int, device: Device) -> Tile | None:
    """None: rows too long for registers."""
    return None if cols > FWD_MAX_COLS else _tile(rows, cols, 2048, 16, device)


def bwd_tile(rows: int, cols: int, device: Device) -> Tile | None:
    return None if cols > BWD_MAX_COLS else _tile(rows, cols, 2048, 8 if cols <= 2048 else 16, device)


def bwd_programs(rows: int, tile: Tile, device: Device) -> int:
    """As many as run at once (registers allow 16 warps of the backward on a multiprocessor, 24 where tiles are small):
    each leaves a row of partial sums, so more would only write more."""
    warps = 16 if tile.cols > 1024 else 24
    return min(-(-rows // tile.rows), max(warps // tile.warps, 1) * device.multiprocessors)


# --- Tuning ----------------------------------------------------------------------------------------------------------

# (elements of a tile, elements of a thread) that are tried besides the tables'.
_FWD_TRIALS = ((1024, 8), (2048, 8), (2048, 16), (4096, 16), (4096, 32))
_BWD_TRIALS = ((1024, 8), (2048, 8))


def fwd_candidates(rows: int, cols: int, device: Device) -> tuple[Tile, ...]:
    """What is timed for rows that fit the registers, the table's tile among them."""
    return _candidates(_FWD_TRIALS, fwd_tile(rows, cols, device), rows, cols, device)


def bwd_candidates(rows: int, cols: int, device: Device) -> tuple[Tile, ...]:
    return _candidates(_BWD_TRIALS, bwd_tile(rows, cols, device), rows, cols, device)


def _candidates(
    trials: tuple[tuple[int, int], ...], default: Tile | None, rows: int, cols: int, device: Device
) -> tuple[Tile, ...]:
    assert default is not None  # the caller compared cols with the limit
    return tuple(sorted({default} | {_tile(rows, cols, *trial, device) for trial in trials}))


def _fastest(
    kernel: Any,
    default: Tile,
    candidates: Callable[[int, int, Device], tuple[Tile, ...]],
    run: Callable[[Tile], object],
    key: tuple[int | bool | torch.dtype | None, ...],
    sizes: tuple[int, int],
    on: Tensor,
) -> Tile:
    """``default`` or, if the user wants it, the fastest. ``key``: what the times depend on, besides ``sizes``."""
    if not triton_autotune.is_on():
        return default
    rows, cols = next_power_of_2(sizes[0]), sizes[1]
    choices = candidates(rows, cols, device_of(on))
    return triton_autotune.fastest(kernel, (rows, cols, *key), choices, default, lambda tile: partial(run, tile), on)


class Dropout(NamedTuple):
    """``rng_state`` None: no dropout."""

    rng_state: Tensor | None
    threshold: int
    scale: float


def dropout(rng_state: Tensor | None, dropout_p: float) -> Dropout:
    if dropout_p == 0.0:
        return Dropout(None, 0, 1.0)
    return Dropout(rng_state, int(dropout_p * 65536.0 + 0.5), 1.0 / (1.0 - dropout_p) if dropout_p < 1.0 else 0.0)


# --- Forward ---------------------------------------------------------------------------------------------------------


class Forward(NamedTuple):
    out: Tensor
    new_residual: Tensor | None
    mean: Tensor
    rstd: Tensor


def forward(
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    drop: Dropout,
    normalized_dims: int,
    eps: float,
    rms: bool,
) -> Forward:
    leading = input.shape[: input.dim() - normalized_dims]
    rows, cols = leading.numel(), input.shape[len(leading) :].numel()
    out = torch.empty(input.shape, dtype=input.dtype, device=input.device)
    new_residual = None if residual is None else torch.empty(input.shape, dtype=residual.dtype, device=input.device)
    mean = torch.empty((0,) if rms else leading, dtype=torch.float32, device=input.device)
    rstd = torch.empty(leading, dtype=torch.float32, device=input.device)
    if out.numel() == 0:
        return Forward(out, new_residual, mean.zero_(), rstd.zero_())

    from fastattn.ops import layer_norm_triton_fwd as kernels

    x, stride_x = as_rows(input, rows, cols)
    stride_residual = 0
    if residual is not None:
        residual, stride_residual = as_rows(residual, rows, cols)
    weight, bias = (None if t is None else t.contiguous() for t in (weight, bias))
    operands = (x, residual, new_residual, weight, bias, out, mean, rstd, drop.rng_state)
    numbers = (cols, stride_x, stride_residual, eps, drop.threshold, drop.scale)
    tile = fwd_tile(rows, cols, device_of(input))
    if tile is None:
        launch(
            x, kernels.loop_fwd_kernel, (rows,), *operands, *numbers,
            RMS=rms, BLOCK_COLS=LOOP_COLS, num_warps=LOOP_WARPS, enable_fp_fusion=True,
        )  # fmt: skip
        return Forward(out, new_residual, mean, rstd)

    def run(tile: Tile) -> None:
        launch(
            x, kernels.row_fwd_kernel, (-(-rows // tile.rows),), *operands, rows, *numbers,
            RMS=rms, BLOCK_ROWS=tile.rows, BLOCK_COLS=tile.cols, num_warps=tile.warps, enable_fp_fusion=True,
        )  # fmt: skip

    key = rms, x.dtype, None if residual is None else residual.dtype, drop.rng_state is not None
    run(_fastest(kernels.row_fwd_kernel, tile, fwd_candidates, run, key, (rows, cols), x))
    return Forward(out, new_residual, mean, rstd)


# --- Backward --------------------------------------------------------------------------------------------------------


class Gradients(NamedTuple):
    dx: Tensor
    dinput: Tensor  # without elements where it equals dx
    dweight: Tensor  # without elements where it is not wanted
    dbias: Tensor


def backward(
    dout: Tensor,
    dnew_residual: Tensor | None,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    drop: Dropout,
    normalized_dims: int,
    rms: bool,
    need_dweight: bool,
    need_dbias: bool,
    bias_dtype: torch.dtype | None,
    need_dinput: bool,
) -> Gradients:
    leading, row_shape = x.shape[: x.dim() - normalized_dims], x.shape[x.dim() - normalized_dims :]
    rows, cols = leading.numel(), row_shape.numel()
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dinput = torch.empty(x.shape if need_dinput else (0,), dtype=dout.dtype, device=x.device)
    dweight = torch.empty(
        row_shape if need_dweight else (0,), dtype=torch.float32 if weight is None else weight.dtype, device=x.device
    )
    dbias = torch.empty(row_shape if need_dbias else (0,), dtype=bias_dtype or torch.float32, device=x.device)
    if x.numel() == 0:
        return Gradients(dx, dinput, dweight.zero_(), dbias.zero_())

    operand = _Operands(
        rows, cols, rms, dout, dnew_residual, x, mean, rstd, weight, dx, dinput if need_dinput else None
    )
    partial = _row_backward if cols <= BWD_MAX_COLS else _loop_backward
    dweight_partial, dbias_partial = partial(operand, drop, need_dweight, need_dbias)
    if need_dweight or need_dbias:
        from fastattn.ops import layer_norm_triton_bwd as kernels

        some_partial = dweight_partial if dweight_partial is not None else dbias_partial
        assert some_partial is not None  # one of them is wanted
        launch(
            x, kernels.column_sums_kernel, (-(-cols // COLUMN_TILE["BLOCK_COLS"]), int(need_dweight) + int(need_dbias)),
            dweight_partial, dbias_partial, dweight, dbias, some_partial.shape[0], cols,
            **COLUMN_TILE, enable_fp_fusion=True,
        )  # fmt: skip
    return Gradients(dx, dinput, dweight, dbias)


class _Operands:
    """The tensors of a backward as the kernels address them."""

    def __init__(self, rows, cols, rms, dout, dnew_residual, x, mean, rstd, weight, dx, dinput) -> None:
        self.rows, self.cols, self.rms = rows, cols, rms
        self.dout, self.stride_dout = as_rows(dout, rows, cols)
        self.dnew_residual, self.stride_dnew_residual = None, 0
        if dnew_residual is not None:
            self.dnew_residual, self.stride_dnew_residual = as_rows(dnew_residual, rows, cols)
        self.x, self.stride_x = as_rows(x, rows, cols)
        self.mean, self.rstd = mean.contiguous(), rstd.contiguous()
        self.weight = None if weight is None else weight.contiguous()
        self.dx, self.dinput = dx, dinput

    def partial(self, programs: int, wanted: bool) -> Tensor | None:
        return torch.empty((programs, self.cols), dtype=torch.float32, device=self.dx.device) if wanted else None


def _row_backward(o: _Operands, drop: Dropout, need_dweight: bool, need_dbias: bool) -> tuple[Tensor | None, ...]:
    from fastattn.ops import layer_norm_triton_bwd as kernels

    device = device_of(o.dx)
    tile = bwd_tile(o.rows, o.cols, device)
    assert tile is not None  # the caller compared with BWD_MAX_COLS
    # The next tile's x and dout are on their way while this one is computed. With three operands to hold, or dropout's
    # draws, the registers that takes would cost every second program its place.
    prefetch = 2 if o.dnew_residual is None and drop.rng_state is None else 1
    # And the longest rows then leave none for the weight.
    keep_weight = prefetch == 2 or o.cols <= KEEP_WEIGHT_MAX_COLS

    def run(tile: Tile) -> tuple[Tensor | None, ...]:
        programs = bwd_programs(o.rows, tile, device)
        partials = o.partial(programs, need_dweight), o.partial(programs, need_dbias)
        launch(
            o.dx, kernels.row_bwd_kernel, (programs,),
            o.dout, o.dnew_residual, o.x, o.mean, o.rstd, o.weight, o.dx, o.dinput, *partials, drop.rng_state,
            o.rows, o.cols, o.stride_dout, o.stride_dnew_residual, o.stride_x, drop.threshold, drop.scale,
            RMS=o.rms, BLOCK_ROWS=tile.rows, BLOCK_COLS=tile.cols, PREFETCH=prefetch, KEEP_WEIGHT=keep_weight,
            num_warps=tile.warps, enable_fp_fusion=True,
        )  # fmt: skip
        return partials

    key = o.rms, o.x.dtype, o.dout.dtype, prefetch, drop.rng_state is not None, need_dweight, need_dbias
    return run(_fastest(kernels.row_bwd_kernel, tile, bwd_candidates, run, key, (o.rows, o.cols), o.dx))


def _loop_backward(o: _Operands, drop: Dropout, need_dweight: bool, need_dbias: bool) -> tuple[Tensor | None, ...]:
    from fastattn.ops import layer_norm_triton_bwd as kernels

    launch(
        o.dx, kernels.loop_bwd_kernel, (o.rows,),
        o.dout, o.dnew_residual, o.x, o.mean, o.rstd, o.weight, o.dx, o.dinput, drop.rng_state,
        o.cols, o.stride_dout, o.stride_dnew_residual, o.stride_x, drop.threshold, drop.scale,
        RMS=o.rms, BLOCK_COLS=LOOP_COLS, num_warps=LOOP_WARPS, enable_fp_fusion=True,
    )  # fmt: skip
    if not (need_dweight or need_dbias):
        return None, None
    # Two programs a multiprocessor, each with a block of columns of as many rows as that leaves it.
    blocks = -(-o.cols // PARTIAL_TILE["BLOCK_COLS"])
    splits = max(1, min(2 * device_of(o.dx).multiprocessors // blocks, -(-o.rows // PARTIAL_TILE["BLOCK_ROWS"])))
    rows_per_program = -(-o.rows // splits)
    partials = o.partial(splits, need_dweight), o.partial(splits, need_dbias)
    launch(
        o.dx, kernels.partial_sums_kernel, (blocks, splits),
        o.dout, o.x, o.mean, o.rstd, *partials, o.rows, o.cols, rows_per_program, o.stride_dout, o.stride_x,
        RMS=o.rms, **PARTIAL_TILE, enable_fp_fusion=True,
    )  # fmt: skip
    return partials
