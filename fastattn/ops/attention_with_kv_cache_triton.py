"""Attention to a key/value cache on Triton: the op around the kernels, which append to the cache and read it in place.

``fastattn::attention_with_kv_cache_triton`` has the schema of the op without the suffix (csrc/ops.cpp). Lengths and
tables stay on the device; where that is the CPU (the interpreter), their values are checked before anything is written.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn.ops import attention_checks as checks
from fastattn.ops.attention_compiled import kv_cache_arguments
from fastattn.ops.attention_triton import refuses_triton
from fastattn.ops.calls import KvCacheCall
from fastattn.ops.triton_launch import neighbours

_OP = "attention_with_kv_cache"
# Positions, and sums of a few of them, are 32-bit numbers.
_MAX_CAPACITY = 2**28


def refuses_kv_cache_triton(call: KvCacheCall) -> str | None:
    """Why the Triton kernels do not run ``call``; None if they do."""
    reason = refuses_triton(call)
    if reason is not None:
        return reason
    if call.capacity <= _MAX_CAPACITY:
        return None
    return f"the cache has room for {call.capacity} tokens a sequence, above 2^28"


def run_kv_cache_triton(call: KvCacheCall) -> tuple[Tensor, Tensor]:
    return torch.ops.fastattn.attention_with_kv_cache_triton(*kv_cache_arguments(call))


# --- The op ----------------------------------------------------------------------------------------------------------

_library = torch.library.Library("fastattn", "FRAGMENT")
_library.define(
    "attention_with_kv_cache_triton(Tensor query, Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor? key, "
    "Tensor? value, Tensor? cache_seqlens, SymInt cache_seqlen, Tensor? block_table, Tensor? rotary_cos, "
    "Tensor? rotary_sin, bool rotary_interleaved, Tensor? alibi_slopes, Tensor? sinks, bool is_causal, float scale, "
    "SymInt window_left, SymInt window_right, float softcap) -> (Tensor out, Tensor lse)"
)


def _attend(query: Tensor, key_cache: Tensor, value_cache: Tensor, key: Tensor | None, value: Tensor | None,
            cache_seqlens: Tensor | None, cache_seqlen: int, block_table: Tensor | None, rotary_cos: Tensor | None,
            rotary_sin: Tensor | None, rotary_interleaved: bool, alibi_slopes: Tensor | None, sinks: Tensor | None,
            *scoring: Any) -> tuple[Tensor, Tensor]:  # fmt: skip
    from fastattn.ops import attention_with_kv_cache_triton_plan as plan

    appended = 0 if key is None else key.shape[1]
    cache = plan.Cache(key_cache, value_cache, cache_seqlens, cache_seqlen, appended, block_table)
    positions = -1 if rotary_cos is None else rotary_cos.shape[0]
    rotated = max(appended, query.shape[1])
    if cache_seqlens is None and query.shape[0] > 0:
        checks.cache_length(_OP, cache_seqlen, appended, rotated, cache.capacity, positions)
    if query.is_cpu:
        lengths = query.new_full(query.shape[:1], cache_seqlen, dtype=torch.int64)
        lengths = lengths if cache_seqlens is None else cache_seqlens
        checks.cache_values(_OP, lengths, block_table, appended, rotated, cache.capacity, key_cache.shape, positions)
    elif appended > cache.capacity:
        raise ValueError(f"{_OP}: {appended} new tokens exceed the cache, which holds {cache.capacity}.")

    out = query.new_empty(*query.shape[:3], value_cache.shape[3])
    lse = query.new_empty(query.shape[0], query.shape[2], query.shape[1], dtype=torch.float32)
    cache = cache._replace(key=neighbours(key_cache), value=neighbours(value_cache))
    angles = None
    if rotary_cos is not None and rotary_sin is not None:
        angles = plan.Rotation(_angles(rotary_cos), _angles(rotary_sin), rotary_interleaved)
    fresh = None if key is None or value is None or appended == 0 else (neighbours(key), neighbours(value))
    query = neighbours(query)
    plan.run_step(query, fresh, cache, angles, out, lse, plan.Scores(alibi_slopes, sinks, *scoring))
    for caller, written in ((key_cache, cache.key), (value_cache, cache.value)):
        if written is not caller and fresh is not None:
            caller.copy_(written)
    return out, lse


def _angles(angles: Tensor) -> Tensor:
    """cos or sin, in a dtype that the kernel reads."""
    return neighbours(angles.float() if angles.dtype == torch.float64 else angles)


for _key in ("CUDA", "CPU"):
    _library.impl("attention_with_kv_cache_triton", _attend, _key)


@torch.library.register_fake("fastattn::attention_with_kv_cache_triton", lib=_library)
def _(query, key_cache, value_cache, *others):
    batch, seqlen_q, heads, _ = query.shape
    lse = query.new_empty((batch, heads, seqlen_q), dtype=torch.float32)
    return query.new_empty((batch, seqlen_q, heads, value_cache.shape[3])), lse
