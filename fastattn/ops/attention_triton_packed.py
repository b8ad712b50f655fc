"""Packed sequences in attention's Triton kernels: where a program's sequence lies, and what becomes of rows of none.

A batch entry of packed operands is a sequence, and starts at its first row: the strides of their batches are those of
their rows. Grids are as large as for a batch of longest sequences; programs past the end of their own leave at once.

cu_seqlens is the caller's, and on a GPU nobody has looked at it. What addresses memory by it comes through here, which
clips: from row 0 to the end, clipped sequences and the gaps between them lead step by step, even where it falls.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastattn.ops.attention_triton_scores import store_tile

# The backward's statistics of a sequence start at a multiple of this, and every kernel's tiles of rows divide it.
STATISTICS_ROWS: tl.constexpr = tl.constexpr(256)


@triton.jit
def packed_sequence(cu_seqlens_ptr, batch, total, longest):
    """(first row, how many) of a sequence: in the tensor and no more than ``longest``, whatever cu_seqlens holds."""
    first = tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + batch).to(tl.int64), 0), total)
    end = tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + batch + 1).to(tl.int64), first), total)
    return first, tl.minimum(end - first, longest).to(tl.int32)


@triton.jit
def fill_gaps(ptr, stride_row, value, cu_seqlens_ptr, batch, batches, total, longest, tile, tiles,
              BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """``value`` in the rows before the first sequence and in those behind sequence ``batch``, up to the next one or,
    behind the last, to the end: one program's part, of the ``tiles`` that share ``batch``. Mostly there are none."""
    first, length = packed_sequence(cu_seqlens_ptr, batch, total, longest)
    begin = first + length
    end = tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + batch + 1).to(tl.int64), 0), total)
    end = tl.where(batch == batches - 1, total, end)
    filling = tl.zeros((BLOCK, BLOCK_D), tl.float32) + value
    for row in range(begin + tile * BLOCK, end, tiles * BLOCK):
        store_tile(ptr, filling, row, end, stride_row, BLOCK, HEAD_DIM, BLOCK_D)
    for row in range(tile * BLOCK, tl.where(batch == 0, first, 0), tiles * BLOCK):
        store_tile(ptr, filling, row, first, stride_row, BLOCK, HEAD_DIM, BLOCK_D)


@triton.jit
def statistics_row(first, batch):
    """Where the backward's statistics of a sequence start, the first row of which is ``first``: each has up to
    STATISTICS_ROWS more than rows, so that none of its tiles reaches into the next one's."""
    return (first + batch * STATISTICS_ROWS) // STATISTICS_ROWS * STATISTICS_ROWS
