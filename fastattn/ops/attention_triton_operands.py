"""What attention's Triton kernels are handed: operands as rows, the shape of tiles, and how tiles get in and out.

Kernels are launched with flat lists of arguments. What belongs together goes on as one value, a NamedTuple: those of
tensors and numbers cost nothing, since the compiler takes them apart again, and those of constexprs, which a kernel
must annotate as ``tl.constexpr``, are decided on while it compiles.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl


class Tiles(NamedTuple):
    """The shape of a program's tiles, and how it multiplies them; constexprs all."""

    BLOCK_Q: tl.constexpr
    BLOCK_K: tl.constexpr
    HEAD_DIM: tl.constexpr
    HEAD_DIM_V: tl.constexpr
    # The head_dims, padded: of kernels that multiply whole rows.
    BLOCK_D: tl.constexpr
    BLOCK_DV: tl.constexpr
    # How much of head_dim is multiplied at once, with both operands read again for every tile; 0: all of it.
    SLICE: tl.constexpr
    PRECISION: tl.constexpr


class Rows(NamedTuple):
    """The rows of an operand that belong to one (batch, head), and where they end. Their elements are neighbours."""

    ptr: tl.tensor
    stride: tl.tensor
    length: tl.tensor


@triton.jit
def rows_of(ptr, batch, head, stride_batch, stride_head, stride_row, length):
    """The ``Rows`` of (batch, head)."""
    return Rows(ptr + batch * stride_batch + head * stride_head, stride_row, length)


@triton.jit
def load_tile(rows, first, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
              BOUNDARY: tl.constexpr, first_dim=0):  # fmt: skip
    """Rows [first, first + BLOCK) as (BLOCK, BLOCK_D), from ``first_dim``, a multiple of BLOCK_D; 0 past HEAD_DIM and,
    with BOUNDARY, past the rows' end.

    The first row's address has 64 bits, so that tensors may have more than 2^31 elements; offsets inside a tile have
    32, which saves registers (the plan copies operands whose rows lie 2^24 elements apart).
    """
    ptr = rows.ptr + tl.cast(first, tl.int64) * rows.stride
    row = tl.arange(0, BLOCK)
    dims = first_dim + tl.arange(0, BLOCK_D)
    ptrs = ptr + (row[:, None] * rows.stride + dims[None, :])
    inside = (row < rows.length - first)[:, None]
    inside_dim = (dims < HEAD_DIM)[None, :]
    CUT_DIMS: tl.constexpr = HEAD_DIM % BLOCK_D != 0
    if BOUNDARY and CUT_DIMS:
        return tl.load(ptrs, mask=inside & inside_dim, other=0.0)
    elif BOUNDARY:
        return tl.load(ptrs, mask=inside, other=0.0)
    elif CUT_DIMS:
        return tl.load(ptrs, mask=inside_dim, other=0.0)
    else:
        return tl.load(ptrs)


@triton.jit
def store_tile(rows, tile, first, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Writes the part of a (BLOCK, BLOCK_D) tile that exists."""
    ptr = rows.ptr + tl.cast(first, tl.int64) * rows.stride
    row = tl.arange(0, BLOCK)
    dims = tl.arange(0, BLOCK_D)
    ptrs = ptr + (row[:, None] * rows.stride + dims[None, :])
    inside = (row < rows.length - first)[:, None] & (dims < HEAD_DIM)[None, :]
    tl.store(ptrs, tile.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def sliced_dot(a, first_a, b, first_b, BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, HEAD_DIM: tl.constexpr,
               TILES: tl.constexpr):  # fmt: skip
    """Rows of a times rows of b, (BLOCK_A, BLOCK_B), SLICE of head_dim at a time; 0 past their ends.

    Operands that do not go into registers whole are read again for every tile. The loop is not unrolled, so that the
    registers of one slice are all that it takes.
    """
    dots = tl.zeros((BLOCK_A, BLOCK_B), tl.float32)
    for first_dim in tl.range(0, HEAD_DIM, TILES.SLICE, num_stages=1):
        a_slice = load_tile(a, first_a, BLOCK_A, HEAD_DIM, TILES.SLICE, True, first_dim)
        b_slice = load_tile(b, first_b, BLOCK_B, HEAD_DIM, TILES.SLICE, True, first_dim)
        dots = tl.dot(a_slice, tl.trans(b_slice), dots, input_precision=TILES.PRECISION)
    return dots
