"""Attention's forward and attention weights in Triton.

    out = softmax(scores(q, k)) v,  lse = log-sum-exp of each row's scores;  weights = exp(scores - lse)

Work:    one program per (batch, head, BLOCK_Q rows); it visits the key tiles that its rows see, those that all of them
         see without comparing positions. The last rows, which see most under a causal mask, start first.
Memory:  q, the output's sums, maxima and sums of exponentials in registers; k and v tiles pipelined by the compiler.
Numbers: dot products, softmax and sums in float32; probabilities rounded to v's dtype before they multiply v.
Source:  Dao, "FlashAttention-2", arXiv:2307.08691, algorithm 1.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastattn.ops.attention_triton_packed import fill_gaps, packed_sequence
from fastattn.ops.attention_triton_scores import (
    LN_2,
    MASK_NONE,
    VARYING,
    WHOLE_WALK,
    cap_scores,
    keys_of_rows,
    listed_tiles,
    load_lse,
    load_tile,
    mask_scores,
    online_softmax,
    sliced_dot,
    store_tile,
    tile_probabilities,
    visited_position,
    walk_part,
)
from fastattn.ops.philox_triton import dropout_keep


@triton.jit
def _visit_keys(acc, row_max, row_sum, q, begin, end, list_ptr, first_row, batch, head_kv, k_ptr, v_ptr, mask_ptr,
                rng_state_ptr,
                stride_q_row, stride_k_row, stride_v_row, stride_mask_q, stride_mask_k, slope, batch_head,
                seqlen_q, seqlen_k, diagonal, window_left, window_right, scale, unit, softcap, threshold,
                HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
                BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, MASK: tl.constexpr, ALIBI: tl.constexpr,
                SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
                PLAIN: tl.constexpr, PRECISION: tl.constexpr, SLICE: tl.constexpr, LISTED: tl.constexpr,
                TMA: tl.constexpr, BOUNDARY: tl.constexpr):  # fmt: skip
    """The online softmax over the key tiles of [begin, end), or, LISTED, over those that part of a list names.

    q: the rows' tile or, if SLICE > 0, where it begins. k_ptr, v_ptr: if TMA, descriptors, which need (batch, head_kv)
    and fill in zeros past the ends.
    """
    row, col = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_K)
    # The few tiles at the edges are not worth the registers of as many addresses and comparisons as there are stages.
    CUT_DIMS: tl.constexpr = PLAIN and HEAD_DIM != BLOCK_D
    STAGES: tl.constexpr = 1 if BOUNDARY and (MASK != MASK_NONE or CUT_DIMS) else None
    for at in tl.range(begin, end, 1 if LISTED else BLOCK_K, num_stages=STAGES):
        first_col = visited_position(at, list_ptr, BLOCK_K, LISTED)
        if SLICE > 0:
            dots = sliced_dot(q, first_row, seqlen_q, stride_q_row, k_ptr, first_col, seqlen_k, stride_k_row, BLOCK_Q,
                              BLOCK_K, HEAD_DIM, SLICE, PRECISION)  # fmt: skip
            # Read any later, v would be in registers together with all that multiplies it.
            v = load_tile(v_ptr, first_col, seqlen_k, stride_v_row, BLOCK_K, HEAD_DIM_V, BLOCK_DV, BOUNDARY)
        else:
            if TMA:
                k = tl.reshape(k_ptr.load([batch, head_kv, first_col, 0]), (BLOCK_K, BLOCK_D))
            else:
                k = load_tile(k_ptr, first_col, seqlen_k, stride_k_row, BLOCK_K, HEAD_DIM, BLOCK_D, BOUNDARY)
            dots = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        scores, _ = cap_scores(dots, scale, softcap, SOFTCAP, PLAIN)
        scores = mask_scores(scores, first_row, first_col, row[:, None], col[None, :], mask_ptr, stride_mask_q,
                             stride_mask_k, slope, seqlen_q, seqlen_k, diagonal, window_left, window_right, MASK, ALIBI,
                             LEFT, RIGHT, BOUNDARY)  # fmt: skip
        p, correction, row_max, row_sum = online_softmax(scores, row_max, row_sum, unit, MASK)
        if DROPOUT:
            keep = dropout_keep(rng_state_ptr, batch_head, first_row + row, first_col, threshold, BLOCK_K)
            p = tl.where(keep, p, 0.0)

        if TMA:
            v = tl.reshape(v_ptr.load([batch, head_kv, first_col, 0]), (BLOCK_K, BLOCK_DV))
        elif SLICE == 0:
            v = load_tile(v_ptr, first_col, seqlen_k, stride_v_row, BLOCK_K, HEAD_DIM_V, BLOCK_DV, BOUNDARY)
        acc = tl.dot(p.to(v.dtype), v, acc * correction[:, None], input_precision=PRECISION)
    return acc, row_max, row_sum


@triton.jit(do_not_specialize=VARYING)
def attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, mask_ptr, lists_ptr, alibi_ptr, sinks_ptr, rng_state_ptr,
    cu_seqlens_q_ptr, cu_seqlens_k_ptr,
    stride_q_batch, stride_q_head, stride_q_row, stride_k_batch, stride_k_head, stride_k_row,
    stride_v_batch, stride_v_head, stride_v_row, stride_out_batch, stride_out_head, stride_out_row,
    stride_mask_batch, stride_mask_head, stride_mask_q, stride_mask_k, stride_lists_batch, stride_lists_head,
    stride_alibi_batch, heads, group, seqlen_q, seqlen_k, diagonal, window_left, window_right,
    scale, unit, softcap, threshold, keep_scale, total_q, total_k,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, MASK: tl.constexpr, KEY_MASK: tl.constexpr, ALIBI: tl.constexpr,
    SOFTCAP: tl.constexpr, SINKS: tl.constexpr, DROPOUT: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    PLAIN: tl.constexpr, PRECISION: tl.constexpr, SLICE: tl.constexpr, ONE_WALK: tl.constexpr, LISTED: tl.constexpr,
    PACKED: tl.constexpr, BOTTOM_RIGHT: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Grid: (batch * heads * row tiles,). Parameters: attention_triton.py; PLAIN, unit: attention_triton_scores.py;
    LISTED, lists_ptr: attention_triton_mask_tiles.py. PACKED: attention_triton_packed.py; the lengths are then those of
    the longest sequences, and ``diagonal`` is found here. TMA: k_ptr and v_ptr are descriptors of dense operands."""
    row_tiles = tl.cdiv(seqlen_q, BLOCK_Q)
    batch_head = tl.program_id(0) // row_tiles
    first_row = (row_tiles - 1 - tl.program_id(0) % row_tiles) * BLOCK_Q
    batch, head = (batch_head // heads).to(tl.int64), (batch_head % heads).to(tl.int64)
    entry_q, entry_k = batch, batch
    if PACKED:
        out_head_ptr, lse_head_ptr = out_ptr + head * stride_out_head, lse_ptr + head * total_q
        tile, batches = tl.program_id(0) % row_tiles, tl.num_programs(0) // (row_tiles * heads)
        fill_gaps(out_head_ptr, stride_out_row, 0.0, cu_seqlens_q_ptr, batch, batches, total_q, seqlen_q, tile,
                  row_tiles, BLOCK_Q, HEAD_DIM_V, BLOCK_DV)  # fmt: skip
        fill_gaps(lse_head_ptr, 1, float("-inf"), cu_seqlens_q_ptr, batch, batches, total_q, seqlen_q, tile,
                  row_tiles, BLOCK_Q, 1, 1)  # fmt: skip
        entry_q, seqlen_q = packed_sequence(cu_seqlens_q_ptr, batch, total_q, seqlen_q)
        entry_k, seqlen_k = packed_sequence(cu_seqlens_k_ptr, batch, total_k, seqlen_k)
        if first_row >= seqlen_q:
            return
        diagonal = seqlen_k - seqlen_q if BOTTOM_RIGHT else 0
        lse_ptr = lse_head_ptr + entry_q
    else:
        lse_ptr += batch_head.to(tl.int64) * seqlen_q
    q_ptr += entry_q * stride_q_batch + head * stride_q_head
    if not TMA:
        k_ptr += entry_k * stride_k_batch + head // group * stride_k_head
        v_ptr += entry_k * stride_v_batch + head // group * stride_v_head
    out_ptr += entry_q * stride_out_batch + head * stride_out_head
    slope = 0.0
    if MASK != MASK_NONE:
        mask_ptr += batch * stride_mask_batch + head * stride_mask_head
    if LISTED:
        lists_ptr += batch * stride_lists_batch + head * stride_lists_head
    if ALIBI:
        slope = tl.load(alibi_ptr + batch * stride_alibi_batch + head)

    rows = first_row + tl.arange(0, BLOCK_Q)
    if SLICE > 0:
        q = q_ptr
    else:
        q = load_tile(q_ptr, first_row, seqlen_q, stride_q_row, BLOCK_Q, HEAD_DIM, BLOCK_D, True)
    acc = tl.zeros((BLOCK_Q, BLOCK_DV), tl.float32)
    row_max = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    row_sum = tl.zeros((BLOCK_Q,), tl.float32)
    if SINKS:
        # One more logit, without a value: the pass starts as if it had seen it.
        sink = tl.load(sinks_ptr + head).to(tl.float32)
        row_max = tl.zeros((BLOCK_Q,), tl.float32) + sink
        row_sum += tl.where(sink == float("-inf"), 0.0, 1.0)

    begin, full_begin, full_end, end = keys_of_rows(first_row, seqlen_q, seqlen_k, diagonal, window_left, window_right,
                                                    mask_ptr, stride_mask_k, MASK, KEY_MASK, LEFT, RIGHT, BLOCK_Q,
                                                    BLOCK_K)  # fmt: skip
    FIRST_PART: tl.constexpr = WHOLE_WALK if ONE_WALK else 0 if LEFT else 1
    LAST_PART: tl.constexpr = WHOLE_WALK if ONE_WALK else 2
    for part in tl.static_range(FIRST_PART, LAST_PART + 1):
        start, stop = walk_part(begin, full_begin, full_end, end, part)
        list_ptr = lists_ptr
        if LISTED:
            list_ptr, start, stop = listed_tiles(lists_ptr, first_row // BLOCK_Q, seqlen_k, start, stop, BLOCK_K)
        acc, row_max, row_sum = _visit_keys(
            acc, row_max, row_sum, q, start, stop, list_ptr, first_row, batch.to(tl.int32),
            (head // group).to(tl.int32), k_ptr, v_ptr, mask_ptr, rng_state_ptr,
            stride_q_row, stride_k_row, stride_v_row, stride_mask_q, stride_mask_k, slope, batch_head,
            seqlen_q, seqlen_k, diagonal, window_left, window_right, scale, unit, softcap, threshold,
            HEAD_DIM, HEAD_DIM_V, BLOCK_Q, BLOCK_K, BLOCK_D, BLOCK_DV, MASK, ALIBI, SOFTCAP, DROPOUT, LEFT, RIGHT,
            PLAIN, PRECISION, SLICE, LISTED, TMA, BOUNDARY=part != 1,
        )  # fmt: skip

    # A row that saw nothing has sum 0 and maximum -inf: output 0, lse -inf.
    seen_sum = tl.where(row_sum == 0.0, 1.0, row_sum)
    inverse = 1.0 / seen_sum
    if DROPOUT:
        inverse *= keep_scale
    store_tile(out_ptr, acc * inverse[:, None], first_row, seqlen_q, stride_out_row, BLOCK_Q, HEAD_DIM_V, BLOCK_DV)
    natural = scale if PLAIN else 1.0
    lse = row_max * natural + tl.log2(seen_sum) * LN_2
    tl.store(lse_ptr + rows, lse, mask=rows < seqlen_q)


@triton.jit(do_not_specialize=VARYING)
def attention_weights_kernel(
    q_ptr, k_ptr, lse_ptr, weights_ptr, mask_ptr, alibi_ptr, rng_state_ptr,
    stride_q_batch, stride_q_head, stride_q_row, stride_k_batch, stride_k_head, stride_k_row,
    stride_mask_batch, stride_mask_head, stride_mask_q, stride_mask_k, stride_alibi_batch,
    heads, group, seqlen_q, seqlen_k, diagonal, window_left, window_right,
    scale, unit, softcap, threshold, keep_scale,
    HEAD_DIM: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, MASK: tl.constexpr, ALIBI: tl.constexpr,
    SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    PLAIN: tl.constexpr, PRECISION: tl.constexpr, SLICE: tl.constexpr, AVERAGE: tl.constexpr,
):  # fmt: skip
    """Grid: (batch * heads * row tiles * key tiles,); with AVERAGE, whose programs add up the heads, without heads."""
    key_tiles, row_tiles = tl.cdiv(seqlen_k, BLOCK_K), tl.cdiv(seqlen_q, BLOCK_Q)
    first_col = tl.program_id(0) % key_tiles * BLOCK_K
    first_row = tl.program_id(0) // key_tiles % row_tiles * BLOCK_Q
    matrix = tl.program_id(0) // (key_tiles * row_tiles)
    row, col = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_K)
    rows, cols = first_row + row, first_col + col
    if AVERAGE:
        batch, first_head, last_head = matrix, 0, heads
    else:
        batch, first_head = matrix // heads, matrix % heads
        last_head = first_head + 1

    total = tl.zeros((BLOCK_Q, BLOCK_K), tl.float32)
    for head in range(first_head, last_head):
        head = tl.cast(head, tl.int32)
        batch64, head64, batch_head = batch.to(tl.int64), head.to(tl.int64), batch * heads + head
        dots = sliced_dot(q_ptr + batch64 * stride_q_batch + head64 * stride_q_head, first_row, seqlen_q, stride_q_row,
                          k_ptr + batch64 * stride_k_batch + head64 // group * stride_k_head, first_col, seqlen_k,
                          stride_k_row, BLOCK_Q, BLOCK_K, HEAD_DIM, SLICE, PRECISION)  # fmt: skip
        slope = 0.0
        mask_head_ptr = mask_ptr
        if MASK != MASK_NONE:
            mask_head_ptr = mask_ptr + batch64 * stride_mask_batch + head64 * stride_mask_head
        if ALIBI:
            slope = tl.load(alibi_ptr + batch64 * stride_alibi_batch + head64)
        lse = load_lse(lse_ptr + batch_head.to(tl.int64) * seqlen_q, rows, seqlen_q)
        weights, _ = tile_probabilities(
            dots, lse[:, None], first_row, first_col, row[:, None], col[None, :], mask_head_ptr, stride_mask_q,
            stride_mask_k, slope, seqlen_q, seqlen_k, diagonal, window_left, window_right, scale, unit, softcap, MASK,
            ALIBI, SOFTCAP, LEFT, RIGHT, PLAIN, True,
        )  # fmt: skip
        if DROPOUT:
            keep = dropout_keep(rng_state_ptr, batch_head, rows, first_col, threshold, BLOCK_K)
            weights = tl.where(keep, weights * keep_scale, 0.0)
        total += weights
    if AVERAGE:
        total = total / heads
    ptrs = weights_ptr + (matrix.to(tl.int64) * seqlen_q + rows[:, None]) * seqlen_k + cols[None, :]
    inside = (rows < seqlen_q)[:, None] & (cols < seqlen_k)[None, :]
    tl.store(ptrs, total.to(weights_ptr.dtype.element_ty), mask=inside)
