"""INT8 kernels in Triton: quantisation by row, and the product with scales, bias and activation in its epilogue.

::

    scale = max|row| / 127                          q = round(row * (1 / scale)), ties to even
    out   = activation((a @ b.T) * a_scale[:, None] * b_scale + bias)

Work:    quantisation: a tile of whole rows a program, or, for rows that do not fit, one row, walked twice. Products: a
         tile of the result a program; programs that run at the same time share rows of a and b, which L2 then holds.
Memory:  tiles of a and b pass through shared memory, NUM_STAGES deep, both with k contiguous, as the tensor cores of
         sm_80 (mma) and sm_90 (wgmma) want 8-bit operands.
Numbers: int32 sums, exact up to a depth of 131071; scales, bias and activation in float32. Launch with
         enable_fp_fusion=False: every product and sum is then rounded as eager rounds it, and so are the q.
"""

from __future__ import annotations

import triton
import triton.language as tl

# The smallest normal float32: 1 / scale is finite for every scale from here on.
SMALLEST_SCALE = tl.constexpr(2.0**-126)
INFINITY_BITS = tl.constexpr(0x7F800000)
# Added to a float32 of less than 2^22 and taken away again, it leaves the nearest integer, ties to even.
ROUNDER = tl.constexpr(1.5 * 2**23)
HALF_SQRT_2 = tl.constexpr(0.7071067811865476)
SQRT_2_OVER_PI = tl.constexpr(0.7978845608028654)


# --- Quantisation ----------------------------------------------------------------------------------------------------


@triton.jit
def magnitude_bits(x):
    """|x| as the integer of its bits, which is ordered as |x| is, with infinity and then NaN above every number."""
    return x.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def row_scales(largest):
    """(scale, 1 / scale, whether the row is finite) from the bits of its largest magnitude."""
    finite = largest < INFINITY_BITS
    scale = tl.maximum(tl.div_rn(largest.to(tl.float32, bitcast=True), 127.0), SMALLEST_SCALE)
    scale = tl.where(largest == 0, 1.0, tl.where(finite, scale, float("nan")))
    return scale, tl.div_rn(1.0, scale), finite


@triton.jit
def quantized(x, inverse, finite):
    """int8 of a tile (rows, k); 0 in rows that are not finite."""
    rounded = (x.to(tl.float32) * inverse[:, None] + ROUNDER) - ROUNDER
    return tl.where(finite[:, None], rounded, 0.0).to(tl.int8)


@triton.jit(do_not_specialize=["rows"])
def quantize_rows_kernel(
    input_ptr,  # (rows, depth)
    q_ptr,  # (rows, depth) int8, contiguous
    scale_ptr,  # (rows,) float32
    rows,
    depth,
    stride_input,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    k = tl.arange(0, BLOCK_DEPTH)
    valid = (row < rows)[:, None] & (k < depth)[None, :]
    x = tl.load(input_ptr + row[:, None] * stride_input + k[None, :], mask=valid, other=0.0)
    scale, inverse, finite = row_scales(tl.max(magnitude_bits(x), axis=1))
    tl.store(scale_ptr + row, scale, mask=row < rows)
    tl.store(q_ptr + row[:, None] * depth + k[None, :], quantized(x, inverse, finite), mask=valid)


@triton.jit
def largest_magnitudes(x_ptr, row, stride, valid_row, depth, BLOCK_DEPTH: tl.constexpr):
    """Bits of the largest magnitude of each row."""
    largest = tl.zeros((row.shape[0], BLOCK_DEPTH), tl.int32)
    for first in tl.range(0, depth, BLOCK_DEPTH, num_stages=4):
        k = first + tl.arange(0, BLOCK_DEPTH)
        valid = valid_row[:, None] & (k < depth)[None, :]
        x = tl.load(x_ptr + row[:, None] * stride + k[None, :], mask=valid, other=0.0)
        largest = tl.maximum(largest, magnitude_bits(x))
    return tl.max(largest, axis=1)


@triton.jit
def quantize_long_rows_kernel(input_ptr, q_ptr, scale_ptr, depth, stride_input, BLOCK_DEPTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    largest = largest_magnitudes(input_ptr, row, stride_input, row >= 0, depth, BLOCK_DEPTH)
    scale, inverse, finite = row_scales(largest)
    tl.store(scale_ptr + row, scale)
    for first in range(0, depth, BLOCK_DEPTH):
        k = first + tl.arange(0, BLOCK_DEPTH)
        valid = (k < depth)[None, :]
        x = tl.load(input_ptr + row[:, None] * stride_input + k[None, :], mask=valid, other=0.0)
        tl.store(q_ptr + row[:, None] * depth + k[None, :], quantized(x, inverse, finite), mask=valid)


# --- Epilogue --------------------------------------------------------------------------------------------------------


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """NaN stays NaN."""
    if ACTIVATION == "relu":
        x = tl.where(x < 0.0, 0.0, x)
    elif ACTIVATION == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * HALF_SQRT_2))
    elif ACTIVATION == "gelu_tanh":
        # 1 + tanh(y) = 2 / (1 + exp(-2 y))
        y = SQRT_2_OVER_PI * (x + 0.044715 * x * x * x)
        x = x / (1.0 + tl.exp(-2.0 * y))
    elif ACTIVATION == "silu":
        x = x / (1.0 + tl.exp(-x))
    return x


