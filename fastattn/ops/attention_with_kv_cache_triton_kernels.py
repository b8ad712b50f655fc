"""A step of decoding in Triton: new tokens to the cache, attention to the cache where it is, and the sum of parts.

Work:    kv_append_kernel: one program per (operand, batch, rows), which copies new keys and values to where the block
         table has them, rotates them and the queries. attention_cached_kernel: one per (batch, kv head, BLOCK_Q rows,
         part of the keys); the queries of the heads that share keys are rows of one tile, so that each key is read once
         for all of them. combine_parts_kernel: one per (batch, query, head), where the keys were parted.
Memory:  k and v are read through the block table, a look for each key, or one for a tile that lies in one block.
Numbers: rotated in float32, rounded once; otherwise as the forward. Parts are added up in order, always the same.
Source:  Kwon et al. 2023, arXiv:2309.06180; Su et al. 2021, arXiv:2104.09864.

Lengths and tables are the caller's, and on a GPU nobody has looked at them. What addresses the cache by them comes
through ``tokens_before`` and ``cache_entry``, which clip, as csrc/attention/kv_cache.h does.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from fastattn.ops.attention_triton_scores import (
    LN_2,
    MASK_NONE,
    WHOLE_WALK,
    Mask,
    Options,
    Positions,
    Scoring,
    Walk,
    cap_scores,
    mask_scores,
    online_softmax,
    tile_range,
    walk_part,
)


@triton.jit
def tokens_before(lengths_ptr, stride_length, batch, length, appended, capacity, LENGTHS: tl.constexpr):
    """Tokens that a sequence had before the append: so few that the new ones fit, whatever its length says."""
    if LENGTHS:
        tokens = tl.load(lengths_ptr + batch * stride_length)
    else:
        tokens = tl.cast(length, tl.int64)
    return tl.minimum(tl.maximum(tokens, 0), capacity - appended).to(tl.int32)


class Table(NamedTuple):
    """The block table of one sequence, of a cache of ``entries`` blocks of ``block_size`` tokens."""

    ptr: tl.tensor
    stride: tl.tensor
    block_size: tl.tensor
    entries: tl.tensor


@triton.jit
def cache_entry(table, block, exists):
    """The cache's entry of block ``block``: one that is there, whatever the table says; 0 where ``block`` is not."""
    entry = tl.load(table.ptr + block.to(tl.int64) * table.stride, mask=exists, other=0)
    return tl.minimum(tl.maximum(entry, 0), table.entries - 1).to(tl.int64)


# --- Appending and rotating ------------------------------------------------------------------------------------------


class Tokens(NamedTuple):
    """An operand or a cache. stride_entry: of the batch or, in a paged cache, of its blocks."""

    ptr: tl.tensor
    stride_entry: tl.tensor
    stride_head: tl.tensor
    stride_token: tl.tensor


class Rotation(NamedTuple):
    """cos and sin of the angles of the first ``positions``."""

    cos_ptr: tl.tensor
    sin_ptr: tl.tensor
    stride_cos: tl.tensor
    stride_sin: tl.tensor
    positions: tl.tensor


