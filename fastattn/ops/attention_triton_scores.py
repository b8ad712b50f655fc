"""What attention's Triton kernels share: which tiles they visit, and how a tile of dot products becomes scores.

A tile has rows (queries) and columns (keys), given as index tensors that broadcast to it: the forward and dq hold tiles
as (BLOCK_Q, BLOCK_K), dk and dv as (BLOCK_K, BLOCK_Q), and both use these functions. Mathematics:
csrc/attention/README.md.

Scores have one of two units. PLAIN scores (nothing but scale, boolean mask, causality and window) stay dot products,
and ``scale`` goes into the exponent, where a fused multiply-add takes it for free: p = exp2(s * unit - max * unit) with
unit = scale * log2(e). Other scores are natural ones, and unit = log2(e).
"""

from __future__ import annotations

import triton
import triton.language as tl

# MASK, a constexpr of every kernel: there is none, its bytes say who may attend, or it is added to the scores.
MASK_NONE: tl.constexpr = tl.constexpr(0)
MASK_BOOL: tl.constexpr = tl.constexpr(1)
MASK_ADD: tl.constexpr = tl.constexpr(2)
# The walk that is not divided (``walk_part``).
WHOLE_WALK: tl.constexpr = tl.constexpr(3)
LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)
# Arguments that differ from call to call. Of others Triton compiles one kernel for 1, one for multiples of 16, one for
# the rest, which would gain these nothing.
VARYING = ["seqlen_q", "seqlen_k", "diagonal", "window_left", "window_right", "threshold", "total_q", "total_k"]


# --- Which tiles are visited -----------------------------------------------------------------------------------------