@triton.jit
def store_result(
    sums, a_scale, b_scale_ptr, bias_ptr, out_ptr, first_row, first_column, rows, columns, ACTIVATION: tl.constexpr
):  # fmt: skip
    """Of a tile of int32 sums; out is (rows, columns), contiguous."""
    row, column = tl.arange(0, sums.shape[0]), first_column + tl.arange(0, sums.shape[1])
    valid_column = column < columns
    b_scale = tl.load(b_scale_ptr + column, mask=valid_column, other=0.0)
    out = sums.to(tl.float32) * a_scale[:, None] * b_scale[None, :]
    if bias_ptr is not None:
        out += tl.load(bias_ptr + column, mask=valid_column, other=0.0).to(tl.float32)[None, :]
    out = activate(out, ACTIVATION).to(out_ptr.dtype.element_ty)
    out_ptr += tl.cast(first_row, tl.int64) * columns
    place = row[:, None] * columns + column[None, :]
    tl.store(out_ptr + place, out, mask=(row < rows - first_row)[:, None] & valid_column[None, :])


# --- Products --------------------------------------------------------------------------------------------------------


@triton.jit
def tile_of_program(rows, columns, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, GROUP_ROWS: tl.constexpr):
    """Tiles in groups of GROUP_ROWS tile rows, column by column: neighbours in time read the same columns of b."""
    tile_rows, tile_columns = tl.cdiv(rows, BLOCK_ROWS), tl.cdiv(columns, BLOCK_COLUMNS)
    group_tiles = GROUP_ROWS * tile_columns
    program = tl.program_id(0)
    first_row = program // group_tiles * GROUP_ROWS
    group_rows = tl.minimum(tile_rows - first_row, GROUP_ROWS)
    return first_row + program % group_tiles % group_rows, program % group_tiles // group_rows


@triton.jit(do_not_specialize=["rows"])
def int8_matmul_kernel(
    a_ptr,  # (rows, depth) int8
    b_ptr,  # (columns, depth) int8
    a_scale_ptr,  # (rows,) float32
    b_scale_ptr,  # (columns,) float32
    bias_ptr,  # (columns,) or None
    out_ptr,  # (rows, columns) contiguous
    rows,
    columns,
    depth,
    stride_a,
    stride_b,
    ACTIVATION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
):
    tile_row, tile_column = tile_of_program(rows, columns, BLOCK_ROWS, BLOCK_COLUMNS, GROUP_ROWS)
    first_row, first_column = tile_row * BLOCK_ROWS, tile_column * BLOCK_COLUMNS
    row = first_row + tl.arange(0, BLOCK_ROWS)
    column = first_column + tl.arange(0, BLOCK_COLUMNS)
    k = tl.arange(0, BLOCK_DEPTH)
    # 64-bit to the tile's corner, 32-bit within: fewer registers hold the addresses.
    a_ptrs = a_ptr + tl.cast(first_row, tl.int64) * stride_a
    b_ptrs = b_ptr + tl.cast(first_column, tl.int64) * stride_b
    a_ptrs += tl.arange(0, BLOCK_ROWS)[:, None] * stride_a + k[None, :]
    b_ptrs += tl.arange(0, BLOCK_COLUMNS)[None, :] * stride_b + k[:, None]
    valid_row, valid_column = (row < rows)[:, None], (column < columns)[None, :]

    sums = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.int32)
    for first in range(0, depth, BLOCK_DEPTH):
        a = tl.load(a_ptrs, mask=valid_row & (k < depth - first)[None, :], other=0)
        b = tl.load(b_ptrs, mask=valid_column & (k < depth - first)[:, None], other=0)
        sums = tl.dot(a, b, sums, out_dtype=tl.int32)
        a_ptrs += BLOCK_DEPTH
        b_ptrs += BLOCK_DEPTH
    a_scale = tl.load(a_scale_ptr + row, mask=row < rows, other=0.0)
    store_result(sums, a_scale, b_scale_ptr, bias_ptr, out_ptr, first_row, first_column, rows, columns, ACTIVATION)


@triton.jit(do_not_specialize=["rows"])
def int8_linear_kernel(
    x_ptr,  # (rows, depth) floating, rows <= BLOCK_ROWS
    b_ptr,
    b_scale_ptr,
    bias_ptr,
    out_ptr,
    rows,
    columns,
    depth,
    stride_x,
    stride_b,
    ACTIVATION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
):
    """Few rows: every program quantises them all, from L2, while the weight, read once, comes from memory."""
    row, k = tl.arange(0, BLOCK_ROWS), tl.arange(0, BLOCK_DEPTH)
    first_column = tl.program_id(0) * BLOCK_COLUMNS
    column = first_column + tl.arange(0, BLOCK_COLUMNS)
    x_scale, inverse, finite = row_scales(
        largest_magnitudes(x_ptr, row.to(tl.int64), stride_x, row < rows, depth, BLOCK_DEPTH)
    )

    x_ptrs = x_ptr + row.to(tl.int64)[:, None] * stride_x + k[None, :]
    b_ptrs = b_ptr + tl.cast(first_column, tl.int64) * stride_b
    b_ptrs += tl.arange(0, BLOCK_COLUMNS)[None, :] * stride_b + k[:, None]
    valid_row, valid_column = (row < rows)[:, None], (column < columns)[None, :]
    sums = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.int32)
    for first in range(0, depth, BLOCK_DEPTH):
        x = tl.load(x_ptrs, mask=valid_row & (k < depth - first)[None, :], other=0.0)
        b = tl.load(b_ptrs, mask=valid_column & (k < depth - first)[:, None], other=0)
        sums = tl.dot(quantized(x, inverse, finite), b, sums, out_dtype=tl.int32)
        x_ptrs += BLOCK_DEPTH
        b_ptrs += BLOCK_DEPTH
    store_result(sums, x_scale, b_scale_ptr, bias_ptr, out_ptr, 0, first_column, rows, columns, ACTIVATION)
