"""The gradient of an additive attention mask in Triton: ds, summed over the dims in which the mask broadcasts. (Where
keys are among them attention_triton_rows.py needs no ds.)

Work:    one program per tile of the mask (of the scores, where the mask broadcasts along rows). It computes ds
         of that tile again for each (batch, head) that shares it, one after the other, and adds in registers: no
         atomics, no (batch, heads, seqlen_q, seqlen_k) scratch. Where few tiles are shared by many (batch, head), the
         latter are split among programs, whose partial sums are added up afterwards.
Numbers: as the backward; sums in float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastattn.ops.attention_triton_operands import Tiles, rows_of, sliced_dot
from fastattn.ops.attention_triton_scores import (
    VARYING,
    Dropout,
    Mask,
    Options,
    Positions,
    Scoring,
    kept,
    load_slope,
    tile_probabilities,
    tile_range,
)


@triton.jit(do_not_specialize=VARYING)
def attention_dmask_kernel(
    q_ptr, stride_q_batch, stride_q_head, stride_q_row, k_ptr, stride_k_batch, stride_k_head, stride_k_row,
    v_ptr, stride_v_batch, stride_v_head, stride_v_row, dout_ptr, stride_dout_batch, stride_dout_head, stride_dout_row,
    row_lse_ptr, delta_ptr, row_inverse_ptr, row_dlse_ptr, padded_rows, dmask_ptr,
    mask_ptr, stride_mask_batch, stride_mask_head, stride_mask_q, stride_mask_k, alibi_ptr, stride_alibi_batch,
    heads, group, seqlen_q, seqlen_k, diagonal, window_left, window_right, scale, unit, softcap,
    rng_state_ptr, threshold, keep_scale, mask_batches, mask_heads, batches_shared, heads_shared, pairs,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    SLICE: tl.constexpr, PRECISION: tl.constexpr, MASK: tl.constexpr, ALIBI: tl.constexpr, SOFTCAP: tl.constexpr,
    DROPOUT: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, PLAIN: tl.constexpr, SUM_ROWS: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """dmask: (splits, mask_batches, mask_heads, rows or row tiles if SUM_ROWS, keys).

    ``pairs`` (batch, head) of the batches_shared * heads_shared that share a tile are one program's part.
    Grid: (splits * mask_batches * mask_heads * row tiles * key tiles,).
    """
    TILES: tl.constexpr = Tiles(BLOCK_Q, BLOCK_K, HEAD_DIM, HEAD_DIM_V, 0, 0, SLICE, PRECISION)
    OPTIONS: tl.constexpr = Options(MASK, ALIBI, SOFTCAP, DROPOUT, LEFT, RIGHT, PLAIN)
    key_tiles, row_tiles = tl.cdiv(seqlen_k, BLOCK_K), tl.cdiv(seqlen_q, BLOCK_Q)
    key_tile = tl.program_id(0) % key_tiles
    row_tile = tl.program_id(0) // key_tiles % row_tiles
    matrix = tl.program_id(0) // (key_tiles * row_tiles)
    mask_head = matrix % mask_heads
    mask_batch = matrix // mask_heads % mask_batches
    split = matrix // (mask_heads * mask_batches)
    first_col, first_row = key_tile * BLOCK_K, row_tile * BLOCK_Q
    row, col = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_K)
    rows, cols = first_row + row, first_col + col

    first_pair = split * pairs
    last_pair = tl.minimum(first_pair + pairs, batches_shared * heads_shared)
    positions = Positions(seqlen_q, seqlen_k, diagonal, window_left, window_right)
    walk = tile_range(first_row, tl.minimum(first_row + BLOCK_Q, seqlen_q), positions, True, LEFT, RIGHT, BLOCK_K)
    last_pair = tl.where((first_col >= walk.begin) & (first_col < walk.end), last_pair, first_pair)

    total = tl.zeros((BLOCK_Q, BLOCK_K), tl.float32)
    for pair in range(first_pair, last_pair):
        batch = (mask_batch + pair // heads_shared).to(tl.int64)
        head = (mask_head + pair % heads_shared).to(tl.int64)
        batch_head = batch * heads + head
        q = rows_of(q_ptr, batch, head, stride_q_batch, stride_q_head, stride_q_row, seqlen_q)
        dout = rows_of(dout_ptr, batch, head, stride_dout_batch, stride_dout_head, stride_dout_row, seqlen_q)
        k = rows_of(k_ptr, batch, head // group, stride_k_batch, stride_k_head, stride_k_row, seqlen_k)
        v = rows_of(v_ptr, batch, head // group, stride_v_batch, stride_v_head, stride_v_row, seqlen_k)
        mask = Mask(mask_ptr + batch * stride_mask_batch + head * stride_mask_head, stride_mask_q, stride_mask_k)
        slope = load_slope(alibi_ptr, batch, head, stride_alibi_batch, OPTIONS)
        scoring = Scoring(positions, mask, slope, scale, unit, softcap)

        dots = sliced_dot(q, first_row, k, first_col, BLOCK_Q, BLOCK_K, HEAD_DIM, TILES)
        dp = sliced_dot(dout, first_row, v, first_col, BLOCK_Q, BLOCK_K, HEAD_DIM_V, TILES)
        statistics = batch_head * padded_rows + rows
        lse = tl.load(row_lse_ptr + statistics)
        p, _ = tile_probabilities(
            dots, lse[:, None], first_row, first_col, row[:, None], col[None, :], scoring, OPTIONS, True
        )
        if DROPOUT:
            dropout = Dropout(rng_state_ptr, batch_head, threshold, keep_scale)
            dp = tl.where(kept(dropout, rows, first_col, BLOCK_K), dp * keep_scale, 0.0)
        dp -= tl.load(delta_ptr + statistics)[:, None]
        if EXACT:
            p *= tl.load(row_inverse_ptr + statistics)[:, None]
            dp += tl.load(row_dlse_ptr + statistics)[:, None]
        total += p * dp

    if SUM_ROWS:
        total = tl.sum(total, 0)[None, :]
        rows = row_tile + tl.arange(0, 1)
        seqlen_q = row_tiles
    ptrs = dmask_ptr + (matrix.to(tl.int64) * seqlen_q + rows[:, None]) * seqlen_k + cols[None, :]
    inside = (rows < seqlen_q)[:, None] & (cols < seqlen_k)[None, :]
    tl.store(ptrs, total.to(dmask_ptr.dtype.element_ty), mask=inside)
