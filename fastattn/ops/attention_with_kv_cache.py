"""Attention of new queries to a key/value cache that grows in place: the step of autoregressive decoding."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastattn import dispatch
from fastattn.dispatch import Kernel, cuda_kernels, never_refuses, select
from fastattn.ops import attention_checks as checks
from fastattn.ops import attention_compiled as compiled
from fastattn.ops.attention import run_eager
from fastattn.ops.attention_compiled import one_token_if_plain
from fastattn.ops.attention_with_kv_cache_triton import refuses_kv_cache_triton, run_kv_cache_triton
from fastattn.ops.calls import AttentionCall, KvCacheCall
from fastattn.ops.tensor_checks import check_dense
from fastattn.ops.varlen_attention import with_diagonals

_MOST_ON_CPU = 2**31 - 1  # tokens of a sequence, and blocks


def attention_with_kv_cache(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    key: Tensor | None = None,
    value: Tensor | None = None,
    *,
    cache_seqlens: int | Tensor,
    block_table: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    rotary_interleaved: bool = False,
    is_causal: bool = True,
    scale: float | None = None,
    window: tuple[int, int] | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Appends ``key`` and ``value`` to the caches, in place, and attends to all that they then hold. No gradients.

    The last query stands at the last key ("bottom_right"). What a cache holds past its length is never read into a
    result, so that it may be uninitialised.

    Args:
        query: (batch, seqlen_q, heads, head_dim), float32, float16, bfloat16 or float64.
        key_cache: (batch, seqlen_cache, heads_kv, head_dim), or, with ``block_table``, (blocks, block_size, heads_kv,
            head_dim); dtype and device of ``query``; heads must be a multiple of heads_kv.
        value_cache: the same, with head_dim_v.
        key, value: (batch, seqlen_new, heads_kv, head_dim or head_dim_v), what to append; or neither.
        cache_seqlens: how many tokens each sequence holds before the append: an int, or (batch,) int32 or int64.
        block_table: (batch, blocks_per_sequence) int32 or int64: token t of sequence b is at row ``t % block_size`` of
            block ``block_table[b, t // block_size]``. Entries past a sequence's length are not looked at.
        rotary_cos, rotary_sin: (positions, rotary_dim / 2), rotate the first rotary_dim elements of query i and of new
            key i by the angles of position ``cache_seqlens + i``.
        rotary_interleaved: rotate elements (2i, 2i + 1) together (GPT-J) instead of (i, i + rotary_dim / 2) (GPT-NeoX).
        is_causal, scale, window, softcap, alibi_slopes, sinks, return_lse, backend: as in ``attention``.

    Returns:
        out: (batch, seqlen_q, heads, head_dim_v), dtype of ``query``.
        lse, if asked for: (batch, heads, seqlen_q), float32 (float64 for float64).

    Raises:
        ValueError, TypeError: for arguments that disagree, and for lengths, positions and table entries outside the
            cache where reading them needs no synchronisation (on a GPU they are clamped to it).
        NotImplementedError: if a gradient would be needed, or ``backend`` is named and cannot run this call.

    Source: Kwon et al. 2023 (arXiv:2309.06180) for the paged form; Su et al. 2021 (arXiv:2104.09864) for the rotation.
    """
    plain = type(cache_seqlens) is int and block_table is None and rotary_cos is None and rotary_sin is None
    plain = plain and window is None and softcap == 0.0 and alibi_slopes is None and sinks is None and not return_lse
    if plain and not torch.compiler.is_compiling() and dispatch.takes_cpu(backend):
        # A decoding step; should it be declined, nothing was written.
        out = one_token_if_plain(query, key_cache, value_cache, key, value, cache_seqlens, scale)
        if out is not None:
            return out
    call = _prepare(
        query, key_cache, value_cache, key, value, cache_seqlens=cache_seqlens, block_table=block_table,
        rotary_cos=rotary_cos, rotary_sin=rotary_sin, rotary_interleaved=rotary_interleaved, is_causal=is_causal,
        scale=scale, window=window, softcap=softcap, alibi_slopes=alibi_slopes, sinks=sinks,
    )  # fmt: skip
    out, lse = select("attention_with_kv_cache", call, backend).run(call)
    return (out, lse) if return_lse else out


