"""Forward kernels of layer norm and RMS norm in Triton, with the residual addition and dropout before them.

::

    layer_norm   out = (x - mean) * rstd * weight + bias      mean, rstd = 1 / sqrt(variance + eps) of each row
    rms_norm     out = x * rstd * weight                      rstd = 1 / sqrt(mean of squares + eps)
    add_*        x = new_residual = residual + dropout(input), one more output

Work:    row_fwd_kernel: one program a tile of whole rows, BLOCK_COLS >= cols. loop_fwd_kernel: one program a row, which
         it walks in chunks of BLOCK_COLS, twice.
Memory:  a row that fits is read once and stays in registers; a longer one is read again from L2.
Numbers: float32 from the load to the store; the variance sums squares of differences from the mean (no cancellation).
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastattn.ops.philox_triton import dropout_keep


@triton.jit
def row_statistics(x, valid, count, RMS: tl.constexpr):
    """Of a tile (rows, BLOCK_COLS) that is 0 where not ``valid``: x - mean, mean, variance (rms: x, 0, mean square)."""
    if RMS:
        centred = x
        mean = tl.zeros((x.shape[0],), tl.float32)
    else:
        # Rounding a large mean to float32 costs small deviations their digits, hence a second step.
        guess = tl.sum(x, axis=1) / count
        centred = tl.where(valid, x - guess[:, None], 0.0)
        correction = tl.sum(centred, axis=1) / count
        centred = tl.where(valid, centred - correction[:, None], 0.0)
        mean = guess + correction
    variance = tl.sum(centred * centred, axis=1) / count
    return centred, mean, variance


@triton.jit
def reciprocal_root(variance, eps):
    """Correctly rounded: a row has one, so that the approximate instruction would gain nothing."""
    return tl.div_rn(1.0, tl.sqrt_rn(variance + eps))


@triton.jit
def load_x(
    x_ptr,
    stride_x,
    residual_ptr,
    stride_residual,
    new_residual_ptr,
    rng_state_ptr,
    dropout_threshold,
    dropout_scale,
    row,
    first_col,
    valid,
    cols,
    BLOCK_COLS: tl.constexpr,
):
    """A tile (rows, BLOCK_COLS) of what is normalised; for add_* it is computed, and written to new_residual."""
    col = first_col + tl.arange(0, BLOCK_COLS)
    x = tl.load(x_ptr + row[:, None] * stride_x + col[None, :], mask=valid, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        if rng_state_ptr is not None:
            keep = dropout_keep(rng_state_ptr, row >> 32, row, first_col, dropout_threshold, BLOCK_COLS)
            # Not a product with 0: what is dropped may be infinite.
            x = tl.where(keep, x * dropout_scale, 0.0)
        residual = tl.load(residual_ptr + row[:, None] * stride_residual + col[None, :], mask=valid, other=0.0)
        # What is normalised is new_residual as it is returned, rounded.
        rounded = (residual.to(tl.float32) + x).to(new_residual_ptr.dtype.element_ty)
        tl.store(new_residual_ptr + row[:, None] * cols + col[None, :], rounded, mask=valid)
        x = rounded.to(tl.float32)
    return x


@triton.jit
def store_out(out_ptr, weight_ptr, bias_ptr, normalized, row, col, valid, cols):
    """out = normalized * weight + bias."""
    out = normalized
    if weight_ptr is not None:
        out *= tl.load(weight_ptr + col, mask=col < cols, other=0.0).to(tl.float32)[None, :]
    if bias_ptr is not None:
        out += tl.load(bias_ptr + col, mask=col < cols, other=0.0).to(tl.float32)[None, :]
    out = out.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row[:, None] * cols + col[None, :], out, mask=valid)


@triton.jit(do_not_specialize=["rows", "dropout_threshold"])
def row_fwd_kernel(
    x_ptr,  # (rows, cols); for add_*: input
    residual_ptr,  # (rows, cols); None: not add_*
    new_residual_ptr,  # (rows, cols) contiguous, or None
    weight_ptr,  # (cols,) or None
    bias_ptr,  # (cols,) or None
    out_ptr,  # (rows, cols) contiguous
    mean_ptr,  # (rows,) float32; unused by rms
    rstd_ptr,  # (rows,) float32
    rng_state_ptr,  # (2,) int64, or None: no dropout
    rows,
    cols,
    stride_x,
    stride_residual,
    eps,
    dropout_threshold,
    dropout_scale,
    RMS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    col = tl.arange(0, BLOCK_COLS)
    valid = (row < rows)[:, None] & (col < cols)[None, :]
    x = load_x(x_ptr, stride_x, residual_ptr, stride_residual, new_residual_ptr, rng_state_ptr, dropout_threshold,
               dropout_scale, row, 0, valid, cols, BLOCK_COLS)  # fmt: skip

    centred, mean, variance = row_statistics(x, valid, cols, RMS)
    rstd = reciprocal_root(variance, eps)
    if not RMS:
        tl.store(mean_ptr + row, mean, mask=row < rows)
    tl.store(rstd_ptr + row, rstd, mask=row < rows)
    store_out(out_ptr, weight_ptr, bias_ptr, centred * rstd[:, None], row, col, valid, cols)


@triton.jit(do_not_specialize=["dropout_threshold"])
def loop_fwd_kernel(
    x_ptr,
    residual_ptr,
    new_residual_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    mean_ptr,
    rstd_ptr,
    rng_state_ptr,
    cols,
    stride_x,
    stride_residual,
    eps,
    dropout_threshold,
    dropout_scale,
    RMS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    # Mean and sum of squared differences so far; each chunk's are merged in (Chan, Golub, LeVeque 1983).
    mean = tl.zeros((1,), tl.float32)
    squares = tl.zeros((1,), tl.float32)
    for first_col in range(0, cols, BLOCK_COLS):
        col = first_col + tl.arange(0, BLOCK_COLS)
        valid = (col < cols)[None, :]
        x = load_x(x_ptr, stride_x, residual_ptr, stride_residual, new_residual_ptr, rng_state_ptr, dropout_threshold,
                   dropout_scale, row, first_col, valid, cols, BLOCK_COLS)  # fmt: skip
        count = tl.minimum(cols - first_col, BLOCK_COLS).to(tl.float32)
        _, chunk_mean, chunk_variance = row_statistics(x, valid, count, RMS)
        delta = chunk_mean - mean
        share = count / (first_col + count)
        mean += delta * share
        # In this order a first chunk of huge numbers gives 0, not infinity times 0.
        squares += chunk_variance * count + delta * share * first_col * delta
    rstd = reciprocal_root(squares / cols, eps)
    if not RMS:
        tl.store(mean_ptr + row, mean)
    tl.store(rstd_ptr + row, rstd)

    if residual_ptr is not None:
        # Other threads may read what this one has written.
        tl.debug_barrier()
        x_ptr = new_residual_ptr
        stride_x = cols
    for first_col in range(0, cols, BLOCK_COLS):
        col = first_col + tl.arange(0, BLOCK_COLS)
        valid = (col < cols)[None, :]
        x = tl.load(x_ptr + row[:, None] * stride_x + col[None, :], mask=valid, other=0.0).to(tl.float32)
        store_out(out_ptr, weight_ptr, bias_ptr, (x - mean[:, None]) * rstd[:, None], row, col, valid, cols)
