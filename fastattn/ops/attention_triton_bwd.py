"""Attention's backward in Triton: dk and dv, and dq. No atomics: the bits are the same at every run.

    p = exp(s - lse)    dp = keep (dout v^T)    ds = p (dp - delta)    delta = rowsum(dout out) - dlse
    dv = (keep p)^T dout    dq = scale ds k    dk = scale ds^T q

Work:    dq: one program per (batch, head, BLOCK_Q rows), which visits the keys that its rows see. dk, dv: one per
         (batch, kv head, BLOCK_K keys), which visits the rows that see them, for each query head of the group in turn.
         The scores are computed in both: seven products instead of five buy sums of one fixed order, in registers.
Memory:  the program's own tiles and its sums stay on chip; the visited tiles are pipelined by the compiler.
Numbers: as the forward; p and ds are rounded to the operands' dtype before they multiply them. EXACT, of float32 with
         few keys: p is divided by its own sum, and dlse stays apart from delta (attention_triton_exact_rows.py).
Source:  Dao, "FlashAttention-2", arXiv:2307.08691, algorithm 2.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from fastattn.ops.attention_triton_operands import Rows, Tiles, load_tile, rows_of, sliced_dot, store_tile
from fastattn.ops.attention_triton_packed import Packed, Share, fill_gaps, packed_sequence, statistics_row
from fastattn.ops.attention_triton_scores import (
    MASK_NONE,
    VARYING,
    WHOLE_WALK,
    Dropout,
    Mask,
    Options,
    Positions,
    Scoring,
    Walk,
    kept,
    keys_of_rows,
    listed_tiles,
    load_slope,
    mask_hides,
    tile_probabilities,
    tile_range,
    transposed,
    visited_position,
    walk_part,
)


@triton.jit
def _before_softcap(ds, ratio, OPTIONS: tl.constexpr):
    """dL/d(q k^T) but for the scale, from the gradient of the scores; ``ratio`` is what tanh gave the softcap."""
    if OPTIONS.SOFTCAP:
        ds *= 1.0 - ratio * ratio
    return ds


# --- dq --------------------------------------------------------------------------------------------------------------


class Queries(NamedTuple):
    """A program's rows: their tiles or, where SLICE > 0, what these are read from again, and their statistics."""

    first_row: tl.tensor
    q_tile: tl.tensor
    dout_tile: tl.tensor
    q: Rows
    dout: Rows
    lse: tl.tensor
    delta: tl.tensor
    inverse: tl.tensor
    dlse: tl.tensor


@triton.jit
def _dq_of_keys(dq, row_sums, queries, k, v, start, stop, list_ptr, scoring, dropout, TILES: tl.constexpr,
                OPTIONS: tl.constexpr, LISTED: tl.constexpr, ROW_SUMS: tl.constexpr, EXACT: tl.constexpr,
                BOUNDARY: tl.constexpr):  # fmt: skip
    """dq, not scaled, and with ROW_SUMS the sums of the rows of ds, plus what the key tiles of [start, stop) add, or,
    LISTED, those that part of a list names."""
    BLOCK_Q: tl.constexpr = TILES.BLOCK_Q
    BLOCK_K: tl.constexpr = TILES.BLOCK_K
    first_row = queries.first_row
    row, col = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_K)
    # The tiles at the edges read the mask without vectors: pipelining it would cost the registers of as many addresses.
    STAGES: tl.constexpr = 1 if OPTIONS.MASK != MASK_NONE and BOUNDARY else None
    for at in tl.range(start, stop, 1 if LISTED else BLOCK_K, num_stages=STAGES):
        first_col = visited_position(at, list_ptr, BLOCK_K, LISTED)
        if TILES.SLICE > 0:
            dots = sliced_dot(queries.q, first_row, k, first_col, BLOCK_Q, BLOCK_K, TILES.HEAD_DIM, TILES)
            dp = sliced_dot(queries.dout, first_row, v, first_col, BLOCK_Q, BLOCK_K, TILES.HEAD_DIM_V, TILES)
            k_tile = load_tile(k, first_col, BLOCK_K, TILES.HEAD_DIM, TILES.BLOCK_D, BOUNDARY)
        else:
            k_tile = load_tile(k, first_col, BLOCK_K, TILES.HEAD_DIM, TILES.BLOCK_D, BOUNDARY)
            dots = tl.dot(queries.q_tile, tl.trans(k_tile), input_precision=TILES.PRECISION)
            v_tile = load_tile(v, first_col, BLOCK_K, TILES.HEAD_DIM_V, TILES.BLOCK_DV, BOUNDARY)
            dp = tl.dot(queries.dout_tile, tl.trans(v_tile), input_precision=TILES.PRECISION)

        p, ratio = tile_probabilities(
            dots, queries.lse[:, None], first_row, first_col, row[:, None], col[None, :], scoring, OPTIONS, BOUNDARY
        )
        if OPTIONS.DROPOUT:
            keep = kept(dropout, first_row + row, first_col, BLOCK_K)
            dp = tl.where(keep, dp * dropout.keep_scale, 0.0)
        if EXACT:
            ds = p * queries.inverse[:, None] * ((dp - queries.delta[:, None]) + queries.dlse[:, None])
        else:
            ds = p * (dp - queries.delta[:, None])
        if ROW_SUMS:
            row_sums += tl.sum(ds, 1)
        ds = _before_softcap(ds, ratio, OPTIONS)
        dq = tl.dot(ds.to(k_tile.dtype), k_tile, dq, input_precision=TILES.PRECISION)
    return dq, row_sums


