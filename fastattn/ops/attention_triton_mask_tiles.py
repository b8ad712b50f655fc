"""Which tiles of attn_mask leave a key visible: found before attention's Triton kernels run, which visit no others.

Work:    attention_mask_states_kernel reads the mask, in its own broadcast shape, and writes a byte for every
         STATE_Q x STATE_K elements, of which the tiles of all kernels are made: dq, dk and dv share them. It reads no
         more than a row of each where that shows a visible key, so that masks without hidden tiles cost little.
         attention_mask_lists_kernel turns them into what a kernel walks: for each of its own tiles the visible ones of
         the other side. Lists, rather than a test in each tile, let the compiler load ahead of the products.
Memory:  of each own tile, in int32: for every tile of the other side and for the end how many visible ones come before
         it, then the first positions of the visible ones.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastattn.ops.attention_triton_scores import mask_hides


@triton.jit
def _visible_states(mask_ptr, q, k, seqlen_q, seqlen_k, stride_mask_q, stride_mask_k, MASK: tl.constexpr,
                    ROWS: tl.constexpr, STATES_Q: tl.constexpr, STATES_K: tl.constexpr):  # fmt: skip
    """(STATES_Q, STATES_K) int8: 1 where one of a state's keys is visible to one of its rows; it has ROWS of ``q``."""
    inside = (q < seqlen_q)[:, None] & (k < seqlen_k)[None, :]
    ptrs = mask_ptr + q.to(tl.int64)[:, None] * stride_mask_q + k.to(tl.int64)[None, :] * stride_mask_k
    mask = tl.load(ptrs, mask=inside, other=0)
    visible = (inside & ~mask_hides(mask, MASK)).to(tl.int8)
    visible = tl.max(tl.reshape(visible, (STATES_Q, ROWS, k.shape[0])), 1)
    return tl.max(tl.reshape(visible, (STATES_Q, STATES_K, k.shape[0] // STATES_K)), 2)


@triton.jit(do_not_specialize=["seqlen_q", "seqlen_k", "rows", "cols"])
def attention_mask_states_kernel(
    mask_ptr, states_ptr, stride_mask_batch, stride_mask_head, stride_mask_q, stride_mask_k,
    mask_heads, seqlen_q, seqlen_k, rows, cols, MASK: tl.constexpr, STATE_Q: tl.constexpr, STATE_K: tl.constexpr,
    STATES_Q: tl.constexpr, STATES_K: tl.constexpr,
):  # fmt: skip
    """states: (mask_batches, mask_heads, rows, cols) bytes, 1 where a key is visible.

    Grid: (mask_batches * mask_heads * cdiv(rows, STATES_Q) * cdiv(cols, STATES_K),).
    """
    col_blocks, row_blocks = tl.cdiv(cols, STATES_K), tl.cdiv(rows, STATES_Q)
    col_block = tl.program_id(0) % col_blocks
    row_block = tl.program_id(0) // col_blocks % row_blocks
    matrix = (tl.program_id(0) // (col_blocks * row_blocks)).to(tl.int64)
    mask_ptr += matrix // mask_heads * stride_mask_batch + matrix % mask_heads * stride_mask_head
    row = row_block * STATES_Q + tl.arange(0, STATES_Q)
    col = col_block * STATES_K + tl.arange(0, STATES_K)
    inside = (row < rows)[:, None] & (col < cols)[None, :]
    k = col_block * STATES_K * STATE_K + tl.arange(0, STATES_K * STATE_K)
    # One row of a mask that hides nothing, such as a bias, shows that: the others stay unread.
    visible = _visible_states(mask_ptr, row * STATE_Q, k, seqlen_q, seqlen_k, stride_mask_q, stride_mask_k, MASK, 1,
                              STATES_Q, STATES_K)  # fmt: skip
    if tl.min(tl.where(inside, visible, 1)) == 0:
        q = row_block * STATES_Q * STATE_Q + tl.arange(0, STATES_Q * STATE_Q)
        visible = _visible_states(mask_ptr, q, k, seqlen_q, seqlen_k, stride_mask_q, stride_mask_k, MASK, STATE_Q,
                                  STATES_Q, STATES_K)  # fmt: skip
    ptrs = states_ptr + (matrix * rows + row[:, None]) * cols + col[None, :]
    tl.store(ptrs, visible, mask=inside)


@triton.jit(do_not_specialize=["stride_own", "states_own", "states_walk", "own_tiles", "walk_tiles"])
def attention_mask_lists_kernel(
    states_ptr, lists_ptr, stride_own, stride_walk, states_own, states_walk,
    own_tiles, walk_tiles, OWN: tl.constexpr, WALK: tl.constexpr, WALK_BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """lists: (matrices, own_tiles, 2 * walk_tiles + 1) int32, as above; an own tile is OWN states long, a tile of the
    other side WALK states and WALK_BLOCK positions.

    Grid: (matrices * own_tiles,).
    """
    own_tile = tl.program_id(0) % own_tiles
    matrix = (tl.program_id(0) // own_tiles).to(tl.int64)
    states_ptr += matrix * states_own * states_walk
    lists_ptr += tl.program_id(0).to(tl.int64) * (2 * walk_tiles + 1)
    own = own_tile * OWN + tl.arange(0, OWN)
    found = 0
    for first in range(0, walk_tiles, CHUNK):
        walk = first * WALK + tl.arange(0, CHUNK * WALK)
        inside = (own < states_own)[:, None] & (walk < states_walk)[None, :]
        ptrs = states_ptr + own.to(tl.int64)[:, None] * stride_own + walk.to(tl.int64)[None, :] * stride_walk
        visible = tl.max(tl.load(ptrs, mask=inside, other=0).to(tl.int32), 0)
        visible = tl.max(tl.reshape(visible, (CHUNK, WALK)), 1)
        before = found + tl.cumsum(visible, 0) - visible
        tile = first + tl.arange(0, CHUNK)
        tl.store(lists_ptr + tile, before, mask=tile < walk_tiles)
        tl.store(lists_ptr + walk_tiles + 1 + before, tile * WALK_BLOCK, mask=visible != 0)
        found += tl.sum(visible)
    tl.store(lists_ptr + walk_tiles, found)
