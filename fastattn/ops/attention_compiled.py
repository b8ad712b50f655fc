"""The face of ``torch.ops.fastattn.attention*``: what its kernels refuse, how to call them, their fake kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastattn._extension import extension, short_way
from fastattn.dispatch import refuses_device
from fastattn.ops.attention_eager import positions
from fastattn.ops.calls import AttentionCall, KvCacheCall, VarlenCall

_CPU_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16, torch.float64})
_CUDA_DTYPES = frozenset({torch.bfloat16, torch.float16})
_MAX_HEAD_DIM = 256


def refuses_cpu(call: AttentionCall | KvCacheCall) -> str | None:
    """Why the CPU kernels do not run ``call``; None if they do."""
    query = call.query
    if not query.is_cpu:
        return f"query is on {query.device}, not on the cpu"
    if query.dtype not in _CPU_DTYPES:
        return f"dtype {_name(query.dtype)} is not float32, bfloat16, float16 or float64"
    return refuses_kernels(call)


def refuses_cuda(call: AttentionCall, device_type: str) -> str | None:
    """Why the CUDA kernels do not run ``call``; None if they do."""
    reason = refuses_device("query", call.query, device_type)
    if reason is not None:
        return reason
    if call.query.dtype not in _CUDA_DTYPES:
        return f"dtype {_name(call.query.dtype)} is not bfloat16 or float16"
    return refuses_kernels(call)


def refuses_kernels(call: AttentionCall | KvCacheCall) -> str | None:
    """What every fused kernel refuses, Triton's as well."""
    head_dim, head_dim_v, alibi_slopes = call.query.shape[-1], call.value.shape[-1], call.alibi_slopes
    if head_dim > _MAX_HEAD_DIM or not 0 < head_dim_v <= _MAX_HEAD_DIM:
        return f"head_dim {head_dim} (value: {head_dim_v}) is not in 1 to {_MAX_HEAD_DIM}"
    if alibi_slopes is not None and alibi_slopes.requires_grad and torch.is_grad_enabled():
        return "alibi_slopes requires grad, and its kernels give no gradient to slopes; pass alibi_slopes.detach()"
    return None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _with_float32_slopes(call: AttentionCall) -> AttentionCall:
    """Kernels read float32 slopes. Slopes that this would round for float64 operands become part of the mask."""
    slopes, mask = call.alibi_slopes, call.attn_mask
    if slopes is None:
        return call
    if slopes.dtype != torch.float64 or call.query.dtype != torch.float64:
        return call._replace(alibi_slopes=slopes.float())
    bias = -slopes[..., None, None] * positions(call.query, call.key, call.bottom_right).abs()
    if mask is not None:
        bias = torch.where(mask, bias, float("-inf")) if mask.dtype == torch.bool else bias + mask
    return call._replace(attn_mask=bias, alibi_slopes=None)


def run(call: AttentionCall) -> tuple[Tensor, Tensor]:
    call = _with_float32_slopes(call)
    return torch.ops.fastattn.attention(*call)


def run_varlen(call: VarlenCall) -> tuple[Tensor, Tensor]:
    if call.alibi_slopes is not None:
        call = call._replace(alibi_slopes=call.alibi_slopes.float())
    return torch.ops.fastattn.varlen_attention(*call)


def kv_cache_arguments(call: KvCacheCall) -> tuple[Any, ...]:
    """As the schema of attention_with_kv_cache has them (csrc/ops.cpp)."""
    lengths, cos_and_sin, slopes = call.cache_seqlens, call.rotary or (None, None), call.alibi_slopes
    each, one = (lengths, 0) if isinstance(lengths, Tensor) else (None, lengths)
    return (
        *call[:5], each, one, call.block_table, *cos_and_sin, call.rotary_interleaved,
        None if slopes is None else slopes.float(), call.sinks, call.is_causal, call.scale, call.window_left,
        call.window_right, call.softcap,
    )  # fmt: skip


@torch.no_grad()
def run_with_kv_cache(call: KvCacheCall) -> tuple[Tensor, Tensor]:
    """Appends, rotates and attends without a copy of the cache."""
    return torch.ops.fastattn.attention_with_kv_cache(*kv_cache_arguments(call))


@torch.no_grad()
def kernels_with_kv_cache(call: KvCacheCall) -> str:
    """Which family of CUDA kernels `run_with_kv_cache` would start; empty where the card has one."""
    return torch.ops.fastattn.attention_with_kv_cache_kernels(*kv_cache_arguments(call))


def run_weights(call: AttentionCall, lse: Tensor, average_heads: bool) -> Tensor:
    call = _with_float32_slopes(call)
    return torch.ops.fastattn.attention_weights(
        call.query, call.key, lse, call.attn_mask, call.alibi_slopes, *call[6:], average_heads
    )


