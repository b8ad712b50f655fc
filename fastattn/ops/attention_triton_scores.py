"""What attention's Triton kernels share: which tiles they visit, and how a tile of dot products becomes scores.

A tile has rows (queries) and columns (keys), given as index tensors that broadcast to it: the forward and dq hold tiles
as (BLOCK_Q, BLOCK_K), dk and dv as (BLOCK_K, BLOCK_Q), and both use these functions. Mathematics:
csrc/attention/README.md.

Scores have one of two units. PLAIN scores (nothing but scale, boolean mask, causality and window) stay dot products,
and ``scale`` goes into the exponent, where a fused multiply-add takes it for free: p = exp2(s * unit - max * unit) with
unit = scale * log2(e). Other scores are natural ones, and unit = log2(e). Float32 subtracts first (``exponentials``).
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from fastattn.ops.philox_triton import dropout_keep

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


class Options(NamedTuple):
    """What shapes the scores of a call; constexprs all."""

    MASK: tl.constexpr
    ALIBI: tl.constexpr
    SOFTCAP: tl.constexpr
    DROPOUT: tl.constexpr
    # Whether the window ends on that side; a causal one ends on the right.
    LEFT: tl.constexpr
    RIGHT: tl.constexpr
    PLAIN: tl.constexpr


class Positions(NamedTuple):
    """A row i sees the keys j of [i + diagonal - window_left, i + diagonal + window_right] and of [0, seqlen_k)."""

    seqlen_q: tl.tensor
    seqlen_k: tl.tensor
    diagonal: tl.tensor
    window_left: tl.tensor
    window_right: tl.tensor


class Mask(NamedTuple):
    """Of one (batch, head); strides are 0 where it broadcasts. Nothing reads it where there is none."""

    ptr: tl.tensor
    stride_q: tl.tensor
    stride_k: tl.tensor


class Scoring(NamedTuple):
    """How the dot products of one (batch, head) become scores, and scores probabilities."""

    positions: Positions
    mask: Mask
    slope: tl.tensor
    scale: tl.tensor
    unit: tl.tensor
    softcap: tl.tensor


class Dropout(NamedTuple):
    """Which probabilities of one (batch, head) are kept (philox_triton.py), and what those are multiplied by."""

    rng_state_ptr: tl.tensor
    batch_head: tl.tensor
    threshold: tl.tensor
    keep_scale: tl.tensor


@triton.jit
def load_slope(alibi_ptr, batch, head, stride_batch, OPTIONS: tl.constexpr):
    slope = 0.0
    if OPTIONS.ALIBI:
        slope = tl.load(alibi_ptr + batch * stride_batch + head)
    return slope


@triton.jit
def kept(dropout, rows, first_col, BLOCK_K: tl.constexpr):
    """(rows, BLOCK_K) bool: which of a tile's probabilities dropout leaves."""
    return dropout_keep(dropout.rng_state_ptr, dropout.batch_head, rows, first_col, dropout.threshold, BLOCK_K)


# --- Which tiles are visited -----------------------------------------------------------------------------------------


class Walk(NamedTuple):
    """The keys that some rows visit, [begin, end), and those of tiles that all of the rows see, [full_begin, full_end):
    tiles of [begin, full_begin) and [full_end, end) need the comparison with row, those between do not. begin,
    full_begin and full_end are multiples of a tile, begin <= full_begin <= full_end."""

    begin: tl.tensor
    full_begin: tl.tensor
    full_end: tl.tensor
    end: tl.tensor


