"""Attention's forward in Triton.

    out = softmax(scores(q, k)) v,  lse = log-sum-exp of each row's scores

Work:    one program per (batch, head, BLOCK_Q rows); it visits the key tiles that its rows see, those that all of them
         see without comparing positions. The last rows, which see most under a causal mask, start first.
Memory:  q, the output's sums, maxima and sums of exponentials in registers; k and v tiles pipelined by the compiler.
Numbers: dot products, softmax and sums in float32; probabilities rounded to v's dtype before they multiply v.
Source:  Dao, "FlashAttention-2", arXiv:2307.08691, algorithm 1.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from fastattn.ops.attention_triton_operands import Tiles, load_tile, rows_of, sliced_dot, store_tile
from fastattn.ops.attention_triton_packed import Packed, Share, fill_gaps, packed_sequence
from fastattn.ops.attention_triton_scores import (
    LN_2,
    MASK_NONE,
    VARYING,
    WHOLE_WALK,
    Dropout,
    Mask,
    Options,
    Positions,
    Scoring,
    cap_scores,
    kept,
    keys_of_rows,
    listed_tiles,
    load_slope,
    mask_scores,
    online_softmax,
    visited_position,
    walk_part,
)


class Described(NamedTuple):
    """Where TMA finds an operand: a descriptor of the whole tensor, and the (batch, head) to load from."""

    descriptor: tl.tensor
    batch: tl.tensor
    head: tl.tensor


@triton.jit
def _load_described(operand, first, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """As ``load_tile``, by TMA, which fills in zeros past the ends by itself."""
    return tl.reshape(operand.descriptor.load([operand.batch, operand.head, first, 0]), (BLOCK, BLOCK_D))


@triton.jit
def _first_state(sinks_ptr, head, SINKS: tl.constexpr, TILES: tl.constexpr):
    """(output's sums, rows' maxima, rows' sums of exponentials) of rows that have seen no key."""
    acc = tl.zeros((TILES.BLOCK_Q, TILES.BLOCK_DV), tl.float32)
    row_max = tl.full((TILES.BLOCK_Q,), float("-inf"), tl.float32)
    row_sum = tl.zeros((TILES.BLOCK_Q,), tl.float32)
    if SINKS:
        # One more logit, without a value: the pass starts as if it had seen it.
        sink = tl.load(sinks_ptr + head).to(tl.float32)
        row_max = tl.zeros((TILES.BLOCK_Q,), tl.float32) + sink
        row_sum += tl.where(sink == float("-inf"), 0.0, 1.0)
    return acc, row_max, row_sum


@triton.jit
def _visit_keys(acc, row_max, row_sum, q_tile, q, first_row, k, v, start, stop, list_ptr, scoring, dropout,
                TILES: tl.constexpr, OPTIONS: tl.constexpr, LISTED: tl.constexpr, TMA: tl.constexpr,
                BOUNDARY: tl.constexpr):  # fmt: skip
    """The online softmax over the key tiles of [start, stop) or, LISTED, over those that part of a list names.

    q_tile: rows ``first_row`` and on of q, which is read instead where SLICE > 0. k, v: ``Rows`` or, if TMA,
    ``Described``. BOUNDARY: some of the tiles' keys are hidden from some of the rows, or do not exist.
    """
    BLOCK_K: tl.constexpr = TILES.BLOCK_K
    row, col = tl.arange(0, TILES.BLOCK_Q), tl.arange(0, BLOCK_K)
    # The few tiles at the edges are not worth the registers of as many addresses and comparisons as there are stages.
    CUT_DIMS: tl.constexpr = OPTIONS.PLAIN and TILES.HEAD_DIM != TILES.BLOCK_D
    STAGES: tl.constexpr = 1 if BOUNDARY and (OPTIONS.MASK != MASK_NONE or CUT_DIMS) else None
    for at in tl.range(start, stop, 1 if LISTED else BLOCK_K, num_stages=STAGES):
        first_col = visited_position(at, list_ptr, BLOCK_K, LISTED)

        if TILES.SLICE > 0:
            dots = sliced_dot(q, first_row, k, first_col, TILES.BLOCK_Q, BLOCK_K, TILES.HEAD_DIM, TILES)
            # Read any later, v would be in registers together with all that multiplies it.
            v_tile = load_tile(v, first_col, BLOCK_K, TILES.HEAD_DIM_V, TILES.BLOCK_DV, BOUNDARY)
        else:
            if TMA:
                k_tile = _load_described(k, first_col, BLOCK_K, TILES.BLOCK_D)
            else:
                k_tile = load_tile(k, first_col, BLOCK_K, TILES.HEAD_DIM, TILES.BLOCK_D, BOUNDARY)
            dots = tl.dot(q_tile, tl.trans(k_tile), input_precision=TILES.PRECISION)

        scores, _ = cap_scores(dots, scoring, OPTIONS)
        scores = mask_scores(scores, first_row, first_col, row[:, None], col[None, :], scoring, OPTIONS, BOUNDARY)
        p, correction, row_max, row_sum = online_softmax(
            scores, row_max, row_sum, scoring.unit, OPTIONS.MASK, q.ptr.dtype.element_ty == tl.float32
        )
        if OPTIONS.DROPOUT:
            p = tl.where(kept(dropout, first_row + row, first_col, BLOCK_K), p, 0.0)

        if TMA:
            v_tile = _load_described(v, first_col, BLOCK_K, TILES.BLOCK_DV)
        elif TILES.SLICE == 0:
            v_tile = load_tile(v, first_col, BLOCK_K, TILES.HEAD_DIM_V, TILES.BLOCK_DV, BOUNDARY)
        acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * correction[:, None], input_precision=TILES.PRECISION)
    return acc, row_max, row_sum