# (query, key, value, is_causal, scale, enable_gqa): attention of plain tensors on the CPU without the general way's
# checks; None where the call is not one of these, which then says why.
attention_if_plain: Callable[..., Tensor | None] = short_way("attention_if_plain")
# (query, key_cache, value_cache, key, value, cache_seqlen, scale): the same for a decoding step, which it appends.
one_token_if_plain: Callable[..., Tensor | None] = short_way("one_token_if_plain")


# --- Fake kernels: the shapes, dtypes and strides of csrc/attention/attention.cpp ------------------------------------


def empty_rows(like: Tensor, head_dim: int) -> Tensor:
    """(batch, heads, seqlen, head_dim), with the heads inside the rows if ``like`` has them so."""
    batch, heads, seqlen, _ = like.shape
    if like.stride(1) < like.stride(2):
        return like.new_empty(batch, seqlen, heads, head_dim).transpose(1, 2)
    return like.new_empty(batch, heads, seqlen, head_dim)


def _empty_packed_rows(like: Tensor, head_dim: int) -> Tensor:
    """(total, heads, head_dim), laid out as the same rows of a dense batch would be."""
    return empty_rows(like.transpose(0, 1)[None], head_dim)[0].transpose(0, 1)


def _statistics_dtype(query: Tensor) -> torch.dtype:
    return torch.float64 if query.dtype == torch.float64 else torch.float32


if extension is not None:

    @torch.library.register_fake("fastattn::attention")
    def _(query, key, value, attn_mask, alibi_slopes, sinks, rng_state, dropout_p, is_causal, scale, window_left,
          window_right, bottom_right, softcap):  # fmt: skip
        lse = query.new_empty(query.shape[:3], dtype=_statistics_dtype(query))
        return empty_rows(query, value.shape[3]), lse

    @torch.library.register_fake("fastattn::attention_backward")
    def _(dout, dlse, query, key, value, out, lse, attn_mask, alibi_slopes, sinks, rng_state, dropout_p, is_causal,
          scale, window_left, window_right, bottom_right, softcap, need_dmask, need_dsinks):  # fmt: skip
        dmask = attn_mask.new_empty(attn_mask.shape) if need_dmask else query.new_empty(0)
        dsinks = sinks.new_empty(sinks.shape) if need_dsinks else query.new_empty(0)
        dk, dv = empty_rows(key, key.shape[3]), empty_rows(value, value.shape[3])
        return empty_rows(query, query.shape[3]), dk, dv, dmask, dsinks

    @torch.library.register_fake("fastattn::varlen_attention")
    def _(query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, alibi_slopes, sinks, rng_state,
          dropout_p, is_causal, scale, window_left, window_right, bottom_right, softcap):  # fmt: skip
        lse = query.new_empty(query.shape[1], query.shape[0], dtype=_statistics_dtype(query))
        return _empty_packed_rows(query, value.shape[2]), lse

    @torch.library.register_fake("fastattn::varlen_attention_backward")
    def _(dout, dlse, query, key, value, out, lse, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
          alibi_slopes, sinks, rng_state, dropout_p, is_causal, scale, window_left, window_right, bottom_right, softcap,
          need_dsinks):  # fmt: skip
        dsinks = sinks.new_empty(sinks.shape) if need_dsinks else query.new_empty(0)
        return *(_empty_packed_rows(x, x.shape[2]) for x in (query, key, value)), dsinks

    @torch.library.register_fake("fastattn::attention_with_kv_cache")
    def _(query, key_cache, value_cache, key, value, cache_seqlens, cache_seqlen, block_table, rotary_cos, rotary_sin,
          rotary_interleaved, alibi_slopes, sinks, is_causal, scale, window_left, window_right, softcap):  # fmt: skip
        like = query if rotary_cos is None else query.new_empty(query.shape)
        batch, seqlen_q, heads, _ = query.shape
        lse = query.new_empty((batch, heads, seqlen_q), dtype=_statistics_dtype(query))
        return empty_rows(like.transpose(1, 2), value_cache.shape[3]).transpose(1, 2), lse

    @torch.library.register_fake("fastattn::attention_weights")
    def _(query, key, lse, attn_mask, alibi_slopes, rng_state, dropout_p, is_causal, scale, window_left, window_right,
          bottom_right, softcap, average_heads):  # fmt: skip
        batch, heads, seqlen_q, _ = query.shape
        shape = (batch, seqlen_q) if average_heads else (batch, heads, seqlen_q)
        return query.new_empty(*shape, key.shape[2])