def _prepare(
    query: Any,
    key_cache: Any,
    value_cache: Any,
    key: Any = None,
    value: Any = None,
    *,
    cache_seqlens: int | Tensor,
    block_table: Any = None,
    rotary_cos: Any = None,
    rotary_sin: Any = None,
    rotary_interleaved: bool = False,
    is_causal: bool = True,
    scale: float | None = None,
    window: tuple[int, int] | None = None,
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    sinks: Any = None,
    return_lse: bool = False,
) -> KvCacheCall:
    op = "attention_with_kv_cache"
    names = "query", "key_cache", "value_cache"
    checks.operands(op, query, key_cache, value_cache, names)
    checks.flag(op, "is_causal", is_causal)
    checks.flag(op, "rotary_interleaved", rotary_interleaved)
    if checks.autocast_is_on(query.device):
        raise NotImplementedError(f"{op}: it writes into caches of a fixed dtype; call it outside torch.autocast.")
    checks.heads_and_dims(
        op, query, key_cache, value_cache, "(batch, seqlen, heads, head_dim)", heads_dim=2, names=names
    )
    _check_caches(op, query, key_cache, value_cache, block_table)
    _check_new(op, query, key_cache, value_cache, key, value)
    cache_seqlens = _checked_lengths(op, query, cache_seqlens)
    rotary = _checked_rotary(op, query, rotary_cos, rotary_sin)
    heads, head_dim = query.shape[2:]
    scale, left, right = checks.options(op, head_dim, 0.0, scale, softcap, window, "bottom_right")
    if alibi_slopes is not None:
        alibi_slopes = checks.alibi_slopes(op, alibi_slopes, query, (query.shape[0], heads))
    if sinks is not None:
        sinks = checks.sinks(op, sinks, query, heads)
    differentiable = (query, key_cache, value_cache, key, value, alibi_slopes, sinks, *(rotary or ()))
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in differentiable):
        raise NotImplementedError(f"{op}: it has no gradients; call it under torch.no_grad().")
    return KvCacheCall(
        query, key_cache, value_cache, key, value, cache_seqlens, block_table, rotary, bool(rotary_interleaved),
        alibi_slopes, sinks, bool(is_causal), scale, left, right, float(softcap),
    )  # fmt: skip


def _check_caches(op: str, query: Tensor, key_cache: Tensor, value_cache: Tensor, block_table: Any) -> None:
    batch = query.shape[0]
    if key_cache.shape[:2] != value_cache.shape[:2]:
        raise ValueError(
            f"{op}: key_cache {tuple(key_cache.shape)} and value_cache {tuple(value_cache.shape)} must agree in their "
            "first two dims."
        )
    if block_table is None and key_cache.shape[0] != batch:
        raise ValueError(
            f"{op}: query has batch {batch} but key_cache has {key_cache.shape[0]}; they must be equal, "
            "or block_table must be given."
        )
    if block_table is not None:
        checks.integers_on_device(op, "block_table", block_table, query)
        if block_table.dim() != 2 or block_table.shape[0] != batch:
            raise ValueError(
                f"{op}: block_table must be (batch, blocks_per_sequence) with batch {batch}, "
                f"got shape {tuple(block_table.shape)}."
            )


def _checked_lengths(op: str, query: Tensor, cache_seqlens: Any) -> int | Tensor:
    batch = query.shape[0]
    if isinstance(cache_seqlens, Tensor):
        checks.integers_on_device(op, "cache_seqlens", cache_seqlens, query)
        if cache_seqlens.shape != (batch,):
            raise ValueError(
                f"{op}: cache_seqlens must be an int or (batch,) = ({batch},), got shape {tuple(cache_seqlens.shape)}."
            )
        return cache_seqlens
    length = checks.whole_number(cache_seqlens)
    if length is None:
        raise TypeError(f"{op}: cache_seqlens must be an int or a Tensor, got {type(cache_seqlens).__name__}.")
    if not -(2**63) <= length < 2**63:
        raise ValueError(f"{op}: cache_seqlens must be below 2^63, and is {length}.")
    return length  # type: ignore[no-any-return]


