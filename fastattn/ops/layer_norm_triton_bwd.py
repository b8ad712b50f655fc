"""Backward kernels of layer norm and RMS norm in Triton.

With x_hat = (x - mean) * rstd and g = dout * weight, of each row::

    dx      = rstd * (g - mean(g) - x_hat * mean(g * x_hat)) + dnew_residual       (rms: without mean(g))
    dinput  = dropout's mask and scale applied to dx                               (add_* only)
    dweight = sum over rows of dout * x_hat         dbias = sum over rows of dout

Work:    row_bwd_kernel: as many programs as fill the GPU, each walking over tiles of whole rows; dweight and dbias are
         summed in registers and leave as one row of partial sums a program. Rows too long for that: loop_bwd_kernel
         computes dx, partial_sums_kernel the partial sums, a block of columns and a range of rows a program.
         column_sums_kernel adds the partial sums in a fixed order: no atomics, the same bits in every run.
Memory:  x and dout are read once (long rows: three times, from L2 where they fit).
Numbers: float32 from the load to the store.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastattn.ops.philox_triton import dropout_keep


@triton.jit
def load_normalized(x_ptr, stride_x, dout_ptr, stride_dout, mean, rstd, row, col, valid, RMS: tl.constexpr):
    """Tiles of x_hat and dout, 0 where not ``valid``."""
    x = tl.load(x_ptr + row[:, None] * stride_x + col[None, :], mask=valid, other=0.0).to(tl.float32)
    dout = tl.load(dout_ptr + row[:, None] * stride_dout + col[None, :], mask=valid, other=0.0).to(tl.float32)
    if not RMS:
        x = tl.where(valid, x - mean[:, None], 0.0)
    return x * rstd[:, None], dout


@triton.jit
def store_dx(
    dx, dnew_residual_ptr, stride_dnew_residual, dx_ptr, dinput_ptr, rng_state_ptr, dropout_threshold, dropout_scale,
    row, first_col, valid, cols, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """Adds the gradient that reaches new_residual from elsewhere; writes dx and, where it differs, dinput."""
    col = first_col + tl.arange(0, BLOCK_COLS)
    if dnew_residual_ptr is not None:
        dnew_residual_ptr += row[:, None] * stride_dnew_residual + col[None, :]
        dx += tl.load(dnew_residual_ptr, mask=valid, other=0.0).to(tl.float32)
    place = row[:, None] * cols + col[None, :]
    tl.store(dx_ptr + place, dx.to(dx_ptr.dtype.element_ty), mask=valid)
    if dinput_ptr is not None:
        if rng_state_ptr is not None:
            keep = dropout_keep(rng_state_ptr, row >> 32, row, first_col, dropout_threshold, BLOCK_COLS)
            dx = tl.where(keep, dx * dropout_scale, 0.0)
        tl.store(dinput_ptr + place, dx.to(dinput_ptr.dtype.element_ty), mask=valid)


@triton.jit(do_not_specialize=["rows", "dropout_threshold"])
def row_bwd_kernel(
    dout_ptr,  # (rows, cols)
    dnew_residual_ptr,  # (rows, cols), or None: 0
    x_ptr,  # (rows, cols)
    mean_ptr,  # (rows,) float32; unused by rms
    rstd_ptr,  # (rows,) float32
    weight_ptr,  # (cols,) or None
    dx_ptr,  # (rows, cols) contiguous
    dinput_ptr,  # (rows, cols) contiguous, or None: not wanted
    dweight_ptr,  # (programs, cols) float32, or None: not wanted
    dbias_ptr,  # (programs, cols) float32, or None: not wanted
    rng_state_ptr,  # (2,) int64, or None: no dropout
    rows,
    cols,
    stride_dout,
    stride_dnew_residual,
    stride_x,
    dropout_threshold,
    dropout_scale,
    RMS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    PREFETCH: tl.constexpr,
    KEEP_WEIGHT: tl.constexpr,  # in registers; else it is loaded for each tile, from L1
):
    program, programs = tl.program_id(0), tl.num_programs(0)
    col = tl.arange(0, BLOCK_COLS)
    weight = tl.full((BLOCK_COLS,), 1.0, tl.float32)
    if KEEP_WEIGHT and weight_ptr is not None:
        weight = tl.load(weight_ptr + col, mask=col < cols, other=0.0).to(tl.float32)
    dweight = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
    dbias = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)

    for tile in tl.range(program, tl.cdiv(rows, BLOCK_ROWS), programs, num_stages=PREFETCH):
        row = tl.cast(tile, tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        valid = (row < rows)[:, None] & (col < cols)[None, :]
        rstd = tl.load(rstd_ptr + row, mask=row < rows, other=0.0)
        mean = rstd
        if not RMS:
            mean = tl.load(mean_ptr + row, mask=row < rows, other=0.0)
        x_hat, dout = load_normalized(x_ptr, stride_x, dout_ptr, stride_dout, mean, rstd, row, col, valid, RMS)
        if dweight_ptr is not None:
            dweight += dout * x_hat
        if dbias_ptr is not None:
            dbias += dout

        if not KEEP_WEIGHT and weight_ptr is not None:
            weight = tl.load(weight_ptr + col, mask=col < cols, other=0.0).to(tl.float32)
        g = dout * weight[None, :]
        mean_gx = tl.sum(g * x_hat, axis=1) / cols
        dx = g - x_hat * mean_gx[:, None]
        if not RMS:
            mean_g = tl.sum(g, axis=1) / cols
            dx -= mean_g[:, None]
        store_dx(dx * rstd[:, None], dnew_residual_ptr, stride_dnew_residual, dx_ptr, dinput_ptr, rng_state_ptr,
                 dropout_threshold, dropout_scale, row, 0, valid, cols, BLOCK_COLS)  # fmt: skip

    place = program.to(tl.int64) * cols + col
    if dweight_ptr is not None:
        tl.store(dweight_ptr + place, tl.sum(dweight, axis=0), mask=col < cols)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + place, tl.sum(dbias, axis=0), mask=col < cols)


@triton.jit(do_not_specialize=["dropout_threshold"])
def loop_bwd_kernel(
    dout_ptr,
    dnew_residual_ptr,
    x_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    dx_ptr,
    dinput_ptr,
    rng_state_ptr,
    cols,
    stride_dout,
    stride_dnew_residual,
    stride_x,
    dropout_threshold,
    dropout_scale,
    RMS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    rstd = tl.load(rstd_ptr + row)
    mean = rstd
    if not RMS:
        mean = tl.load(mean_ptr + row)
    sum_g = tl.zeros((1, BLOCK_COLS), tl.float32)
    sum_gx = tl.zeros((1, BLOCK_COLS), tl.float32)
    for first_col in range(0, cols, BLOCK_COLS):
        col = first_col + tl.arange(0, BLOCK_COLS)
        valid = (col < cols)[None, :]
        x_hat, g = load_normalized(x_ptr, stride_x, dout_ptr, stride_dout, mean, rstd, row, col, valid, RMS)
        if weight_ptr is not None:
            g *= tl.load(weight_ptr + col, mask=col < cols, other=0.0).to(tl.float32)[None, :]
        sum_g += g
        sum_gx += g * x_hat
    mean_gx = tl.sum(sum_gx, axis=1) / cols
    mean_g = tl.sum(sum_g, axis=1) / cols

    for first_col in range(0, cols, BLOCK_COLS):
        col = first_col + tl.arange(0, BLOCK_COLS)
        valid = (col < cols)[None, :]
        x_hat, g = load_normalized(x_ptr, stride_x, dout_ptr, stride_dout, mean, rstd, row, col, valid, RMS)
        if weight_ptr is not None:
            g *= tl.load(weight_ptr + col, mask=col < cols, other=0.0).to(tl.float32)[None, :]
        dx = g - x_hat * mean_gx[:, None]
        if not RMS:
            dx -= mean_g[:, None]
        store_dx(dx * rstd[:, None], dnew_residual_ptr, stride_dnew_residual, dx_ptr, dinput_ptr, rng_state_ptr,
                 dropout_threshold, dropout_scale, row, first_col, valid, cols, BLOCK_COLS)  # fmt: skip


@triton.jit(do_not_specialize=["rows", "rows_per_program"])
def partial_sums_kernel(
    dout_ptr,
    x_ptr,
    mean_ptr,
    rstd_ptr,
    dweight_ptr,  # (programs of axis 1, cols) float32, or None: not wanted
    dbias_ptr,
    rows,
    cols,
    rows_per_program,
    stride_dout,
    stride_x,
    RMS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    col = tl.program_id(0) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    dweight = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
    dbias = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
    first_row = tl.program_id(1).to(tl.int64) * rows_per_program
    last_row = tl.minimum(first_row + rows_per_program, rows)
    for start in range(first_row, last_row, BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS).to(tl.int64)
        valid = (row < last_row)[:, None] & (col < cols)[None, :]
        rstd = tl.load(rstd_ptr + row, mask=row < last_row, other=0.0)
        mean = rstd
        if not RMS:
            mean = tl.load(mean_ptr + row, mask=row < last_row, other=0.0)
        x_hat, dout = load_normalized(x_ptr, stride_x, dout_ptr, stride_dout, mean, rstd, row, col, valid, RMS)
        dweight += dout * x_hat
        dbias += dout
    place = tl.program_id(1).to(tl.int64) * cols + col
    if dweight_ptr is not None:
        tl.store(dweight_ptr + place, tl.sum(dweight, axis=0), mask=col < cols)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + place, tl.sum(dbias, axis=0), mask=col < cols)


@triton.jit
def column_sums(partial_ptr, out_ptr, rows, cols, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr):
    row, col = tl.arange(0, BLOCK_ROWS), tl.program_id(0) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
    for start in range(0, rows, BLOCK_ROWS):
        valid = (start + row < rows)[:, None] & (col < cols)[None, :]
        place = (start + row).to(tl.int64)[:, None] * cols + col[None, :]
        total += tl.load(partial_ptr + place, mask=valid, other=0.0)
    out = tl.sum(total, axis=0).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + col, out, mask=col < cols)


@triton.jit(do_not_specialize=["rows"])
def column_sums_kernel(
    dweight_partial_ptr,  # (rows, cols) float32, or None: not wanted
    dbias_partial_ptr,
    dweight_ptr,  # (cols,)
    dbias_ptr,
    rows,
    cols,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """Adds up the columns of both matrices, each by its own half of the grid's axis 1 (of length 1 or 2)."""
    if dweight_partial_ptr is not None:  # noqa: SIM102 (the outer condition is a compile-time one)
        if tl.program_id(1) == 0:
            column_sums(dweight_partial_ptr, dweight_ptr, rows, cols, BLOCK_ROWS, BLOCK_COLS)
    if dbias_partial_ptr is not None:  # noqa: SIM102
        if tl.program_id(1) == tl.num_programs(1) - 1:
            column_sums(dbias_partial_ptr, dbias_ptr, rows, cols, BLOCK_ROWS, BLOCK_COLS)
