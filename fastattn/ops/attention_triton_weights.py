"""Attention weights in Triton: softmax(scores(q, k)), computed again from the lse, where they are asked for.

Work:    one program per tile of scores, (batch, head, BLOCK_Q rows, BLOCK_K keys), or for all heads of one, whose
         average it makes.
Numbers: as the forward; probabilities exp(scores - lse) in float32, after dropout.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastattn.ops.attention_triton_operands import Tiles, rows_of, sliced_dot
from fastattn.ops.attention_triton_scores import (
    MASK_NONE,
    VARYING,
    Dropout,
    Mask,
    Options,
    Positions,
    Scoring,
    kept,
    load_lse,
    load_slope,
    tile_probabilities,
)


@triton.jit(do_not_specialize=VARYING)
def attention_weights_kernel(
    q_ptr, stride_q_batch, stride_q_head, stride_q_row, k_ptr, stride_k_batch, stride_k_head, stride_k_row,
    lse_ptr, weights_ptr, mask_ptr, stride_mask_batch, stride_mask_head, stride_mask_q, stride_mask_k,
    alibi_ptr, stride_alibi_batch, heads, group, seqlen_q, seqlen_k, diagonal, window_left, window_right,
    scale, unit, softcap, rng_state_ptr, threshold, keep_scale,
    HEAD_DIM: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, SLICE: tl.constexpr,
    PRECISION: tl.constexpr, MASK: tl.constexpr, ALIBI: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, PLAIN: tl.constexpr, AVERAGE: tl.constexpr,
):  # fmt: skip
    """Grid: (batch * heads * row tiles * key tiles,); with AVERAGE, whose programs add up the heads, without heads."""
    TILES: tl.constexpr = Tiles(BLOCK_Q, BLOCK_K, HEAD_DIM, 0, 0, 0, SLICE, PRECISION)
    OPTIONS: tl.constexpr = Options(MASK, ALIBI, SOFTCAP, DROPOUT, LEFT, RIGHT, PLAIN)
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
    positions = Positions(seqlen_q, seqlen_k, diagonal, window_left, window_right)

    total = tl.zeros((BLOCK_Q, BLOCK_K), tl.float32)
    for head in range(first_head, last_head):
        head = tl.cast(head, tl.int32)
        batch64, head64, batch_head = batch.to(tl.int64), head.to(tl.int64), batch * heads + head
        q = rows_of(q_ptr, batch64, head64, stride_q_batch, stride_q_head, stride_q_row, seqlen_q)
        k = rows_of(k_ptr, batch64, head64 // group, stride_k_batch, stride_k_head, stride_k_row, seqlen_k)
        mask_head_ptr = mask_ptr
        if MASK != MASK_NONE:
            mask_head_ptr = mask_ptr + batch64 * stride_mask_batch + head64 * stride_mask_head
        slope = load_slope(alibi_ptr, batch64, head64, stride_alibi_batch, OPTIONS)
        scoring = Scoring(positions, Mask(mask_head_ptr, stride_mask_q, stride_mask_k), slope, scale, unit, softcap)

        dots = sliced_dot(q, first_row, k, first_col, BLOCK_Q, BLOCK_K, HEAD_DIM, TILES)
        lse = load_lse(lse_ptr + batch_head.to(tl.int64) * seqlen_q, rows, seqlen_q)
        weights, _ = tile_probabilities(
            dots, lse[:, None], first_row, first_col, row[:, None], col[None, :], scoring, OPTIONS, True
        )
        if DROPOUT:
            dropout = Dropout(rng_state_ptr, batch_head, threshold, keep_scale)
            weights = tl.where(kept(dropout, rows, first_col, BLOCK_K), weights * keep_scale, 0.0)
        total += weights
    if AVERAGE:
        total = total / heads
    ptrs = weights_ptr + (matrix.to(tl.int64) * seqlen_q + rows[:, None]) * seqlen_k + cols[None, :]
    inside = (rows < seqlen_q)[:, None] & (cols < seqlen_k)[None, :]
    tl.store(ptrs, total.to(weights_ptr.dtype.element_ty), mask=inside)