def _check_new(op: str, query: Tensor, key_cache: Tensor, value_cache: Tensor, key: Any, value: Any) -> None:
    if key is None and value is None:
        return
    for name, new, cache in (("key", key, key_cache), ("value", value, value_cache)):
        if not isinstance(new, Tensor):
            raise TypeError(f"{op}: key and value must be given together, or neither; {name} is {type(new).__name__}.")
        check_dense(op, name, new)
        if new.dtype != cache.dtype or new.device != cache.device:
            raise TypeError(
                f"{op}: {name} must be {checks.name_of(cache.dtype)} on {cache.device}, like its cache, "
                f"got {checks.name_of(new.dtype)} on {new.device}."
            )
        if new.dim() != 4 or new.shape[0] != query.shape[0] or new.shape[2:] != cache.shape[2:]:
            raise ValueError(
                f"{op}: {name} must be (batch, seqlen_new, heads_kv, head_dim) = ({query.shape[0]}, seqlen_new, "
                f"{cache.shape[2]}, {cache.shape[3]}), got shape {tuple(new.shape)}."
            )
        if any(stride == 0 and size > 1 for stride, size in zip(cache.stride(), cache.shape, strict=True)):
            raise ValueError(
                f"{op}: {name}_cache, into which {name} is written, has elements that share memory, as expand() makes "
                f"them: shape {tuple(cache.shape)}, strides {cache.stride()}; clone it, or use a block_table."
            )
    if key.shape[1] != value.shape[1]:
        raise ValueError(f"{op}: key has {key.shape[1]} new tokens but value has {value.shape[1]}; they must be equal.")


def _checked_rotary(op: str, query: Tensor, cos: Any, sin: Any) -> tuple[Tensor, Tensor] | None:
    if cos is None and sin is None:
        return None
    if not (isinstance(cos, Tensor) and isinstance(sin, Tensor)):
        raise TypeError(f"{op}: rotary_cos and rotary_sin must be Tensors and be given together.")
    check_dense(op, "rotary_cos", cos)
    check_dense(op, "rotary_sin", sin)
    if not (cos.is_floating_point() and sin.is_floating_point()):
        raise TypeError(
            f"{op}: rotary_cos and rotary_sin must be floating, got {checks.name_of(cos.dtype)} and "
            f"{checks.name_of(sin.dtype)}."
        )
    if cos.shape != sin.shape or cos.dim() != 2 or 2 * cos.shape[1] > query.shape[3]:
        raise ValueError(
            f"{op}: rotary_cos and rotary_sin must be (positions, rotary_dim / 2) with rotary_dim <= head_dim "
            f"{query.shape[3]}, got shapes {tuple(cos.shape)} and {tuple(sin.shape)}."
        )
    if cos.device != query.device or sin.device != query.device:
        raise ValueError(f"{op}: rotary_cos and rotary_sin must be on {query.device}, as query is.")
    return cos, sin


# --- Lengths and tables: checked by value on the CPU, clamped into the cache elsewhere --------------------------------