@triton.jit(do_not_specialize=VARYING)
def attention_dq_kernel(
    q_ptr, stride_q_batch, stride_q_head, stride_q_row,
    k_ptr, stride_k_batch, stride_k_head, stride_k_row,
    v_ptr, stride_v_batch, stride_v_head, stride_v_row,
    dout_ptr, stride_dout_batch, stride_dout_head, stride_dout_row,
    dq_ptr, stride_dq_batch, stride_dq_head, stride_dq_row,
    row_lse_ptr, delta_ptr, row_inverse_ptr, row_dlse_ptr, row_sums_ptr, padded_rows,
    mask_ptr, stride_mask_batch, stride_mask_head, stride_mask_q, stride_mask_k,
    lists_ptr, stride_lists_batch, stride_lists_head, alibi_ptr, stride_alibi_batch,
    heads, group, seqlen_q, seqlen_k, diagonal, window_left, window_right, scale, unit, softcap,
    rng_state_ptr, threshold, keep_scale, cu_seqlens_q_ptr, cu_seqlens_k_ptr, total_q, total_k,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, SLICE: tl.constexpr, PRECISION: tl.constexpr,
    MASK: tl.constexpr, ALIBI: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr, LEFT: tl.constexpr,
    RIGHT: tl.constexpr, PLAIN: tl.constexpr, KEY_MASK: tl.constexpr, LISTED: tl.constexpr, ONE_WALK: tl.constexpr,
    PACKED: tl.constexpr, BOTTOM_RIGHT: tl.constexpr, ROW_SUMS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """With ROW_SUMS also the sums of the rows of ds (before softcap), for attention_rows_kernel.

    Grid: (batch * heads * row tiles,), the last rows first.
    """
    TILES: tl.constexpr = Tiles(BLOCK_Q, BLOCK_K, HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, SLICE, PRECISION)
    OPTIONS: tl.constexpr = Options(MASK, ALIBI, SOFTCAP, DROPOUT, LEFT, RIGHT, PLAIN)

    # Which rows are the program's.
    row_tiles = tl.cdiv(seqlen_q, BLOCK_Q)
    batch_head = tl.program_id(0) // row_tiles
    first_row = (row_tiles - 1 - tl.program_id(0) % row_tiles) * BLOCK_Q
    batch, head = (batch_head // heads).to(tl.int64), (batch_head % heads).to(tl.int64)
    entry_q, entry_k = batch, batch
    statistics = batch_head.to(tl.int64) * padded_rows
    if PACKED:
        packed_q = Packed(cu_seqlens_q_ptr, total_q, seqlen_q)
        packed_k = Packed(cu_seqlens_k_ptr, total_k, seqlen_k)
        share = Share(batch, tl.num_programs(0) // (row_tiles * heads), tl.program_id(0) % row_tiles, row_tiles)
        fill_gaps(dq_ptr + head * stride_dq_head, stride_dq_row, 0.0, packed_q, share, BLOCK_Q, HEAD_DIM, BLOCK_D)
        entry_q, seqlen_q = packed_sequence(packed_q, batch)
        entry_k, seqlen_k = packed_sequence(packed_k, batch)
        if first_row >= seqlen_q:
            return
        diagonal = seqlen_k - seqlen_q if BOTTOM_RIGHT else 0
        statistics = head * padded_rows + statistics_row(entry_q, batch)

    # What it reads, writes and scores by.
    q = rows_of(q_ptr, entry_q, head, stride_q_batch, stride_q_head, stride_q_row, seqlen_q)
    dout = rows_of(dout_ptr, entry_q, head, stride_dout_batch, stride_dout_head, stride_dout_row, seqlen_q)
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
    statistics += first_row + tl.arange(0, BLOCK_Q)
    q_tile, dout_tile = 0.0, 0.0
    if SLICE == 0:
        q_tile = load_tile(q, first_row, BLOCK_Q, HEAD_DIM, BLOCK_D, True)
        dout_tile = load_tile(dout, first_row, BLOCK_Q, HEAD_DIM_V, BLOCK_DV, True)
    lse, delta = tl.load(row_lse_ptr + statistics), tl.load(delta_ptr + statistics)
    inverse, dlse = 1.0, 0.0
    if EXACT:
        inverse, dlse = tl.load(row_inverse_ptr + statistics), tl.load(row_dlse_ptr + statistics)
    queries = Queries(first_row, q_tile, dout_tile, q, dout, lse, delta, inverse, dlse)

    # The walk over the keys, and what comes of it.
    dq = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    row_sums = tl.zeros((BLOCK_Q,), tl.float32)
    walk = keys_of_rows(first_row, scoring, KEY_MASK, BLOCK_Q, BLOCK_K, OPTIONS)
    FIRST_PART: tl.constexpr = WHOLE_WALK if ONE_WALK else 0 if LEFT else 1
    LAST_PART: tl.constexpr = WHOLE_WALK if ONE_WALK else 2
    for part in tl.static_range(FIRST_PART, LAST_PART + 1):
        start, stop = walk_part(walk, part)
        list_ptr = lists_ptr
        if LISTED:
            list_ptr, start, stop = listed_tiles(lists_ptr, first_row // BLOCK_Q, seqlen_k, start, stop, BLOCK_K)
        dq, row_sums = _dq_of_keys(
            dq, row_sums, queries, k, v, start, stop, list_ptr, scoring, dropout, TILES, OPTIONS, LISTED, ROW_SUMS,
            EXACT, BOUNDARY=part != 1,
        )  # fmt: skip
    if ROW_SUMS:
        tl.store(row_sums_ptr + statistics, row_sums)
    dq_rows = rows_of(dq_ptr, entry_q, head, stride_dq_batch, stride_dq_head, stride_dq_row, seqlen_q)
    store_tile(dq_rows, dq * scale, first_row, BLOCK_Q, HEAD_DIM, BLOCK_D)


# --- dk and dv -------------------------------------------------------------------------------------------------------


class Keys(NamedTuple):
    """A program's keys: their tiles or, where SLICE > 0, what these are read from again."""

    first_col: tl.tensor
    k_tile: tl.tensor
    v_tile: tl.tensor
    k: Rows
    v: Rows


class QueryHead(NamedTuple):
    """The rows of a head, and where their statistics begin."""

    q: Rows
    dout: Rows
    lse_ptr: tl.tensor
    delta_ptr: tl.tensor
    inverse_ptr: tl.tensor
    dlse_ptr: tl.tensor


@triton.jit
def _dkdv_of_rows(dk, dv, keys, queries, start, stop, list_ptr, scoring, dropout, TILES: tl.constexpr,
                  OPTIONS: tl.constexpr, LISTED: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
                  EXACT: tl.constexpr, BOUNDARY: tl.constexpr):  # fmt: skip
    """dk, not scaled, and dv plus what the row tiles of [start, stop) of one query head add, or, LISTED, those that
    part of a list names.

    Tiles are (BLOCK_K, BLOCK_Q), so that p^T and ds^T come out as left operands of the products that need them.
    """
    BLOCK_Q: tl.constexpr = TILES.BLOCK_Q
    BLOCK_K: tl.constexpr = TILES.BLOCK_K
    q, dout, first_col = queries.q, queries.dout, keys.first_col
    row, col = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_K)
    STAGES: tl.constexpr = 1 if OPTIONS.MASK != MASK_NONE and BOUNDARY else None
    for at in tl.range(start, stop, 1 if LISTED else BLOCK_Q, num_stages=STAGES):
        first_row = visited_position(at, list_ptr, BLOCK_Q, LISTED)
        rows = first_row + row
        if TILES.SLICE > 0:
            dots = sliced_dot(keys.k, first_col, q, first_row, BLOCK_K, BLOCK_Q, TILES.HEAD_DIM, TILES)
            # Read any later, q and dout would be in registers together with all that multiplies them.
            if DK:
                dp = sliced_dot(keys.v, first_col, dout, first_row, BLOCK_K, BLOCK_Q, TILES.HEAD_DIM_V, TILES)
                q_tile = load_tile(q, first_row, BLOCK_Q, TILES.HEAD_DIM, TILES.BLOCK_D, True)
            if DV:
                dout_tile = load_tile(dout, first_row, BLOCK_Q, TILES.HEAD_DIM_V, TILES.BLOCK_DV, True)
        else:
            q_tile = load_tile(q, first_row, BLOCK_Q, TILES.HEAD_DIM, TILES.BLOCK_D, True)
            dots = tl.dot(keys.k_tile, tl.trans(q_tile), input_precision=TILES.PRECISION)

        lse = tl.load(queries.lse_ptr + rows)
        p, ratio = tile_probabilities(
            dots, lse[None, :], first_row, first_col, row[None, :], col[:, None], scoring, OPTIONS, BOUNDARY
        )
        if EXACT:
            p *= tl.load(queries.inverse_ptr + rows)[None, :]
        if OPTIONS.DROPOUT:
            keep = tl.trans(kept(dropout, rows, first_col, BLOCK_K))
        if TILES.SLICE == 0:
            dout_tile = load_tile(dout, first_row, BLOCK_Q, TILES.HEAD_DIM_V, TILES.BLOCK_DV, True)
        if DV:
            kept_p = p
            if OPTIONS.DROPOUT:
                kept_p = tl.where(keep, p * dropout.keep_scale, 0.0)
            dv = tl.dot(kept_p.to(dout_tile.dtype), dout_tile, dv, input_precision=TILES.PRECISION)
        if DK:
            if TILES.SLICE == 0:
                dp = tl.dot(keys.v_tile, tl.trans(dout_tile), input_precision=TILES.PRECISION)
            if OPTIONS.DROPOUT:
                dp = tl.where(keep, dp * dropout.keep_scale, 0.0)
            delta = tl.load(queries.delta_ptr + rows)
            dp -= delta[None, :]
            if EXACT:
                dp += tl.load(queries.dlse_ptr + rows)[None, :]
            ds = _before_softcap(p * dp, ratio, OPTIONS)
            dk = tl.dot(ds.to(q_tile.dtype), q_tile, dk, input_precision=TILES.PRECISION)
    return dk, dv


@triton.jit
def _rows_of_keys(first_col, positions, TILES: tl.constexpr, OPTIONS: tl.constexpr, CUT_AT_END: tl.constexpr):
    """The ``Walk`` of a tile of keys over the rows that see them."""
    last_col = tl.minimum(first_col + TILES.BLOCK_K, positions.seqlen_k)
    is_full = (OPTIONS.MASK == MASK_NONE) | (last_col == first_col + TILES.BLOCK_K)
    walk = tile_range(first_col, last_col, transposed(positions), is_full, OPTIONS.RIGHT, OPTIONS.LEFT, TILES.BLOCK_Q)
    if not CUT_AT_END:
        walk = Walk(walk.begin, walk.full_begin, walk.end, walk.end)
    return walk


@triton.jit
def _hides_tile(mask, first_col, seqlen_k, TILES: tl.constexpr, OPTIONS: tl.constexpr):
    """Whether a mask of one row hides all keys of a tile, which no row sees then."""
    cols = first_col + tl.arange(0, TILES.BLOCK_K)
    elements = tl.load(mask.ptr + cols.to(tl.int64) * mask.stride_k, mask=cols < seqlen_k, other=0)
    return tl.max(((cols < seqlen_k) & ~mask_hides(elements, OPTIONS.MASK)).to(tl.int32)) == 0


@triton.jit(do_not_specialize=VARYING)
def attention_dkdv_kernel(
    q_ptr, stride_q_batch, stride_q_head, stride_q_row,
    k_ptr, stride_k_batch, stride_k_head, stride_k_row,
    v_ptr, stride_v_batch, stride_v_head, stride_v_row,
    dout_ptr, stride_dout_batch, stride_dout_head, stride_dout_row,
    dk_ptr, stride_dk_batch, stride_dk_head, stride_dk_row,
    dv_ptr, stride_dv_batch, stride_dv_head, stride_dv_row,
    row_lse_ptr, delta_ptr, row_inverse_ptr, row_dlse_ptr, padded_rows,
    mask_ptr, stride_mask_batch, stride_mask_head, stride_mask_q, stride_mask_k,
    lists_ptr, stride_lists_batch, stride_lists_head, alibi_ptr, stride_alibi_batch,
    heads, group, seqlen_q, seqlen_k, diagonal, window_left, window_right, scale, unit, softcap,
    rng_state_ptr, threshold, keep_scale, cu_seqlens_q_ptr, cu_seqlens_k_ptr, total_q, total_k,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, SLICE: tl.constexpr, PRECISION: tl.constexpr,
    MASK: tl.constexpr, ALIBI: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr, LEFT: tl.constexpr,
    RIGHT: tl.constexpr, PLAIN: tl.constexpr, KEY_MASK: tl.constexpr, LISTED: tl.constexpr, ONE_WALK: tl.constexpr,
    PACKED: tl.constexpr, BOTTOM_RIGHT: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Writes dk if DK, dv if DV: where the sums of both do not fit the registers, two launches share the work.

    Grid: (batch * kv heads * key tiles,), the first keys, which causal masks leave to most rows, first.
    """
    TILES: tl.constexpr = Tiles(BLOCK_Q, BLOCK_K, HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, SLICE, PRECISION)
    OPTIONS: tl.constexpr = Options(MASK, ALIBI, SOFTCAP, DROPOUT, LEFT, RIGHT, PLAIN)

    # Which keys are the program's.
    key_tiles = tl.cdiv(seqlen_k, BLOCK_K)
    batch_head_kv = tl.program_id(0) // key_tiles
    first_col = tl.program_id(0) % key_tiles * BLOCK_K
    heads_kv = heads // group
    batch, head_kv = (batch_head_kv // heads_kv).to(tl.int64), (batch_head_kv % heads_kv).to(tl.int64)
    entry_k = batch
    if PACKED:
        packed_q = Packed(cu_seqlens_q_ptr, total_q, seqlen_q)
        packed_k = Packed(cu_seqlens_k_ptr, total_k, seqlen_k)
        share = Share(batch, tl.num_programs(0) // (key_tiles * heads_kv), tl.program_id(0) % key_tiles, key_tiles)
        if DK:
            dk_head_ptr = dk_ptr + head_kv * stride_dk_head
            fill_gaps(dk_head_ptr, stride_dk_row, 0.0, packed_k, share, BLOCK_K, HEAD_DIM, BLOCK_D)
        if DV:
            dv_head_ptr = dv_ptr + head_kv * stride_dv_head
            fill_gaps(dv_head_ptr, stride_dv_row, 0.0, packed_k, share, BLOCK_K, HEAD_DIM_V, BLOCK_DV)
        entry_q, seqlen_q = packed_sequence(packed_q, batch)
        entry_k, seqlen_k = packed_sequence(packed_k, batch)
        if first_col >= seqlen_k:
            return
        diagonal = seqlen_k - seqlen_q if BOTTOM_RIGHT else 0
        # Once, not for each head: the loop over heads would hold the offsets in registers.
        q_ptr += entry_q * stride_q_batch
        dout_ptr += entry_q * stride_dout_batch
        row_lse_ptr += statistics_row(entry_q, batch)
        delta_ptr += statistics_row(entry_q, batch)
        if EXACT:
            row_inverse_ptr += statistics_row(entry_q, batch)
            row_dlse_ptr += statistics_row(entry_q, batch)

    # What it reads of them, and which rows see them.
    k = rows_of(k_ptr, entry_k, head_kv, stride_k_batch, stride_k_head, stride_k_row, seqlen_k)
    v = rows_of(v_ptr, entry_k, head_kv, stride_v_batch, stride_v_head, stride_v_row, seqlen_k)
    k_tile, v_tile = 0.0, 0.0
    if SLICE == 0:
        k_tile = load_tile(k, first_col, BLOCK_K, HEAD_DIM, BLOCK_D, True)
        if DK:
            v_tile = load_tile(v, first_col, BLOCK_K, HEAD_DIM_V, BLOCK_DV, True)
    keys = Keys(first_col, k_tile, v_tile, k, v)
    dk, dv = 0.0, 0.0
    if DK:
        dk = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    if DV:
        dv = tl.zeros((BLOCK_K, BLOCK_DV), tl.float32)
    positions = Positions(seqlen_q, seqlen_k, diagonal, window_left, window_right)
    # Rows past the end have lse +inf: without a mask, which ends where they do, they need no comparison.
    CUT_AT_END: tl.constexpr = LEFT or MASK != MASK_NONE
    walk = _rows_of_keys(first_col, positions, TILES, OPTIONS, CUT_AT_END)
    FIRST_PART: tl.constexpr = WHOLE_WALK if ONE_WALK else 0 if RIGHT else 1
    LAST_PART: tl.constexpr = WHOLE_WALK if ONE_WALK else 2 if CUT_AT_END else 1

    # The walk over the rows of each head, and what comes of it.
    for member in range(0, group):
        head = head_kv * group + member
        batch_head = batch * heads + head
        if PACKED:
            entry, statistics = 0, head * padded_rows
        else:
            entry, statistics = batch, batch_head * padded_rows
        q = rows_of(q_ptr, entry, head, stride_q_batch, stride_q_head, stride_q_row, seqlen_q)
        dout = rows_of(dout_ptr, entry, head, stride_dout_batch, stride_dout_head, stride_dout_row, seqlen_q)
        inverse_ptr, dlse_ptr = row_inverse_ptr, row_dlse_ptr
        if EXACT:
            inverse_ptr, dlse_ptr = row_inverse_ptr + statistics, row_dlse_ptr + statistics
        queries = QueryHead(q, dout, row_lse_ptr + statistics, delta_ptr + statistics, inverse_ptr, dlse_ptr)
        mask_head_ptr = mask_ptr
        if MASK != MASK_NONE:
            mask_head_ptr = mask_ptr + batch * stride_mask_batch + head * stride_mask_head
        mask = Mask(mask_head_ptr, stride_mask_q, stride_mask_k)
        slope = load_slope(alibi_ptr, batch, head, stride_alibi_batch, OPTIONS)
        scoring = Scoring(positions, mask, slope, scale, unit, softcap)
        dropout = Dropout(rng_state_ptr, batch_head, threshold, keep_scale)
        if KEY_MASK:
            hidden = _hides_tile(mask, first_col, seqlen_k, TILES, OPTIONS)

        for part in tl.static_range(FIRST_PART, LAST_PART + 1):
            start, stop = walk_part(walk, part)
            if KEY_MASK:
                stop = tl.where(hidden, start, stop)
            list_ptr = lists_ptr
            if LISTED:
                list_head_ptr = lists_ptr + batch * stride_lists_batch + head * stride_lists_head
                list_ptr, start, stop = listed_tiles(
                    list_head_ptr, first_col // BLOCK_K, seqlen_q, start, stop, BLOCK_Q
                )
            dk, dv = _dkdv_of_rows(
                dk, dv, keys, queries, start, stop, list_ptr, scoring, dropout, TILES, OPTIONS, LISTED, DK, DV,
                EXACT, BOUNDARY=part != 1,
            )  # fmt: skip
    if DK:
        dk_rows = rows_of(dk_ptr, entry_k, head_kv, stride_dk_batch, stride_dk_head, stride_dk_row, seqlen_k)
        store_tile(dk_rows, dk * scale, first_col, BLOCK_K, HEAD_DIM, BLOCK_D)
    if DV:
        dv_rows = rows_of(dv_ptr, entry_k, head_kv, stride_dv_batch, stride_dv_head, stride_dv_row, seqlen_k)
        store_tile(dv_rows, dv, first_col, BLOCK_K, HEAD_DIM_V, BLOCK_DV)