@triton.jit
def tile_range(first, last, length, diagonal, window_left, window_right, is_full,
               LEFT: tl.constexpr, RIGHT: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """(begin, full_begin, full_end, end): the keys that rows [first, last) visit, and the tiles that all of them see.

    A row i sees the keys j of [i + diagonal - window_left, i + diagonal + window_right] (each side only if LEFT, RIGHT)
    and of [0, length). begin, full_begin and full_end are multiples of BLOCK, begin <= full_begin <= full_end: tiles of
    [begin, full_begin) and [full_end, end) need the comparison with row, those between do not. The queries that see
    given keys are the same question with left and right exchanged and -diagonal. Unless is_full, none is seen in full.
    """
    begin = 0
    end = length
    full_begin = 0
    full_end = length
    if LEFT:
        first_seen = tl.maximum(first + diagonal - window_left, 0)
        begin = first_seen // BLOCK * BLOCK
        full_begin = tl.cdiv(tl.maximum(last - 1 + diagonal - window_left, 0), BLOCK) * BLOCK
    if RIGHT:
        end = tl.minimum(tl.maximum(last + diagonal + window_right, 0), length)
        full_end = tl.minimum(tl.maximum(first + diagonal + window_right + 1, 0), length)
    if LEFT:
        # Rounded down to its tile, the first key seen could lie before the end although it lies past it.
        end = tl.where(first_seen < end, end, begin)
    stop = tl.maximum(tl.cdiv(end, BLOCK) * BLOCK, begin)
    full_begin = tl.minimum(full_begin, stop)
    full_end = tl.where(is_full, tl.maximum(full_end // BLOCK * BLOCK, full_begin), full_begin)
    return begin, full_begin, full_end, end


@triton.jit
def walk_part(begin, full_begin, full_end, end, PART: tl.constexpr):
    """What part of a walk over ``tile_range`` visits.

    0: tiles cut by the window's first edge. 1: tiles seen in full. 2: tiles cut by the window's other edge, the
    diagonal or the end. WHOLE_WALK: all of them, as if each were cut.
    """
    if PART == WHOLE_WALK:
        return begin, end
    elif PART == 0:
        return begin, tl.minimum(full_begin, end)
    elif PART == 1:
        return full_begin, full_end
    else:
        return full_end, end


@triton.jit
def mask_hides(mask, MASK: tl.constexpr):
    """Where the elements of a mask hide a key."""
    return mask == 0 if MASK == MASK_BOOL else mask == float("-inf")


@triton.jit
def visible_keys(mask_ptr, stride_mask_k, begin, end, MASK: tl.constexpr, BLOCK: tl.constexpr):
    """The keys of [begin, end) from the first to the last that a mask of one row leaves visible (key padding)."""
    CHUNK: tl.constexpr = 1024
    visible_begin = end
    visible_end = begin
    for start in range(begin, end, CHUNK):
        cols = start + tl.arange(0, CHUNK)
        mask = tl.load(mask_ptr + cols.to(tl.int64) * stride_mask_k, mask=cols < end, other=0)
        visible = (cols < end) & ~mask_hides(mask, MASK)
        visible_begin = tl.minimum(visible_begin, tl.min(tl.where(visible, cols, end)))
        visible_end = tl.maximum(visible_end, tl.max(tl.where(visible, cols + 1, begin)))
    return visible_begin // BLOCK * BLOCK, visible_end


@triton.jit
def clip_to_visible_keys(mask_ptr, stride_mask_k, begin, full_begin, full_end, end, MASK: tl.constexpr,
                         BLOCK: tl.constexpr):  # fmt: skip
    """What ``tile_range`` gave, without the tiles at both ends in which a mask of one row leaves no key visible."""
    visible_begin, visible_end = visible_keys(mask_ptr, stride_mask_k, begin, end, MASK, BLOCK)
    begin, end = tl.maximum(begin, visible_begin), tl.minimum(end, visible_end)
    full_begin = tl.maximum(full_begin, begin)
    full_end = tl.maximum(tl.minimum(full_end, tl.cdiv(end, BLOCK) * BLOCK), full_begin)
    return begin, full_begin, full_end, end


@triton.jit
def keys_of_rows(first_row, seqlen_q, seqlen_k, diagonal, window_left, window_right, mask_ptr, stride_mask_k,
                 MASK: tl.constexpr, KEY_MASK: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
                 BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """``tile_range`` of the keys that a tile of rows visits; KEY_MASK: without those at the ends that a mask hides."""
    last_row = tl.minimum(first_row + BLOCK_Q, seqlen_q)
    # The mask of rows past the end is not read: tiles that have some are no full ones.
    is_full = (MASK == MASK_NONE) | (last_row == first_row + BLOCK_Q)
    begin, full_begin, full_end, end = tile_range(
        first_row, last_row, seqlen_k, diagonal, window_left, window_right, is_full, LEFT, RIGHT, BLOCK_K
    )
    if KEY_MASK:
        begin, full_begin, full_end, end = clip_to_visible_keys(
            mask_ptr, stride_mask_k, begin, full_begin, full_end, end, MASK, BLOCK_K
        )
    return begin, full_begin, full_end, end


@triton.jit
def listed_tiles(lists_ptr, tile, length, start, stop, BLOCK: tl.constexpr):
    """(list, first, last): where own ``tile`` lists the tiles of [start, stop) that the mask leaves visible, of those
    of ``length`` positions (attention_triton_mask_tiles.py)."""
    tiles = tl.cdiv(length, BLOCK)
    lists_ptr += tl.cast(tile, tl.int64) * (2 * tiles + 1)
    first = tl.load(lists_ptr + tl.minimum(start // BLOCK, tiles))
    last = tl.load(lists_ptr + tl.minimum(tl.cdiv(stop, BLOCK), tiles))
    return lists_ptr + tiles + 1, first, last


@triton.jit
def visited_position(at, list_ptr, BLOCK: tl.constexpr, LISTED: tl.constexpr):
    """The first position of the tile that a walk visits: ``at`` itself, or what the list says there."""
    if LISTED:
        return tl.multiple_of(tl.load(list_ptr + at), BLOCK)
    else:
        return tl.multiple_of(tl.cast(at, tl.int32), BLOCK)


# --- Tiles of the operands -------------------------------------------------------------------------------------------


@triton.jit
def load_tile(ptr, first, seqlen, stride_row, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
              BOUNDARY: tl.constexpr, first_dim=0):  # fmt: skip
    """Rows [first, first + BLOCK) as (BLOCK, BLOCK_D), from ``first_dim``, a multiple of BLOCK_D; 0 past HEAD_DIM and,
    with BOUNDARY, past ``seqlen``.

    The first row's address has 64 bits, so that tensors may have more than 2^31 elements; offsets inside a tile have
    32, which saves registers (the plan copies operands whose rows lie 2^24 elements apart).
    """
    ptr += tl.cast(first, tl.int64) * stride_row
    rows = tl.arange(0, BLOCK)
    dims = first_dim + tl.arange(0, BLOCK_D)
    ptrs = ptr + (rows[:, None] * stride_row + dims[None, :])
    inside = (rows < seqlen - first)[:, None]
    inside_dim = (dims < HEAD_DIM)[None, :]
    CUT_DIMS: tl.constexpr = HEAD_DIM % BLOCK_D != 0
    if BOUNDARY and CUT_DIMS:
        return tl.load(ptrs, mask=inside & inside_dim, other=0.0)
    elif BOUNDARY:
        return tl.load(ptrs, mask=inside, other=0.0)
    elif CUT_DIMS:
        return tl.load(ptrs, mask=inside_dim, other=0.0)
    else:
        return tl.load(ptrs)


@triton.jit
def sliced_dot(a_ptr, a_first, a_seqlen, stride_a_row, b_ptr, b_first, b_seqlen, stride_b_row, BLOCK_A: tl.constexpr,
               BLOCK_B: tl.constexpr, HEAD_DIM: tl.constexpr, SLICE: tl.constexpr,
               PRECISION: tl.constexpr):  # fmt: skip
    """Rows of a times rows of b, (BLOCK_A, BLOCK_B), SLICE of head_dim at a time; 0 past their ends.

    Operands that do not go into registers whole are read again for every tile. The loop is not unrolled, so that the
    registers of one slice are all that it takes.
    """
    dots = tl.zeros((BLOCK_A, BLOCK_B), tl.float32)
    for first_dim in tl.range(0, HEAD_DIM, SLICE, num_stages=1):
        a = load_tile(a_ptr, a_first, a_seqlen, stride_a_row, BLOCK_A, HEAD_DIM, SLICE, True, first_dim)
        b = load_tile(b_ptr, b_first, b_seqlen, stride_b_row, BLOCK_B, HEAD_DIM, SLICE, True, first_dim)
        dots = tl.dot(a, tl.trans(b), dots, input_precision=PRECISION)
    return dots


@triton.jit
def store_tile(ptr, tile, first, seqlen, stride_row, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr,
               BLOCK_D: tl.constexpr):  # fmt: skip
    """Writes the part of a (BLOCK, BLOCK_D) tile that exists."""
    ptr += tl.cast(first, tl.int64) * stride_row
    rows = tl.arange(0, BLOCK)
    dims = tl.arange(0, BLOCK_D)
    ptrs = ptr + (rows[:, None] * stride_row + dims[None, :])
    inside = (rows < seqlen - first)[:, None] & (dims < HEAD_DIM)[None, :]
    tl.store(ptrs, tile.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def load_lse(ptr, rows, seqlen_q):
    """The rows' lse, +inf for rows that see nothing or do not exist: every probability is 0, without inf - inf."""
    lse = tl.load(ptr + rows, mask=rows < seqlen_q, other=float("inf"))
    return tl.where(lse == float("-inf"), float("inf"), lse)


# --- From dot products to scores and probabilities -------------------------------------------------------------------


@triton.jit
def tanh(x):
    """As exact as float32 is, also near 0, where 1 - 2 / (exp(2x) + 1) cancels: there an odd polynomial."""
    size = tl.abs(x)
    large = 1.0 - 2.0 / (tl.exp(2.0 * tl.minimum(size, 20.0)) + 1.0)
    square = x * x
    polynomial = -5.7049873e-3 * square + 2.0639088e-2
    polynomial = polynomial * square - 5.3739715e-2
    polynomial = polynomial * square + 1.3331442e-1
    polynomial = polynomial * square - 3.3333281e-1
    small = polynomial * square * x + x
    return tl.where(size < 0.625, small, tl.where(x < 0, -large, large))


@triton.jit
def cap_scores(dots, scale, softcap, SOFTCAP: tl.constexpr, PLAIN: tl.constexpr):
    """(scores before ALiBi and masks, tanh of their ratio to softcap, which the backward needs)."""
    if PLAIN:
        return dots, dots
    scores = dots * scale
    if SOFTCAP:
        ratio = tanh(scores / softcap)
        return softcap * ratio, ratio
    return scores, scores


@triton.jit
def mask_scores(scores, first_row, first_col, row, col, mask_ptr, stride_mask_q, stride_mask_k, slope,
                seqlen_q, seqlen_k, diagonal, window_left, window_right, MASK: tl.constexpr, ALIBI: tl.constexpr,
                LEFT: tl.constexpr, RIGHT: tl.constexpr, BOUNDARY: tl.constexpr):  # fmt: skip
    """The scores with ALiBi and the mask added, -inf where a key is hidden.

    BOUNDARY: position hides part of the tile; otherwise the mask, if there is one, covers all of it.
    row, col: indices inside the tile, which starts at (first_row, first_col); mask_ptr, slope: of its (batch, head).
    """
    # Per row and per key, combined only where it is used: what a compiler can compute once for every element of a tile
    # and keep, it does keep, and then spills.
    cols = first_col + col
    rows = first_row + row
    if ALIBI:
        # Positions below 2^24 are exact in float32.
        distance = cols.to(tl.float32) - (rows + diagonal).to(tl.float32)
        scores -= slope * tl.abs(distance)
    if MASK != MASK_NONE:
        ptrs = (mask_ptr + rows.to(tl.int64) * stride_mask_q) + cols.to(tl.int64) * stride_mask_k
        if BOUNDARY:
            mask = tl.load(ptrs, mask=(rows < seqlen_q) & (cols < seqlen_k), other=0)
        else:
            # Without a comparison, the load takes vectors.
            mask = tl.load(ptrs)
        if MASK == MASK_ADD:
            scores += mask.to(tl.float32)
        else:
            scores = tl.where(mask != 0, scores, float("-inf"))
    if BOUNDARY:
        # A row past the end, which comes to nothing, sees what the last one sees: hidden keys may hold NaN.
        rows = tl.minimum(rows, seqlen_q - 1)
        visible = cols < seqlen_k
        if LEFT:
            visible = visible & (cols >= rows + (diagonal - window_left))
        if RIGHT:
            visible = visible & (cols <= rows + (diagonal + window_right))
        scores = tl.where(visible, scores, float("-inf"))
    return scores


@triton.jit
def exponentials(scores, shift, unit, MASK: tl.constexpr):
    """exp2((scores - shift) * unit), where ``shift`` (broadcasting) is a maximum in the scores' unit.

    The fused form multiplies first, and a score of -3e38, which masks use for -inf, would overflow there.
    """
    if MASK == MASK_ADD:
        return tl.exp2((scores - shift) * unit)
    return tl.exp2(scores * unit - shift * unit)


@triton.jit
def online_softmax(scores, row_max, row_sum, unit, MASK: tl.constexpr):
    """(exponentials of a tile of scores, what earlier sums are multiplied by, the rows' new maxima and sums)."""
    # A row that has seen nothing yet has maximum -inf; taking 0 for it gives exp(-inf) = 0 instead of NaN.
    new_max = tl.maximum(row_max, tl.max(scores, 1))
    shift = tl.where(new_max == float("-inf"), 0.0, new_max)
    p = exponentials(scores, shift[:, None], unit, MASK)
    correction = exponentials(row_max, shift, unit, MASK)
    return p, correction, new_max, row_sum * correction + tl.sum(p, 1)


@triton.jit
def probabilities(scores, lse, unit, MASK: tl.constexpr):
    """exp(score - lse), with ``lse`` (broadcasting) natural as ever."""
    if MASK == MASK_ADD:
        return tl.exp2((scores - lse) * unit)
    return tl.exp2(scores * unit - lse * LOG2_E)


@triton.jit
def tile_probabilities(dots, lse, first_row, first_col, row, col, mask_ptr, stride_mask_q, stride_mask_k, slope,
                       seqlen_q, seqlen_k, diagonal, window_left, window_right, scale, unit, softcap,
                       MASK: tl.constexpr, ALIBI: tl.constexpr, SOFTCAP: tl.constexpr, LEFT: tl.constexpr,
                       RIGHT: tl.constexpr, PLAIN: tl.constexpr, BOUNDARY: tl.constexpr):  # fmt: skip
    """(probabilities before dropout of a tile whose rows' ``lse`` is known, tanh as of ``cap_scores``)."""
    scores, ratio = cap_scores(dots, scale, softcap, SOFTCAP, PLAIN)
    scores = mask_scores(scores, first_row, first_col, row, col, mask_ptr, stride_mask_q, stride_mask_k, slope,
                         seqlen_q, seqlen_k, diagonal, window_left, window_right, MASK, ALIBI, LEFT, RIGHT,
                         BOUNDARY)  # fmt: skip
    return probabilities(scores, lse, unit, MASK), ratio