@torch.library.custom_op("fastattn::kv_cache_positions", mutates_args=())
def kv_cache_positions(
    cache_seqlens: Tensor, block_table: Tensor | None, new: int, rotated: int, capacity: int, block_size: int,
    blocks: int, positions: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(lengths (batch,), table), int64 and inside the cache; without a block_table the table has no elements.

    Args:
        new, rotated: how many tokens are appended, and how many positions from the old length on are rotated.
        capacity: tokens that a sequence's part of the cache can hold.
        positions: rows of the rotation's tables, or -1 if there is no rotation.
    """
    lengths = cache_seqlens.long().clone()
    table = block_table.long().clone() if block_table is not None else lengths.new_empty(0)
    if lengths.device.type == "cpu":
        shape = (blocks, block_size)
        checks.cache_values("attention_with_kv_cache", lengths, block_table, new, rotated, capacity, shape, positions)
    return lengths.clamp(0, max(capacity - new, 0)), table.clamp(0, max(blocks - 1, 0))


@kv_cache_positions.register_fake
def _(cache_seqlens, block_table, new, rotated, capacity, block_size, blocks, positions):
    table = block_table if block_table is not None else cache_seqlens.new_empty(0)
    return torch.empty_like(cache_seqlens, dtype=torch.int64), torch.empty_like(table, dtype=torch.int64)


def _rotate(x: Tensor, first: int | Tensor, rotary: tuple[Tensor, Tensor], interleaved: bool) -> Tensor:
    """Rotates x (batch, seqlen, heads, head_dim), whose row i is at position ``first + i``; first may be (batch, 1)."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    position = torch.atleast_2d(first + torch.arange(x.shape[1], device=x.device))
    cos, sin = (t.to(dtype)[position.clamp(max=t.shape[0] - 1)][:, :, None, :] for t in rotary)
    rotary_dim = 2 * cos.shape[-1]
    rotated, rest = x[..., :rotary_dim].to(dtype), x[..., rotary_dim:]
    pair_dim = -1 if interleaved else -2
    a, b = rotated.unflatten(-1, (-1, 2) if interleaved else (2, -1)).unbind(pair_dim)
    rotated = torch.stack((a * cos - b * sin, a * sin + b * cos), dim=pair_dim).flatten(-2)
    return torch.cat((rotated.to(x.dtype), rest), dim=-1)


# --- One step --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _step(call: KvCacheCall, attend: Callable[[AttentionCall], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    query, key_cache, value_cache, new_key, new_value = call[:5]
    lengths: Any = call.cache_seqlens
    table = call.block_table
    batch, seqlen_q = query.shape[:2]
    new = 0 if new_key is None else new_key.shape[1]
    if new == 0:
        new_key = new_value = None
    block_size, blocks = key_cache.shape[1], key_cache.shape[0]
    paged, one_length = table is not None, not isinstance(lengths, Tensor)
    capacity = call.capacity
    positions = -1 if call.rotary is None else call.rotary[0].shape[0]
    rotated = max(new, seqlen_q)
    if one_length:
        checks.cache_length("attention_with_kv_cache", lengths, new, rotated, capacity, positions)
    if paged or not one_length:
        each = torch.full((batch,), lengths, device=query.device) if one_length else lengths
        each, table = kv_cache_positions(each, table, new, rotated, capacity, block_size, blocks, positions)
        lengths = lengths if one_length else each[:, None]

    if call.rotary is not None:
        query = _rotate(query, lengths, call.rotary, call.rotary_interleaved)
        if new_key is not None:
            new_key = _rotate(new_key, lengths, call.rotary, call.rotary_interleaved)
    if new_key is not None and new_value is not None:
        _append(key_cache, new_key, lengths, table if paged else None)
        _append(value_cache, new_value, lengths, table if paged else None)

    if paged:
        key_cache, value_cache = key_cache[table].flatten(1, 2), value_cache[table].flatten(1, 2)
    padded = AttentionCall(
        query.transpose(1, 2), key_cache.transpose(1, 2), value_cache.transpose(1, 2), None, call.alibi_slopes,
        call.sinks, None, 0.0, call.is_causal, call.scale, call.window_left, call.window_right, True, call.softcap,
    )  # fmt: skip
    total = lengths + new
    if one_length:
        padded = padded._replace(key=padded.key[:, :, :total], value=padded.value[:, :, :total])
    else:
        exists = torch.arange(capacity, device=query.device) < total
        # 0 * NaN is NaN, so what lies past the end must not even meet a probability of 0.
        empty = ~exists[:, None, :, None]
        padded = padded._replace(key=padded.key.masked_fill(empty, 0.0), value=padded.value.masked_fill(empty, 0.0))
        padded = with_diagonals(padded, exists[:, None, None, :], total[:, 0] - seqlen_q)
    out, lse = attend(padded)
    return out.transpose(1, 2), lse


def _append(cache: Tensor, rows: Tensor, lengths: int | Tensor, table: Tensor | None) -> None:
    """Writes ``rows`` (batch, seqlen_new, heads, head_dim) behind the first ``lengths`` (int or (batch, 1)) tokens."""
    batch, new = rows.shape[:2]
    if table is None and not isinstance(lengths, Tensor):
        cache[:, lengths : lengths + new] = rows
        return
    token = (lengths + torch.arange(new, device=rows.device)).expand(batch, new)
    if table is None:
        cache.index_put_((torch.arange(batch, device=rows.device)[:, None], token), rows)
    else:
        cache.index_put_((table.gather(1, token // cache.shape[1]), token % cache.shape[1]), rows)


# --- The table -------------------------------------------------------------------------------------------------------


def _refuses_cpu(call: Any) -> str | None:
    if max(call.capacity, call.key.shape[0]) > _MOST_ON_CPU:
        return f"the cache has room for {call.capacity} tokens in {call.key.shape[0]} blocks; both must be below 2^31"
    return compiled.refuses_cpu(call)


def _run_cpu(call: KvCacheCall) -> tuple[Tensor, Tensor]:
    slopes = call.alibi_slopes
    if slopes is not None and slopes.dtype == call.query.dtype == torch.float64:
        # The kernels read float32 slopes. Rounded to them, float64 results would be no better than float32's.
        return _step(call, attend=compiled.run)
    return compiled.run_with_kv_cache(call)


# The kernels append and rotate in one pass and read keys and values where they are; eager prepares them.
_CUDA, _EMULATED = cuda_kernels(compiled.refuses_cuda, compiled.run_with_kv_cache, compiled.kernels_with_kv_cache)
dispatch.register(
    "attention_with_kv_cache",
    _CUDA,
    Kernel("triton", refuses_kv_cache_triton, run_kv_cache_triton),
    Kernel("cpu", _refuses_cpu, _run_cpu),
    Kernel("eager", never_refuses, partial(_step, attend=run_eager)),
    _EMULATED,
    prepare=_prepare,
)
