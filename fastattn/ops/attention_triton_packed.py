"""Packed sequences in attention's Triton kernels: where a program's sequence lies, and what becomes of rows of none.

A batch entry of packed operands is a sequence, and starts at its first row: the strides of their batches are those of
their rows. Grids are as large as for a batch of longest sequences; programs past the end of their own leave at once.

cu_seqlens is the caller's, and on a GPU nobody has looked at it. What addresses memory by it comes through here, which
clips: from row 0 to the end, clipped sequences and the gaps between them lead step by step, even where it falls.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from fastattn.ops.attention_triton_operands import Rows, store_tile

# The backward's statistics of a sequence start at a multiple of this, and every kernel's tiles of rows divide it.
STATISTICS_ROWS: tl.constexpr = tl.constexpr(256)


class Packed(NamedTuple):
    """The sequences of queries or of keys: ``longest`` is how many rows none has more than."""

    cu_seqlens_ptr: tl.tensor
    total: tl.tensor
    longest: tl.tensor


class Share(NamedTuple):
    """Program ``tile`` of the ``tiles`` that have sequence ``batch`` of ``batches``."""

    batch: tl.tensor
    batches: tl.tensor
    tile: tl.tensor
    tiles: tl.tensor


@triton.jit
def packed_sequence(packed, batch):
    """(first row, how many) of a sequence: in the tensor and no more than ``longest``, whatever cu_seqlens holds."""
    first = tl.minimum(tl.maximum(tl.load(packed.cu_seqlens_ptr + batch).to(tl.int64), 0), packed.total)
    end = tl.minimum(tl.maximum(tl.load(packed.cu_seqlens_ptr + batch + 1).to(tl.int64), first), packed.total)
    return first, tl.minimum(end - first, packed.longest).to(tl.int32)


@triton.jit
def fill_gaps(ptr, stride_row, value, packed, share, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr,
              BLOCK_D: tl.constexpr):  # fmt: skip
    """``value`` in the rows before the first sequence and in those behind the program's own, up to the next one or,
    behind the last, to the end: its share of them. Mostly there are none. ptr: of the head's first row."""
    first, length = packed_sequence(packed, share.batch)
    begin = first + length
    end = tl.minimum(tl.maximum(tl.load(packed.cu_seqlens_ptr + share.batch + 1).to(tl.int64), 0), packed.total)
    end = tl.where(share.batch == share.batches - 1, packed.total, end)
    filling = tl.zeros((BLOCK, BLOCK_D), tl.float32) + value
    behind, before = Rows(ptr, stride_row, end), Rows(ptr, stride_row, first)
    for row in range(begin + share.tile * BLOCK, end, share.tiles * BLOCK):
        store_tile(behind, filling, row, BLOCK, HEAD_DIM, BLOCK_D)
    for row in range(share.tile * BLOCK, tl.where(share.batch == 0, first, 0), share.tiles * BLOCK):
        store_tile(before, filling, row, BLOCK, HEAD_DIM, BLOCK_D)


@triton.jit
def statistics_row(first, batch):
    """Where the backward's statistics of a sequence start, the first row of which is ``first``: each has up to
    STATISTICS_ROWS more than rows, so that none of its tiles reaches into the next one's."""
    return (first + batch * STATISTICS_ROWS) // STATISTICS_ROWS * STATISTICS_ROWS