@triton.jit
def _store_rows(out, lse_ptr, acc, row_max, row_sum, first_row, scoring, dropout, TILES: tl.constexpr,
                OPTIONS: tl.constexpr):  # fmt: skip
    """Writes out and lse. A row that saw nothing has sum 0 and maximum -inf: output 0, lse -inf."""
    seen_sum = tl.where(row_sum == 0.0, 1.0, row_sum)
    inverse = 1.0 / seen_sum
    if OPTIONS.DROPOUT:
        inverse *= dropout.keep_scale
    store_tile(out, acc * inverse[:, None], first_row, TILES.BLOCK_Q, TILES.HEAD_DIM_V, TILES.BLOCK_DV)
    natural = scoring.scale if OPTIONS.PLAIN else 1.0
    lse = row_max * natural + tl.log2(seen_sum) * LN_2
    rows = first_row + tl.arange(0, TILES.BLOCK_Q)
    tl.store(lse_ptr + rows, lse, mask=rows < out.length)


@triton.jit(do_not_specialize=VARYING)
def attention_fwd_kernel(
    q_ptr, stride_q_batch, stride_q_head, stride_q_row,
    k_ptr, stride_k_batch, stride_k_head, stride_k_row,
    v_ptr, stride_v_batch, stride_v_head, stride_v_row,
    out_ptr, stride_out_batch, stride_out_head, stride_out_row, lse_ptr,
    mask_ptr, stride_mask_batch, stride_mask_head, stride_mask_q, stride_mask_k,
    lists_ptr, stride_lists_batch, stride_lists_head, alibi_ptr, stride_alibi_batch, sinks_ptr,
    heads, group, seqlen_q, seqlen_k, diagonal, window_left, window_right, scale, unit, softcap,
    rng_state_ptr, threshold, keep_scale, cu_seqlens_q_ptr, cu_seqlens_k_ptr, total_q, total_k,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, SLICE: tl.constexpr, PRECISION: tl.constexpr,
    MASK: tl.constexpr, ALIBI: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr, LEFT: tl.constexpr,
    RIGHT: tl.constexpr, PLAIN: tl.constexpr, SINKS: tl.constexpr, KEY_MASK: tl.constexpr, LISTED: tl.constexpr,
    ONE_WALK: tl.constexpr, PACKED: tl.constexpr, BOTTOM_RIGHT: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Grid: (batch * heads * row tiles,). Arguments: attention_triton_plan.py; PLAIN, unit: attention_triton_scores.py;
    LISTED, lists_ptr: attention_triton_mask_tiles.py. PACKED: attention_triton_packed.py; the lengths are then those of
    the longest sequences, and ``diagonal`` is found here. TMA: k_ptr and v_ptr are descriptors of dense operands."""
    TILES: tl.constexpr = Tiles(BLOCK_Q, BLOCK_K, HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, SLICE, PRECISION)
    OPTIONS: tl.constexpr = Options(MASK, ALIBI, SOFTCAP, DROPOUT, LEFT, RIGHT, PLAIN)

    # Which rows are the program's.
    row_tiles = tl.cdiv(seqlen_q, BLOCK_Q)
    batch_head = tl.program_id(0) // row_tiles
    first_row = (row_tiles - 1 - tl.program_id(0) % row_tiles) * BLOCK_Q
    batch, head = (batch_head // heads).to(tl.int64), (batch_head % heads).to(tl.int64)
    entry_q, entry_k = batch, batch
    if PACKED:
        packed_q = Packed(cu_seqlens_q_ptr, total_q, seqlen_q)
        packed_k = Packed(cu_seqlens_k_ptr, total_k, seqlen_k)
        share = Share(batch, tl.num_programs(0) // (row_tiles * heads), tl.program_id(0) % row_tiles, row_tiles)
        lse_head_ptr = lse_ptr + head * total_q
        fill_gaps(out_ptr + head * stride_out_head, stride_out_row, 0.0, packed_q, share, BLOCK_Q, HEAD_DIM_V, BLOCK_DV)
        fill_gaps(lse_head_ptr, 1, float("-inf"), packed_q, share, BLOCK_Q, 1, 1)
        entry_q, seqlen_q = packed_sequence(packed_q, batch)
        entry_k, seqlen_k = packed_sequence(packed_k, batch)
        if first_row >= seqlen_q:
            return
        diagonal = seqlen_k - seqlen_q if BOTTOM_RIGHT else 0
        lse_ptr = lse_head_ptr + entry_q
    else:
        lse_ptr += batch_head.to(tl.int64) * seqlen_q

    # What it reads, writes and scores by.
    q = rows_of(q_ptr, entry_q, head, stride_q_batch, stride_q_head, stride_q_row, seqlen_q)
    out = rows_of(out_ptr, entry_q, head, stride_out_batch, stride_out_head, stride_out_row, seqlen_q)
    if TMA:
        k = Described(k_ptr, batch.to(tl.int32), (head // group).to(tl.int32))
        v = Described(v_ptr, batch.to(tl.int32), (head // group).to(tl.int32))
    else:
        k = rows_of(k_ptr, entry_k, head // group, stride_k_batch, stride_k_head, stride_k_row, seqlen_k)
        v = rows_of(v_ptr, entry_k, head // group, stride_v_batch, stride_v_head, stride_v_row, seqlen_k)
    if MASK != MASK_NONE:
        mask_ptr += batch * stride_mask_batch + head * stride_mask_head
    if LISTED:
        lists_ptr += batch * stride_lists_batch + head * stride_lists_head
    positions = Positions(seqlen_q, seqlen_k, diagonal, window_left, window_right)
    slope = load_slope(alibi_ptr, batch, head, stride_alibi_batch, OPTIONS)
    scoring = Scoring(positions, Mask(mask_ptr, stride_mask_q, stride_mask_k), slope, scale, unit, softcap)
    dropout = Dropout(rng_state_ptr, batch_head, threshold, keep_scale)

    # The walk over the keys, and what comes of it.
    q_tile = 0.0
    if SLICE == 0:
        q_tile = load_tile(q, first_row, BLOCK_Q, HEAD_DIM, BLOCK_D, True)
    acc, row_max, row_sum = _first_state(sinks_ptr, head, SINKS, TILES)
    walk = keys_of_rows(first_row, scoring, KEY_MASK, BLOCK_Q, BLOCK_K, OPTIONS)
    FIRST_PART: tl.constexpr = WHOLE_WALK if ONE_WALK else 0 if LEFT else 1
    LAST_PART: tl.constexpr = WHOLE_WALK if ONE_WALK else 2
    for part in tl.static_range(FIRST_PART, LAST_PART + 1):
        start, stop = walk_part(walk, part)
        list_ptr = lists_ptr
        if LISTED:
            list_ptr, start, stop = listed_tiles(lists_ptr, first_row // BLOCK_Q, seqlen_k, start, stop, BLOCK_K)
        acc, row_max, row_sum = _visit_keys(
            acc, row_max, row_sum, q_tile, q, first_row, k, v, start, stop, list_ptr, scoring, dropout,
            TILES, OPTIONS, LISTED, TMA, BOUNDARY=part != 1,
        )  # fmt: skip
    _store_rows(out, lse_ptr, acc, row_max, row_sum, first_row, scoring, dropout, TILES, OPTIONS)
