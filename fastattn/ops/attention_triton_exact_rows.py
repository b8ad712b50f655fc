"""What the Triton backward of float32 inputs with few keys knows of rows besides, from the rows' own p and dp.

    p' = p / (sum(p) + p_sink)    delta = sum(p' dp)    ds = p' ((dp - delta) + dlse)

Work:    one program per (batch, head, BLOCK_Q rows), which visits the keys that its rows see.
Numbers: rowsum(dout out), which is delta too, rounds on its own: where dp hardly differs from key to key, ds is the
         difference of the two, and eager, which subtracts a sum of the same p and dp, loses less. To divide p by its
         own sum takes back what rounding lse did to all of them, and a dlse of its own what it would cost delta. Sums
         are of p (dp - delta), with the delta that there is: small terms, and of a row's only key none at all.
Cost:    two products more than the seven of the others: where keys are many, or operands are rounded to 16 bits or to
         TensorFloat-32, what attention_delta_kernel does is enough (attention_triton_rows.py).
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastattn.ops.attention_triton_operands import Tiles, rows_of, sliced_dot
from fastattn.ops.attention_triton_packed import STATISTICS_ROWS, Packed, packed_sequence, statistics_row
from fastattn.ops.attention_triton_rows import lse_offset
from fastattn.ops.attention_triton_scores import (
    MASK_NONE,
    VARYING,
    Dropout,
    Mask,
    Options,
    Positions,
    Scoring,
    kept,
    keys_of_rows,
    listed_tiles,
    load_slope,
    tile_probabilities,
    visited_position,
)


@triton.jit
def _sums_of_keys(q, dout, k, v, lse, delta, first_row, lists_ptr, scoring, dropout, KEY_MASK: tl.constexpr,
                  LISTED: tl.constexpr, TILES: tl.constexpr, OPTIONS: tl.constexpr):  # fmt: skip
    """(sums of p, sums of p (dp - delta)) of the rows of a tile, none of which need exist."""
    BLOCK_Q: tl.constexpr = TILES.BLOCK_Q
    BLOCK_K: tl.constexpr = TILES.BLOCK_K
    row, col = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_K)
    total, correction = tl.zeros((BLOCK_Q,), tl.float32), tl.zeros((BLOCK_Q,), tl.float32)
    walk = keys_of_rows(first_row, scoring, KEY_MASK, BLOCK_Q, BLOCK_K, OPTIONS)
    positions = scoring.positions
    list_ptr, start, stop = lists_ptr, walk.begin, tl.where(first_row < positions.seqlen_q, walk.end, walk.begin)
    if LISTED:
        row_tile = tl.minimum(first_row, positions.seqlen_q - 1) // BLOCK_Q
        list_ptr, start, stop = listed_tiles(lists_ptr, row_tile, positions.seqlen_k, start, stop, BLOCK_K)
    for at in tl.range(start, stop, 1 if LISTED else BLOCK_K, num_stages=1):
        first_col = visited_position(at, list_ptr, BLOCK_K, LISTED)
        dots = sliced_dot(q, first_row, k, first_col, BLOCK_Q, BLOCK_K, TILES.HEAD_DIM, TILES)
        dp = sliced_dot(dout, first_row, v, first_col, BLOCK_Q, BLOCK_K, TILES.HEAD_DIM_V, TILES)
        p, _ = tile_probabilities(
            dots, lse[:, None], first_row, first_col, row[:, None], col[None, :], scoring, OPTIONS, True
        )
        if OPTIONS.DROPOUT:
            keep = kept(dropout, first_row + row, first_col, BLOCK_K)
            dp = tl.where(keep, dp * dropout.keep_scale, 0.0)
        total += tl.sum(p, 1)
        correction += tl.sum(p * (dp - delta[:, None]), 1)
    return total, correction


@triton.jit(do_not_specialize=VARYING)
def attention_exact_rows_kernel(
    q_ptr, stride_q_batch, stride_q_head, stride_q_row, k_ptr, stride_k_batch, stride_k_head, stride_k_row,
    v_ptr, stride_v_batch, stride_v_head, stride_v_row, dout_ptr, stride_dout_batch, stride_dout_head, stride_dout_row,
    dlse_ptr, row_lse_ptr, delta_ptr, row_inverse_ptr, row_dlse_ptr, padded_rows,
    mask_ptr, stride_mask_batch, stride_mask_head, stride_mask_q, stride_mask_k,
    lists_ptr, stride_lists_batch, stride_lists_head, alibi_ptr, stride_alibi_batch, sinks_ptr,
    heads, group, seqlen_q, seqlen_k, diagonal, window_left, window_right, scale, unit, softcap,
    rng_state_ptr, threshold, keep_scale, cu_seqlens_q_ptr, cu_seqlens_k_ptr, total_q, total_k,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    SLICE: tl.constexpr, PRECISION: tl.constexpr, MASK: tl.constexpr, ALIBI: tl.constexpr, SOFTCAP: tl.constexpr,
    DROPOUT: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, PLAIN: tl.constexpr, SINKS: tl.constexpr,
    DLSE: tl.constexpr, KEY_MASK: tl.constexpr, LISTED: tl.constexpr, PACKED: tl.constexpr, BOTTOM_RIGHT: tl.constexpr,
):  # fmt: skip
    """Corrects delta, which attention_delta_kernel made without dlse, and writes 1 / sum of p, and dlse, of each row.

    Grid: (batch * heads * row tiles,).
    """
    TILES: tl.constexpr = Tiles(BLOCK_Q, BLOCK_K, HEAD_DIM, HEAD_DIM_V, 0, 0, SLICE, PRECISION)
    OPTIONS: tl.constexpr = Options(MASK, ALIBI, SOFTCAP, DROPOUT, LEFT, RIGHT, PLAIN)

    # Which rows are the program's.
    row_tiles = padded_rows // BLOCK_Q
    if PACKED:
        row_tiles = tl.cdiv(seqlen_q, STATISTICS_ROWS) * (STATISTICS_ROWS // BLOCK_Q)
    batch_head = tl.program_id(0) // row_tiles
    first_row = tl.program_id(0) % row_tiles * BLOCK_Q
    batch, head = (batch_head // heads).to(tl.int64), (batch_head % heads).to(tl.int64)
    entry_q, entry_k = batch, batch
    statistics = batch_head.to(tl.int64) * padded_rows
    if PACKED:
        entry_q, seqlen_q = packed_sequence(Packed(cu_seqlens_q_ptr, total_q, seqlen_q), batch)
        entry_k, seqlen_k = packed_sequence(Packed(cu_seqlens_k_ptr, total_k, seqlen_k), batch)
        if first_row >= tl.cdiv(seqlen_q, STATISTICS_ROWS) * STATISTICS_ROWS:
            return
        diagonal = seqlen_k - seqlen_q if BOTTOM_RIGHT else 0
        statistics = head * padded_rows + statistics_row(entry_q, batch)
    rows = first_row + tl.arange(0, BLOCK_Q)
    statistics += rows

    # What it reads and scores by.
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

    lse, delta = tl.load(row_lse_ptr + statistics), tl.load(delta_ptr + statistics)
    total, correction = _sums_of_keys(
        q, dout, k, v, lse, delta, first_row, lists_ptr, scoring, dropout, KEY_MASK, LISTED, TILES, OPTIONS
    )
    if SINKS:
        p_sink = tl.exp(tl.load(sinks_ptr + head).to(tl.float32) - lse)
        total += p_sink
        correction -= p_sink * delta
    inverse = 1.0 / tl.where(total == 0.0, 1.0, total)
    dlse = tl.zeros((BLOCK_Q,), tl.float32)
    if DLSE:
        offset = lse_offset(batch_head, head, entry_q, seqlen_q, total_q, PACKED)
        # A row that sees nothing passes nothing on, whatever reaches it.
        dlse = tl.load(dlse_ptr + offset + rows, mask=(lse != float("inf")) & (rows < seqlen_q), other=0.0)
    tl.store(delta_ptr + statistics, delta + correction * inverse)
    tl.store(row_inverse_ptr + statistics, inverse)
    tl.store(row_dlse_ptr + statistics, dlse)
