"""Attention's backward in Triton: dk and dv, and dq. No atomics: the bits are the same at every run.

    p = exp(s - lse)    dp = keep (dout v^T)    ds = p (dp - delta)    delta = rowsum(dout out) - dlse
    dv = (keep p)^T dout    dq = scale ds k    dk = scale ds^T q

Work:    dq: one program per (batch, head, BLOCK_Q rows), which visits the keys that its rows see. dk, dv: one per
         (batch, kv head, BLOCK_K keys), which visits the rows that see them, for each query head of the group in turn.
         The scores are computed in both: seven products instead of five buy sums of one fixed order, in registers.
Memory:  the program's own tiles and its sums stay on chip; the visited tiles are pipelined by the compiler.
Numbers: as the forward; p and ds are rounded to the operands' dtype before they multiply them.
Source:  Dao, "FlashAttention-2", arXiv:2307.08691, algorithm 2.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastattn.ops.attention_triton_packed import fill_gaps, packed_sequence, statistics_row
from fastattn.ops.attention_triton_scores import (
    MASK_NONE,
    VARYING,
    WHOLE_WALK,
    keys_of_rows,
    listed_tiles,
    load_tile,
    mask_hides,
    sliced_dot,
    store_tile,
    tile_probabilities,
    tile_range,
    visited_position,
    walk_part,
)
from fastattn.ops.philox_triton import dropout_keep

# --- dq --------------------------------------------------------------------------------------------------------------


@triton.jit
def before_softcap(ds, ratio, SOFTCAP: tl.constexpr):
    """dL/d(q k^T) but for the scale, from the gradient of the scores; ``ratio`` is what tanh gave the softcap."""
    if SOFTCAP:
        ds *= 1.0 - ratio * ratio
    return ds


@triton.jit
def _dq_of_keys(dq, row_sums, q, dout, lse, delta, begin, end, list_ptr, first_row, k_ptr, v_ptr, mask_ptr,
                rng_state_ptr,
                stride_q_row, stride_k_row, stride_v_row, stride_dout_row, stride_mask_q, stride_mask_k, slope,
                batch_head, seqlen_q, seqlen_k, diagonal, window_left, window_right, scale, unit, softcap, threshold,
                keep_scale,
                HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
                BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, MASK: tl.constexpr, ALIBI: tl.constexpr,
                SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
                PLAIN: tl.constexpr, PRECISION: tl.constexpr, SLICE: tl.constexpr, LISTED: tl.constexpr,
                ROW_SUMS: tl.constexpr, BOUNDARY: tl.constexpr):  # fmt: skip
    """dq, not scaled, and with ROW_SUMS the sums of the rows of ds, plus what the key tiles of [begin, end) add, or,
    LISTED, those that part of a list names.

    q, dout: the rows' tiles or, if SLICE > 0, where they begin.
    """
    row, col = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_K)
    # The tiles at the edges read the mask without vectors: pipelining it would cost the registers of as many addresses.
    STAGES: tl.constexpr = 1 if MASK != MASK_NONE and BOUNDARY else None
    for at in tl.range(begin, end, 1 if LISTED else BLOCK_K, num_stages=STAGES):
        first_col = visited_position(at, list_ptr, BLOCK_K, LISTED)
        if SLICE > 0:
            dots = sliced_dot(q, first_row, seqlen_q, stride_q_row, k_ptr, first_col, seqlen_k, stride_k_row,
                              BLOCK_Q, BLOCK_K, HEAD_DIM, SLICE, PRECISION)  # fmt: skip
            dp = sliced_dot(dout, first_row, seqlen_q, stride_dout_row, v_ptr, first_col, seqlen_k, stride_v_row,
                            BLOCK_Q, BLOCK_K, HEAD_DIM_V, SLICE, PRECISION)  # fmt: skip
            k = load_tile(k_ptr, first_col, seqlen_k, stride_k_row, BLOCK_K, HEAD_DIM, BLOCK_D, BOUNDARY)
        else:
            k = load_tile(k_ptr, first_col, seqlen_k, stride_k_row, BLOCK_K, HEAD_DIM, BLOCK_D, BOUNDARY)
            dots = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            v = load_tile(v_ptr, first_col, seqlen_k, stride_v_row, BLOCK_K, HEAD_DIM_V, BLOCK_DV, BOUNDARY)
            dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
        p, ratio = tile_probabilities(
            dots, lse[:, None], first_row, first_col, row[:, None], col[None, :], mask_ptr, stride_mask_q,
            stride_mask_k, slope, seqlen_q, seqlen_k, diagonal, window_left, window_right, scale, unit, softcap,
            MASK, ALIBI, SOFTCAP, LEFT, RIGHT, PLAIN, BOUNDARY,
        )  # fmt: skip
        if DROPOUT:
            keep = dropout_keep(rng_state_ptr, batch_head, first_row + row, first_col, threshold, BLOCK_K)
            dp = tl.where(keep, dp * keep_scale, 0.0)
        ds = p * (dp - delta[:, None])
        if ROW_SUMS:
            row_sums += tl.sum(ds, 1)
        dq = tl.dot(before_softcap(ds, ratio, SOFTCAP).to(k.dtype), k, dq, input_precision=PRECISION)
    return dq, row_sums


@triton.jit(do_not_specialize=VARYING)
def attention_dq_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, row_lse_ptr, delta_ptr, row_sums_ptr, dq_ptr, mask_ptr, lists_ptr, alibi_ptr,
    rng_state_ptr, cu_seqlens_q_ptr, cu_seqlens_k_ptr,
    stride_q_batch, stride_q_head, stride_q_row, stride_k_batch, stride_k_head, stride_k_row,
    stride_v_batch, stride_v_head, stride_v_row, stride_dout_batch, stride_dout_head, stride_dout_row,
    stride_dq_batch, stride_dq_head, stride_dq_row,
    stride_mask_batch, stride_mask_head, stride_mask_q, stride_mask_k, stride_lists_batch, stride_lists_head,
    stride_alibi_batch, heads, group, seqlen_q, seqlen_k, padded_rows, diagonal, window_left, window_right,
    scale, unit, softcap, threshold, keep_scale, total_q, total_k,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, MASK: tl.constexpr, KEY_MASK: tl.constexpr, ALIBI: tl.constexpr,
    SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    PLAIN: tl.constexpr, PRECISION: tl.constexpr, SLICE: tl.constexpr, ONE_WALK: tl.constexpr, LISTED: tl.constexpr,
    PACKED: tl.constexpr, BOTTOM_RIGHT: tl.constexpr, ROW_SUMS: tl.constexpr,
):  # fmt: skip
    """With ROW_SUMS also the sums of the rows of ds (before softcap), for attention_rows_kernel.

    Grid: (batch * heads * row tiles,), the last rows first.
    """
    row_tiles = tl.cdiv(seqlen_q, BLOCK_Q)
    batch_head = tl.program_id(0) // row_tiles
    first_row = (row_tiles - 1 - tl.program_id(0) % row_tiles) * BLOCK_Q
    batch, head = (batch_head // heads).to(tl.int64), (batch_head % heads).to(tl.int64)
    entry_q, entry_k = batch, batch
    if PACKED:
        fill_gaps(dq_ptr + head * stride_dq_head, stride_dq_row, 0.0, cu_seqlens_q_ptr, batch,
                  tl.num_programs(0) // (row_tiles * heads), total_q, seqlen_q, tl.program_id(0) % row_tiles, row_tiles,
                  BLOCK_Q, HEAD_DIM, BLOCK_D)  # fmt: skip
        entry_q, seqlen_q = packed_sequence(cu_seqlens_q_ptr, batch, total_q, seqlen_q)
        entry_k, seqlen_k = packed_sequence(cu_seqlens_k_ptr, batch, total_k, seqlen_k)
        if first_row >= seqlen_q:
            return
        diagonal = seqlen_k - seqlen_q if BOTTOM_RIGHT else 0
    q_ptr += entry_q * stride_q_batch + head * stride_q_head
    dout_ptr += entry_q * stride_dout_batch + head * stride_dout_head
    k_ptr += entry_k * stride_k_batch + head // group * stride_k_head
    v_ptr += entry_k * stride_v_batch + head // group * stride_v_head
    slope = 0.0
    if MASK != MASK_NONE:
        mask_ptr += batch * stride_mask_batch + head * stride_mask_head
    if LISTED:
        lists_ptr += batch * stride_lists_batch + head * stride_lists_head
    if ALIBI:
        slope = tl.load(alibi_ptr + batch * stride_alibi_batch + head)

    rows = first_row + tl.arange(0, BLOCK_Q)
    q, dout = q_ptr, dout_ptr
    if SLICE == 0:
        q = load_tile(q_ptr, first_row, seqlen_q, stride_q_row, BLOCK_Q, HEAD_DIM, BLOCK_D, True)
        dout = load_tile(dout_ptr, first_row, seqlen_q, stride_dout_row, BLOCK_Q, HEAD_DIM_V, BLOCK_DV, True)
    statistics = batch_head.to(tl.int64) * padded_rows
    if PACKED:
        statistics = head * padded_rows + statistics_row(entry_q, batch)
    lse = tl.load(row_lse_ptr + statistics + rows)
    delta = tl.load(delta_ptr + statistics + rows)
    dq = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    row_sums = tl.zeros((BLOCK_Q,), tl.float32)

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
        dq, row_sums = _dq_of_keys(
            dq, row_sums, q, dout, lse, delta, start, stop, list_ptr, first_row, k_ptr, v_ptr, mask_ptr, rng_state_ptr,
            stride_q_row, stride_k_row, stride_v_row, stride_dout_row, stride_mask_q, stride_mask_k, slope, batch_head,
            seqlen_q, seqlen_k, diagonal, window_left, window_right, scale, unit, softcap, threshold, keep_scale,
            HEAD_DIM, HEAD_DIM_V, BLOCK_Q, BLOCK_K, BLOCK_D, BLOCK_DV, MASK, ALIBI, SOFTCAP, DROPOUT, LEFT, RIGHT,
            PLAIN, PRECISION, SLICE, LISTED, ROW_SUMS, BOUNDARY=part != 1,
        )  # fmt: skip
    if ROW_SUMS:
        tl.store(row_sums_ptr + statistics + rows, row_sums)
    store_tile(dq_ptr + entry_q * stride_dq_batch + head * stride_dq_head, dq * scale, first_row, seqlen_q,
               stride_dq_row, BLOCK_Q, HEAD_DIM, BLOCK_D)  # fmt: skip


# --- dk and dv -------------------------------------------------------------------------------------------------------


@triton.jit
def _dkdv_of_rows(dk, dv, k, v, begin, end, list_ptr, first_col, q_ptr, dout_ptr, row_lse_ptr, delta_ptr, mask_ptr,
                  rng_state_ptr,
                  stride_q_row, stride_k_row, stride_v_row, stride_dout_row, stride_mask_q, stride_mask_k, slope,
                  batch_head, seqlen_q, seqlen_k, diagonal, window_left, window_right, scale, unit, softcap, threshold,
                  keep_scale,
                  HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
                  BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, MASK: tl.constexpr, ALIBI: tl.constexpr,
                  SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
                  PLAIN: tl.constexpr, PRECISION: tl.constexpr, SLICE: tl.constexpr, LISTED: tl.constexpr,
                  DK: tl.constexpr, DV: tl.constexpr, BOUNDARY: tl.constexpr):  # fmt: skip
    """dk, not scaled, and dv plus what the row tiles of [begin, end) of one query head add, or, LISTED, those that part
    of a list names.

    k, v: the keys' tiles or, if SLICE > 0, where they begin. Tiles are (BLOCK_K, BLOCK_Q), so that p^T and ds^T come
    out as left operands of the products that need them.
    """
    row, col = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_K)
    STAGES: tl.constexpr = 1 if MASK != MASK_NONE and BOUNDARY else None
    for at in tl.range(begin, end, 1 if LISTED else BLOCK_Q, num_stages=STAGES):
        first_row = visited_position(at, list_ptr, BLOCK_Q, LISTED)
        rows = first_row + row
        if SLICE > 0:
            dots = sliced_dot(k, first_col, seqlen_k, stride_k_row, q_ptr, first_row, seqlen_q, stride_q_row, BLOCK_K,
                              BLOCK_Q, HEAD_DIM, SLICE, PRECISION)  # fmt: skip
            # Read any later, q and dout would be in registers together with all that multiplies them.
            if DK:
                dp = sliced_dot(v, first_col, seqlen_k, stride_v_row, dout_ptr, first_row, seqlen_q, stride_dout_row,
                                BLOCK_K, BLOCK_Q, HEAD_DIM_V, SLICE, PRECISION)  # fmt: skip
                q = load_tile(q_ptr, first_row, seqlen_q, stride_q_row, BLOCK_Q, HEAD_DIM, BLOCK_D, True)
            if DV:
                dout = load_tile(dout_ptr, first_row, seqlen_q, stride_dout_row, BLOCK_Q, HEAD_DIM_V, BLOCK_DV, True)
        else:
            q = load_tile(q_ptr, first_row, seqlen_q, stride_q_row, BLOCK_Q, HEAD_DIM, BLOCK_D, True)
            dots = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        lse = tl.load(row_lse_ptr + rows)
        p, ratio = tile_probabilities(
            dots, lse[None, :], first_row, first_col, row[None, :], col[:, None], mask_ptr, stride_mask_q,
            stride_mask_k, slope, seqlen_q, seqlen_k, diagonal, window_left, window_right, scale, unit, softcap,
            MASK, ALIBI, SOFTCAP, LEFT, RIGHT, PLAIN, BOUNDARY,
        )  # fmt: skip
        if DROPOUT:
            keep = tl.trans(dropout_keep(rng_state_ptr, batch_head, rows, first_col, threshold, BLOCK_K))
        if SLICE == 0:
            dout = load_tile(dout_ptr, first_row, seqlen_q, stride_dout_row, BLOCK_Q, HEAD_DIM_V, BLOCK_DV, True)
        if DV:
            kept = p
            if DROPOUT:
                kept = tl.where(keep, p * keep_scale, 0.0)
            dv = tl.dot(kept.to(dout.dtype), dout, dv, input_precision=PRECISION)
        if DK:
            if SLICE == 0:
                dp = tl.dot(v, tl.trans(dout), input_precision=PRECISION)
            if DROPOUT:
                dp = tl.where(keep, dp * keep_scale, 0.0)
            delta = tl.load(delta_ptr + rows)
            ds = before_softcap(p * (dp - delta[None, :]), ratio, SOFTCAP)
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=VARYING)
def attention_dkdv_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, row_lse_ptr, delta_ptr, dk_ptr, dv_ptr, mask_ptr, lists_ptr, alibi_ptr,
    rng_state_ptr, cu_seqlens_q_ptr, cu_seqlens_k_ptr,
    stride_q_batch, stride_q_head, stride_q_row, stride_k_batch, stride_k_head, stride_k_row,
    stride_v_batch, stride_v_head, stride_v_row, stride_dout_batch, stride_dout_head, stride_dout_row,
    stride_dk_batch, stride_dk_head, stride_dk_row, stride_dv_batch, stride_dv_head, stride_dv_row,
    stride_mask_batch, stride_mask_head, stride_mask_q, stride_mask_k, stride_lists_batch, stride_lists_head,
    stride_alibi_batch, heads, group, seqlen_q, seqlen_k, padded_rows, diagonal, window_left, window_right,
    scale, unit, softcap, threshold, keep_scale, total_q, total_k,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, MASK: tl.constexpr, KEY_MASK: tl.constexpr, ALIBI: tl.constexpr,
    SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    PLAIN: tl.constexpr, PRECISION: tl.constexpr, SLICE: tl.constexpr, ONE_WALK: tl.constexpr, LISTED: tl.constexpr,
    PACKED: tl.constexpr, BOTTOM_RIGHT: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
):  # fmt: skip
    """Writes dk if DK, dv if DV: where the sums of both do not fit the registers, two launches share the work.

    Grid: (batch * kv heads * key tiles,), the first keys, which causal masks leave to most rows, first.
    """
    key_tiles = tl.cdiv(seqlen_k, BLOCK_K)
    batch_head_kv = tl.program_id(0) // key_tiles
    first_col = tl.program_id(0) % key_tiles * BLOCK_K
    heads_kv = heads // group
    batch, head_kv = (batch_head_kv // heads_kv).to(tl.int64), (batch_head_kv % heads_kv).to(tl.int64)
    cols = first_col + tl.arange(0, BLOCK_K)
    entry_k = batch
    if PACKED:
        tile, batches = tl.program_id(0) % key_tiles, tl.num_programs(0) // (key_tiles * heads_kv)
        if DK:
            fill_gaps(dk_ptr + head_kv * stride_dk_head, stride_dk_row, 0.0, cu_seqlens_k_ptr, batch, batches, total_k,
                      seqlen_k, tile, key_tiles, BLOCK_K, HEAD_DIM, BLOCK_D)  # fmt: skip
        if DV:
            fill_gaps(dv_ptr + head_kv * stride_dv_head, stride_dv_row, 0.0, cu_seqlens_k_ptr, batch, batches, total_k,
                      seqlen_k, tile, key_tiles, BLOCK_K, HEAD_DIM_V, BLOCK_DV)  # fmt: skip
        entry_q, seqlen_q = packed_sequence(cu_seqlens_q_ptr, batch, total_q, seqlen_q)
        entry_k, seqlen_k = packed_sequence(cu_seqlens_k_ptr, batch, total_k, seqlen_k)
        if first_col >= seqlen_k:
            return
        diagonal = seqlen_k - seqlen_q if BOTTOM_RIGHT else 0
        # Once, not for each head: the loop over heads would hold the offsets in registers.
        q_ptr += entry_q * stride_q_batch
        dout_ptr += entry_q * stride_dout_batch
        row_lse_ptr += statistics_row(entry_q, batch)
        delta_ptr += statistics_row(entry_q, batch)
    k_ptr += entry_k * stride_k_batch + head_kv * stride_k_head
    v_ptr += entry_k * stride_v_batch + head_kv * stride_v_head
    k, v = k_ptr, v_ptr
    if SLICE == 0:
        k = load_tile(k_ptr, first_col, seqlen_k, stride_k_row, BLOCK_K, HEAD_DIM, BLOCK_D, True)
        if DK:
            v = load_tile(v_ptr, first_col, seqlen_k, stride_v_row, BLOCK_K, HEAD_DIM_V, BLOCK_DV, True)
    dk, dv = 0.0, 0.0
    if DK:
        dk = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    if DV:
        dv = tl.zeros((BLOCK_K, BLOCK_DV), tl.float32)

    last_col = tl.minimum(first_col + BLOCK_K, seqlen_k)
    is_full = (MASK == MASK_NONE) | (last_col == first_col + BLOCK_K)
    begin, full_begin, full_end, end = tile_range(
        first_col, last_col, seqlen_q, -diagonal, window_right, window_left, is_full, RIGHT, LEFT, BLOCK_Q
    )
    # Rows past the end have lse +inf: without a mask, which ends where they do, they need no comparison.
    CUT_AT_END: tl.constexpr = LEFT or MASK != MASK_NONE
    if not CUT_AT_END:
        full_end = end
    FIRST_PART: tl.constexpr = WHOLE_WALK if ONE_WALK else 0 if RIGHT else 1
    LAST_PART: tl.constexpr = WHOLE_WALK if ONE_WALK else 2 if CUT_AT_END else 1
    for member in range(0, group):
        head = head_kv * group + member
        batch_head = batch * heads + head
        if PACKED:
            q_head_ptr = q_ptr + head * stride_q_head
            dout_head_ptr = dout_ptr + head * stride_dout_head
            row_lse_head_ptr = row_lse_ptr + head * padded_rows
            delta_head_ptr = delta_ptr + head * padded_rows
        else:
            q_head_ptr = q_ptr + batch * stride_q_batch + head * stride_q_head
            dout_head_ptr = dout_ptr + batch * stride_dout_batch + head * stride_dout_head
            row_lse_head_ptr = row_lse_ptr + batch_head * padded_rows
            delta_head_ptr = delta_ptr + batch_head * padded_rows
        mask_head_ptr = mask_ptr
        slope = 0.0
        if MASK != MASK_NONE:
            mask_head_ptr = mask_ptr + batch * stride_mask_batch + head * stride_mask_head
        if ALIBI:
            slope = tl.load(alibi_ptr + batch * stride_alibi_batch + head)
        # No row sees keys that a mask of one row hides altogether.
        sees = True
        if KEY_MASK:
            mask = tl.load(mask_head_ptr + cols.to(tl.int64) * stride_mask_k, mask=cols < seqlen_k, other=0)
            sees = tl.max(((cols < seqlen_k) & ~mask_hides(mask, MASK)).to(tl.int32)) > 0

        for part in tl.static_range(FIRST_PART, LAST_PART + 1):
            start, stop = walk_part(begin, full_begin, full_end, end, part)
            if KEY_MASK:
                stop = tl.where(sees, stop, start)
            list_ptr = lists_ptr
            if LISTED:
                list_ptr, start, stop = listed_tiles(
                    lists_ptr + batch * stride_lists_batch + head * stride_lists_head, first_col // BLOCK_K, seqlen_q,
                    start, stop, BLOCK_Q,
                )  # fmt: skip
            dk, dv = _dkdv_of_rows(
                dk, dv, k, v, start, stop, list_ptr, first_col, q_head_ptr, dout_head_ptr, row_lse_head_ptr,
                delta_head_ptr, mask_head_ptr, rng_state_ptr,
                stride_q_row, stride_k_row, stride_v_row, stride_dout_row, stride_mask_q, stride_mask_k, slope,
                batch_head, seqlen_q, seqlen_k, diagonal, window_left, window_right, scale, unit, softcap, threshold,
                keep_scale, HEAD_DIM, HEAD_DIM_V, BLOCK_Q, BLOCK_K, BLOCK_D, BLOCK_DV, MASK, ALIBI, SOFTCAP, DROPOUT,
                LEFT, RIGHT, PLAIN, PRECISION, SLICE, LISTED, DK, DV, BOUNDARY=part != 1,
            )  # fmt: skip
    if DK:
        store_tile(dk_ptr + entry_k * stride_dk_batch + head_kv * stride_dk_head, dk * scale, first_col, seqlen_k,
                   stride_dk_row, BLOCK_K, HEAD_DIM, BLOCK_D)  # fmt: skip
    if DV:
        store_tile(dv_ptr + entry_k * stride_dv_batch + head_kv * stride_dv_head, dv, first_col, seqlen_k,
                   stride_dv_row, BLOCK_K, HEAD_DIM_V, BLOCK_DV)  # fmt: skip