@triton.jit
def tile_range(first, last, positions, is_full, LEFT: tl.constexpr, RIGHT: tl.constexpr, BLOCK: tl.constexpr):
    """The ``Walk`` of rows [first, last), in tiles of BLOCK keys.

    The queries that see given keys are the same question of ``transposed(positions)`` with LEFT and RIGHT exchanged.
    Unless is_full, no tile is seen in full.
    """
    length, diagonal = positions.seqlen_k, positions.diagonal
    begin = 0
    end = length
    full_begin = 0
    full_end = length
    if LEFT:
        first_seen = tl.maximum(first + diagonal - positions.window_left, 0)
        begin = first_seen // BLOCK * BLOCK
        full_begin = tl.cdiv(tl.maximum(last - 1 + diagonal - positions.window_left, 0), BLOCK) * BLOCK
    if RIGHT:
        end = tl.minimum(tl.maximum(last + diagonal + positions.window_right, 0), length)
        full_end = tl.minimum(tl.maximum(first + diagonal + positions.window_right + 1, 0), length)
    if LEFT:
        # Rounded down to its tile, the first key seen could lie before the end although it lies past it.
        end = tl.where(first_seen < end, end, begin)
    stop = tl.maximum(tl.cdiv(end, BLOCK) * BLOCK, begin)
    full_begin = tl.minimum(full_begin, stop)
    full_end = tl.where(is_full, tl.maximum(full_end // BLOCK * BLOCK, full_begin), full_begin)
    return Walk(begin, full_begin, full_end, end)


@triton.jit
def transposed(positions):
    """The same as seen by the keys: which rows see one."""
    return Positions(positions.seqlen_k, positions.seqlen_q, -positions.diagonal, positions.window_right,
                     positions.window_left)  # fmt: skip


@triton.jit
def walk_part(walk, PART: tl.constexpr):
    """(start, stop) of what part of a walk visits.

    0: tiles cut by the window's first edge. 1: tiles seen in full. 2: tiles cut by the window's other edge, the
    diagonal or the end. WHOLE_WALK: all of them, as if each were cut.
    """
    if PART == WHOLE_WALK:
        return walk.begin, walk.end
    elif PART == 0:
        return walk.begin, tl.minimum(walk.full_begin, walk.end)
    elif PART == 1:
        return walk.full_begin, walk.full_end
    else:
        return walk.full_end, walk.end


@triton.jit
def mask_hides(mask, MASK: tl.constexpr):
    """Where the elements of a mask hide a key."""
    return mask == 0 if MASK == MASK_BOOL else mask == float("-inf")


@triton.jit
def visible_keys(mask, begin, end, MASK: tl.constexpr, BLOCK: tl.constexpr):
    """The keys of [begin, end) from the first to the last that a mask of one row leaves visible (key padding)."""
    CHUNK: tl.constexpr = 1024
    visible_begin = end
    visible_end = begin
    for start in range(begin, end, CHUNK):
        cols = start + tl.arange(0, CHUNK)
        elements = tl.load(mask.ptr + cols.to(tl.int64) * mask.stride_k, mask=cols < end, other=0)
        visible = (cols < end) & ~mask_hides(elements, MASK)
        visible_begin = tl.minimum(visible_begin, tl.min(tl.where(visible, cols, end)))
        visible_end = tl.maximum(visible_end, tl.max(tl.where(visible, cols + 1, begin)))
    return visible_begin // BLOCK * BLOCK, visible_end


@triton.jit
def clip_to_visible_keys(walk, mask, MASK: tl.constexpr, BLOCK: tl.constexpr):
    """A walk without the tiles at both ends in which a mask of one row leaves no key visible."""
    visible_begin, visible_end = visible_keys(mask, walk.begin, walk.end, MASK, BLOCK)
    begin, end = tl.maximum(walk.begin, visible_begin), tl.minimum(walk.end, visible_end)
    full_begin = tl.maximum(walk.full_begin, begin)
    full_end = tl.maximum(tl.minimum(walk.full_end, tl.cdiv(end, BLOCK) * BLOCK), full_begin)
    return Walk(begin, full_begin, full_end, end)


@triton.jit
def keys_of_rows(first_row, scoring, KEY_MASK: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
                 OPTIONS: tl.constexpr):  # fmt: skip
    """The ``Walk`` of a tile of rows over their keys; KEY_MASK: without those at the ends that a mask hides."""
    last_row = tl.minimum(first_row + BLOCK_Q, scoring.positions.seqlen_q)
    # The mask of rows past the end is not read: tiles that have some are no full ones.
    is_full = (OPTIONS.MASK == MASK_NONE) | (last_row == first_row + BLOCK_Q)
    walk = tile_range(first_row, last_row, scoring.positions, is_full, OPTIONS.LEFT, OPTIONS.RIGHT, BLOCK_K)
    if KEY_MASK:
        walk = clip_to_visible_keys(walk, scoring.mask, OPTIONS.MASK, BLOCK_K)
    return walk


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


# --- From dot products to scores and probabilities -------------------------------------------------------------------


@triton.jit
def load_lse(ptr, rows, seqlen_q):
    """The rows' lse, +inf for rows that see nothing or do not exist: every probability is 0, without inf - inf."""
    lse = tl.load(ptr + rows, mask=rows < seqlen_q, other=float("inf"))
    return tl.where(lse == float("-inf"), float("inf"), lse)


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
def cap_scores(dots, scoring, OPTIONS: tl.constexpr):
    """(scores before ALiBi and masks, tanh of their ratio to softcap, which the backward needs)."""
    if OPTIONS.PLAIN:
        return dots, dots
    scores = dots * scoring.scale
    if OPTIONS.SOFTCAP:
        ratio = tanh(scores / scoring.softcap)
        return scoring.softcap * ratio, ratio
    return scores, scores


@triton.jit
def mask_scores(scores, first_row, first_col, row, col, scoring, OPTIONS: tl.constexpr, BOUNDARY: tl.constexpr):
    """The scores with ALiBi and the mask added, -inf where a key is hidden.

    BOUNDARY: position hides part of the tile; otherwise the mask, if there is one, covers all of it.
    row, col: indices inside the tile, which starts at (first_row, first_col).
    """
    positions, mask = scoring.positions, scoring.mask
    # Per row and per key, combined only where it is used: what a compiler can compute once for every element of a tile
    # and keep, it does keep, and then spills.
    cols = first_col + col
    rows = first_row + row
    if OPTIONS.ALIBI:
        # Positions below 2^24 are exact in float32.
        distance = cols.to(tl.float32) - (rows + positions.diagonal).to(tl.float32)
        scores -= scoring.slope * tl.abs(distance)
    if OPTIONS.MASK != MASK_NONE:
        ptrs = (mask.ptr + rows.to(tl.int64) * mask.stride_q) + cols.to(tl.int64) * mask.stride_k
        if BOUNDARY:
            elements = tl.load(ptrs, mask=(rows < positions.seqlen_q) & (cols < positions.seqlen_k), other=0)
        else:
            # Without a comparison, the load takes vectors.
            elements = tl.load(ptrs)
        if OPTIONS.MASK == MASK_ADD:
            scores += elements.to(tl.float32)
        else:
            scores = tl.where(elements != 0, scores, float("-inf"))
    if BOUNDARY:
        # A row past the end, which comes to nothing, sees what the last one sees: hidden keys may hold NaN.
        rows = tl.minimum(rows, positions.seqlen_q - 1)
        visible = cols < positions.seqlen_k
        if OPTIONS.LEFT:
            visible = visible & (cols >= rows + (positions.diagonal - positions.window_left))
        if OPTIONS.RIGHT:
            visible = visible & (cols <= rows + (positions.diagonal + positions.window_right))
        scores = tl.where(visible, scores, float("-inf"))
    return scores


@triton.jit
def exponentials(scores, shift, unit, MASK: tl.constexpr, FLOAT32: tl.constexpr):
    """exp2((scores - shift) * unit), where ``shift`` (broadcasting) is a maximum in the scores' unit.

    The fused form multiplies first. There a score of -3e38, which masks use for -inf, would overflow; and shift * unit
    is rounded, which leaves an error of that rounding, another for each maximum: too much for float32, 0.3 % at 60000.
    """
    if MASK == MASK_ADD or FLOAT32:
        return tl.exp2((scores - shift) * unit)
    return tl.exp2(scores * unit - shift * unit)


@triton.jit
def online_softmax(scores, row_max, row_sum, unit, MASK: tl.constexpr, FLOAT32: tl.constexpr):
    """(exponentials of a tile of scores, what earlier sums are multiplied by, the rows' new maxima and sums)."""
    # A row that has seen nothing yet has maximum -inf; taking 0 for it gives exp(-inf) = 0 instead of NaN.
    new_max = tl.maximum(row_max, tl.max(scores, 1))
    shift = tl.where(new_max == float("-inf"), 0.0, new_max)
    p = exponentials(scores, shift[:, None], unit, MASK, FLOAT32)
    correction = exponentials(row_max, shift, unit, MASK, FLOAT32)
    return p, correction, new_max, row_sum * correction + tl.sum(p, 1)


@triton.jit
def probabilities(scores, lse, unit, MASK: tl.constexpr):
    """exp(score - lse), with ``lse`` (broadcasting) natural as ever."""
    if MASK == MASK_ADD:
        return tl.exp2((scores - lse) * unit)
    return tl.exp2(scores * unit - lse * LOG2_E)


@triton.jit
def tile_probabilities(dots, lse, first_row, first_col, row, col, scoring, OPTIONS: tl.constexpr,
                       BOUNDARY: tl.constexpr):  # fmt: skip
    """(probabilities before dropout of a tile whose rows' ``lse`` is known, tanh as of ``cap_scores``)."""
    scores, ratio = cap_scores(dots, scoring, OPTIONS)
    scores = mask_scores(scores, first_row, first_col, row, col, scoring, OPTIONS, BOUNDARY)
    return probabilities(scores, lse, scoring.unit, OPTIONS.MASK), ratio