@triton.jit
def _append_rows(source, target, rotation, table, batch, first_row, tokens, heads, before,
                 HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_ROWS: tl.constexpr, ROTARY_DIM: tl.constexpr,
                 INTERLEAVED: tl.constexpr, TO_CACHE: tl.constexpr, PAGED: tl.constexpr):  # fmt: skip
    """Rows [first_row, first_row + BLOCK_ROWS) of the tokens' heads, ``before`` tokens behind the first."""
    row = first_row + tl.arange(0, BLOCK_ROWS)
    exists = row < tokens * heads
    token, head = row // heads, (row % heads).to(tl.int64)
    dims = tl.arange(0, BLOCK_D)
    inside = exists[:, None] & (dims < HEAD_DIM)[None, :]
    from_row = source.ptr + (
        batch * source.stride_entry + token.to(tl.int64) * source.stride_token + head * source.stride_head
    )
    x = tl.load(from_row[:, None] + dims[None, :], mask=inside, other=0.0)
    if ROTARY_DIM > 0:
        HALF: tl.constexpr = ROTARY_DIM // 2
        # Of each element: the angle that turns it, the other element of its pair, and whether it is the pair's first.
        if INTERLEAVED:
            angle, other, is_first = dims // 2, dims ^ 1, dims % 2 == 0
        else:
            angle, is_first = dims % HALF, dims < HALF
            other = tl.where(is_first, dims + HALF, dims - HALF)
        turns = exists[:, None] & (dims < ROTARY_DIM)[None, :]
        position = tl.minimum(before + token, rotation.positions - 1).to(tl.int64)
        cos_ptrs = rotation.cos_ptr + position[:, None] * rotation.stride_cos + angle[None, :]
        sin_ptrs = rotation.sin_ptr + position[:, None] * rotation.stride_sin + angle[None, :]
        cos = tl.load(cos_ptrs, mask=turns, other=1.0).to(tl.float32)
        sin = tl.load(sin_ptrs, mask=turns, other=0.0).to(tl.float32)
        pair = tl.load(from_row[:, None] + other[None, :], mask=turns, other=0.0).to(tl.float32)
        own = x.to(tl.float32)
        turned = own * cos + tl.where(is_first[None, :], -pair, pair) * sin
        x = tl.where(turns, turned.to(x.dtype), x)
    place = token
    entry = batch + tl.zeros((BLOCK_ROWS,), tl.int64)
    if TO_CACHE:
        place = before + token
        if PAGED:
            block = place // table.block_size
            place -= block * table.block_size
            entry = cache_entry(table, block, exists)
    to_row = target.ptr + (
        entry * target.stride_entry + place.to(tl.int64) * target.stride_token + head * target.stride_head
    )
    tl.store(to_row[:, None] + dims[None, :], x, mask=inside)


@triton.jit(do_not_specialize=["seqlen_q", "length", "appended", "capacity", "block_size", "entries", "positions",
                               "row_tiles"])  # fmt: skip
def kv_append_kernel(
    q_ptr, rotated_ptr, key_ptr, k_ptr, value_ptr, v_ptr, cos_ptr, sin_ptr, lengths_ptr, table_ptr,
    stride_q_batch, stride_q_head, stride_q_token, stride_rotated_batch, stride_rotated_head, stride_rotated_token,
    stride_key_batch, stride_key_head, stride_key_token, stride_k_entry, stride_k_head, stride_k_token,
    stride_value_batch, stride_value_head, stride_value_token, stride_v_entry, stride_v_head, stride_v_token,
    stride_cos, stride_sin, stride_length, stride_table, stride_block,
    heads, heads_kv, seqlen_q, length, appended, capacity, block_size, entries, positions, row_tiles,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, ROTARY_DIM: tl.constexpr, INTERLEAVED: tl.constexpr, PAGED: tl.constexpr,
    LENGTHS: tl.constexpr, APPENDS: tl.constexpr,
):  # fmt: skip
    """Values and keys, if APPENDS, and rotated queries; row_tiles: of the operand that has most.

    Grid: (batch * 3 * row_tiles,). Along one axis: others end at 65535 programs.
    """
    batch = (tl.program_id(0) // (3 * row_tiles)).to(tl.int64)
    operand = tl.program_id(0) // row_tiles % 3
    first_row = tl.program_id(0) % row_tiles * BLOCK_ROWS
    before = tokens_before(lengths_ptr, stride_length, batch, length, appended, capacity, LENGTHS)
    if PAGED:
        table_ptr += batch * stride_table
    table = Table(table_ptr, stride_block, block_size, entries)
    rotation = Rotation(cos_ptr, sin_ptr, stride_cos, stride_sin, positions)
    if APPENDS:
        if operand == 0 and first_row < appended * heads_kv:
            source = Tokens(value_ptr, stride_value_batch, stride_value_head, stride_value_token)
            target = Tokens(v_ptr, stride_v_entry, stride_v_head, stride_v_token)
            _append_rows(source, target, rotation, table, batch, first_row, appended, heads_kv, before,
                         HEAD_DIM_V, BLOCK_DV, BLOCK_ROWS, 0, INTERLEAVED, True, PAGED)  # fmt: skip
        if operand == 1 and first_row < appended * heads_kv:
            source = Tokens(key_ptr, stride_key_batch, stride_key_head, stride_key_token)
            target = Tokens(k_ptr, stride_k_entry, stride_k_head, stride_k_token)
            _append_rows(source, target, rotation, table, batch, first_row, appended, heads_kv, before,
                         HEAD_DIM, BLOCK_D, BLOCK_ROWS, ROTARY_DIM, INTERLEAVED, True, PAGED)  # fmt: skip
    # Nested: what a constexpr rules out is not compiled.
    if ROTARY_DIM > 0:  # noqa: SIM102
        if operand == 2 and first_row < seqlen_q * heads:
            source = Tokens(q_ptr, stride_q_batch, stride_q_head, stride_q_token)
            target = Tokens(rotated_ptr, stride_rotated_batch, stride_rotated_head, stride_rotated_token)
            _append_rows(source, target, rotation, table, batch, first_row, seqlen_q, heads, before,
                         HEAD_DIM, BLOCK_D, BLOCK_ROWS, ROTARY_DIM, INTERLEAVED, False, PAGED)  # fmt: skip


# --- Attention -------------------------------------------------------------------------------------------------------


@triton.jit
def _cached_rows(table, batch, first, seqlen_k, BLOCK: tl.constexpr, PAGED: tl.constexpr, ONE_BLOCK: tl.constexpr):
    """(entries of the cache, rows in them) of tokens [first, first + BLOCK), of which the first is there."""
    token = first + tl.arange(0, BLOCK)
    if PAGED:
        if ONE_BLOCK:
            block = first // table.block_size
            entry = cache_entry(table, block, True)
        else:
            block = token // table.block_size
            entry = cache_entry(table, block, token < seqlen_k)
        return entry, token - block * table.block_size
    else:
        return batch, token


@triton.jit
def _load_rows(row_ptrs, inside, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BOUNDARY: tl.constexpr,
               first_dim=0):  # fmt: skip
    """(rows, BLOCK_D) from ``first_dim``; 0 past HEAD_DIM and, with BOUNDARY, where rows are not ``inside``."""
    dims = first_dim + tl.arange(0, BLOCK_D)
    ptrs = row_ptrs[:, None] + dims[None, :]
    inside_dim = (dims < HEAD_DIM)[None, :]
    CUT_DIMS: tl.constexpr = HEAD_DIM % BLOCK_D != 0
    if BOUNDARY and CUT_DIMS:
        return tl.load(ptrs, mask=inside[:, None] & inside_dim, other=0.0)
    elif BOUNDARY:
        return tl.load(ptrs, mask=inside[:, None], other=0.0)
    elif CUT_DIMS:
        return tl.load(ptrs, mask=inside_dim, other=0.0)
    else:
        return tl.load(ptrs)


@triton.jit(do_not_specialize=["seqlen_q", "length", "appended", "capacity", "entries", "window_left", "window_right",
                               "splits"])  # fmt: skip
def attention_cached_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, lengths_ptr, table_ptr, alibi_ptr, sinks_ptr,
    stride_q_batch, stride_q_head, stride_q_token, stride_k_entry, stride_k_head, stride_k_token,
    stride_v_entry, stride_v_head, stride_v_token, stride_length, stride_table, stride_block, stride_alibi_batch,
    heads, group, seqlen_q, length, appended, capacity, block_size, entries, splits,
    window_left, window_right, scale, unit, softcap,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, ALIBI: tl.constexpr, SOFTCAP: tl.constexpr, SINKS: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, PLAIN: tl.constexpr, PRECISION: tl.constexpr, SLICE: tl.constexpr,
    ONE_WALK: tl.constexpr, PAGED: tl.constexpr, ONE_BLOCK: tl.constexpr, LENGTHS: tl.constexpr,
):  # fmt: skip
    """out: (splits, batch, seqlen_q, heads, HEAD_DIM_V), lse: (splits, batch, heads, seqlen_q), each of its part of the
    keys; the last query stands at the last key. ONE_BLOCK: every tile of keys lies in one block.

    Grid: (splits * row tiles * kv heads * batch,), the last rows first.
    """
    OPTIONS: tl.constexpr = Options(MASK_NONE, ALIBI, SOFTCAP, False, LEFT, RIGHT, PLAIN)
    row_tiles = tl.cdiv(seqlen_q * group, BLOCK_Q)
    heads_kv = heads // group
    split = tl.program_id(0) % splits
    first_row = (row_tiles - 1 - tl.program_id(0) // splits % row_tiles) * BLOCK_Q
    batch_head_kv = tl.program_id(0) // (splits * row_tiles)
    batch, head_kv = (batch_head_kv // heads_kv).to(tl.int64), (batch_head_kv % heads_kv).to(tl.int64)
    batches = tl.num_programs(0) // (splits * row_tiles * heads_kv)
    seqlen_k = appended + tokens_before(lengths_ptr, stride_length, batch, length, appended, capacity, LENGTHS)
    diagonal = seqlen_k - seqlen_q
    if PAGED:
        table_ptr += batch * stride_table
    table = Table(table_ptr, stride_block, block_size, entries)
    k_ptr += head_kv * stride_k_head
    v_ptr += head_kv * stride_v_head

    # Row r of a kv head is query r // group of head r % group of those that share it.
    row = first_row + tl.arange(0, BLOCK_Q)
    exists = row < seqlen_q * group
    query, head = row // group, head_kv * group + row % group
    col = tl.arange(0, BLOCK_K)
    q_rows = q_ptr + (batch * stride_q_batch + query.to(tl.int64) * stride_q_token + head * stride_q_head)
    if SLICE == 0:
        q = _load_rows(q_rows, exists, HEAD_DIM, BLOCK_D, True)
    slope = 0.0
    if ALIBI:
        slope = tl.load(alibi_ptr + batch * stride_alibi_batch + head, mask=exists, other=0.0)[:, None]
    acc = tl.zeros((BLOCK_Q, BLOCK_DV), tl.float32)
    row_max = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    row_sum = tl.zeros((BLOCK_Q,), tl.float32)
    if SINKS:
        # One more logit, without a value: the first part starts as if it had seen it.
        sink = tl.load(sinks_ptr + head, mask=exists, other=float("-inf")).to(tl.float32)
        sink = tl.where(split == 0, sink, float("-inf"))
        row_max = tl.maximum(row_max, sink)
        row_sum += tl.where(sink == float("-inf"), 0.0, 1.0)

    last = (tl.minimum(first_row + BLOCK_Q, seqlen_q * group) - 1) // group + 1
    positions = Positions(seqlen_q, seqlen_k, diagonal, window_left, window_right)
    scoring = Scoring(positions, Mask(None, 0, 0), slope, scale, unit, softcap)
    begin, full_begin, full_end, end = tile_range(first_row // group, last, positions, True, LEFT, RIGHT, BLOCK_K)
    part_tiles = tl.cdiv(tl.maximum(tl.cdiv(end - begin, BLOCK_K), 0), splits)
    begin += split * part_tiles * BLOCK_K
    part_end = begin + part_tiles * BLOCK_K
    end = tl.minimum(end, part_end)
    full_begin = tl.minimum(tl.maximum(full_begin, begin), part_end)
    full_end = tl.minimum(tl.maximum(full_end, full_begin), part_end)
    walk = Walk(begin, full_begin, full_end, end)
    FIRST_PART: tl.constexpr = WHOLE_WALK if ONE_WALK else 0 if LEFT else 1
    LAST_PART: tl.constexpr = WHOLE_WALK if ONE_WALK else 2
    for part in tl.static_range(FIRST_PART, LAST_PART + 1):
        start, stop = walk_part(walk, part)
        for at in tl.range(start, stop, BLOCK_K):
            first_col = tl.multiple_of(tl.cast(at, tl.int32), BLOCK_K)
            there = col < seqlen_k - first_col
            entry, place = _cached_rows(table, batch, first_col, seqlen_k, BLOCK_K, PAGED, ONE_BLOCK)
            k_rows = k_ptr + (entry * stride_k_entry + place.to(tl.int64) * stride_k_token)
            v_rows = v_ptr + (entry * stride_v_entry + place.to(tl.int64) * stride_v_token)
            if SLICE > 0:
                dots = tl.zeros((BLOCK_Q, BLOCK_K), tl.float32)
                for first_dim in tl.range(0, HEAD_DIM, SLICE, num_stages=1):
                    q = _load_rows(q_rows, exists, HEAD_DIM, SLICE, True, first_dim)
                    k = _load_rows(k_rows, there, HEAD_DIM, SLICE, True, first_dim)
                    dots = tl.dot(q, tl.trans(k), dots, input_precision=PRECISION)
            else:
                k = _load_rows(k_rows, there, HEAD_DIM, BLOCK_D, part != 1)
                dots = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            v = _load_rows(v_rows, there, HEAD_DIM_V, BLOCK_DV, part != 1)
            scores, _ = cap_scores(dots, scoring, OPTIONS)
            scores = mask_scores(scores, 0, first_col, query[:, None], col[None, :], scoring, OPTIONS, part != 1)
            p, correction, row_max, row_sum = online_softmax(
                scores, row_max, row_sum, unit, MASK_NONE, q_ptr.dtype.element_ty == tl.float32
            )
            acc = tl.dot(p.to(v.dtype), v, acc * correction[:, None], input_precision=PRECISION)

    seen_sum = tl.where(row_sum == 0.0, 1.0, row_sum)
    dims = tl.arange(0, BLOCK_DV)
    out_row = ((split * batches + batch) * seqlen_q + query) * heads + head
    tl.store(out_ptr + out_row[:, None] * HEAD_DIM_V + dims[None, :],
             (acc * (1.0 / seen_sum)[:, None]).to(out_ptr.dtype.element_ty),
             mask=exists[:, None] & (dims < HEAD_DIM_V)[None, :])  # fmt: skip
    natural = scale if PLAIN else 1.0
    lse = row_max * natural + tl.log2(seen_sum) * LN_2
    tl.store(lse_ptr + ((split * batches + batch) * heads + head) * seqlen_q + query, lse, mask=exists)


@triton.jit(do_not_specialize=["seqlen_q", "splits"])
def combine_parts_kernel(
    part_out_ptr, part_lse_ptr, out_ptr, lse_ptr, heads, seqlen_q, splits,
    HEAD_DIM_V: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_SPLITS: tl.constexpr,
):  # fmt: skip
    """out = sum(exp(part_lse - lse) part_out), in order. Grid: (batch * seqlen_q * heads,)."""
    rows = tl.num_programs(0).to(tl.int64)
    row = tl.program_id(0).to(tl.int64)
    batch, query, head = row // (seqlen_q * heads), row // heads % seqlen_q, row % heads
    lse_row = (batch * heads + head) * seqlen_q + query
    part = tl.arange(0, BLOCK_SPLITS)
    part_lse = tl.load(part_lse_ptr + part * rows + lse_row, mask=part < splits, other=float("-inf"))
    largest = tl.max(part_lse)
    # Of a row that saw nothing, every part has weight 0.
    shift = tl.where(largest == float("-inf"), 0.0, largest)
    total = tl.sum(tl.exp(part_lse - shift))
    inverse = 1.0 / tl.where(total == 0.0, 1.0, total)
    dims = tl.arange(0, BLOCK_DV)
    inside = dims < HEAD_DIM_V
    acc = tl.zeros((BLOCK_DV,), tl.float32)
    for index in range(0, splits):
        weight = tl.exp(tl.load(part_lse_ptr + index * rows + lse_row) - shift)
        acc += weight * tl.load(part_out_ptr + (index * rows + row) * HEAD_DIM_V + dims, mask=inside, other=0.0)
    tl.store(out_ptr + row * HEAD_DIM_V + dims, (acc * inverse).to(out_ptr.dtype.element_ty), mask=inside)
    lse = tl.where(total == 0.0, float("-inf"), shift + tl.log(tl.where(total == 0.0, 1.0, total)))
    tl.store(lse_ptr + lse_row, lse)
