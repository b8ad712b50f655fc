"""What the kernels of an op are called with: arguments that are checked, and have their final form.

The public functions make these; dispatch shows them to each backend's ``refuses`` and hands them to its ``run``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class AttentionCall(NamedTuple):
    """One checked call, in the order of ``torch.ops.fastattn.attention``: what backends refuse or run."""

    query: Tensor  # (batch, heads, seqlen_q, head_dim)
    key: Tensor  # (batch, heads_kv, seqlen_k, head_dim)
    value: Tensor  # (batch, heads_kv, seqlen_k, head_dim_v)
    attn_mask: Tensor | None
    alibi_slopes: Tensor | None
    sinks: Tensor | None
    rng_state: Tensor | None  # drawn when a backend is chosen, so that explain draws nothing
    dropout_p: float
    is_causal: bool
    scale: float
    window_left: int
    window_right: int
    bottom_right: bool
    softcap: float


class VarlenCall(NamedTuple):
    """One checked call of ``varlen_attention``; from ``alibi_slopes`` on as in `AttentionCall`."""

    query: Tensor  # (total_q, heads, head_dim)
    key: Tensor
    value: Tensor
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    alibi_slopes: Tensor | None
    sinks: Tensor | None
    rng_state: Tensor | None
    dropout_p: float
    is_causal: bool
    scale: float
    window_left: int
    window_right: int
    bottom_right: bool
    softcap: float


class KvCacheCall(NamedTuple):
    """One checked call of ``attention_with_kv_cache``; ``key`` and ``value`` are the caches."""

    query: Tensor  # (batch, seqlen_q, heads, head_dim)
    key: Tensor  # (batch, seqlen_cache, heads_kv, head_dim), or paged (blocks, block_size, heads_kv, head_dim)
    value: Tensor
    new_key: Tensor | None  # (batch, seqlen_new, heads_kv, head_dim)
    new_value: Tensor | None
    cache_seqlens: int | Tensor
    block_table: Tensor | None
    rotary: tuple[Tensor, Tensor] | None
    rotary_interleaved: bool
    alibi_slopes: Tensor | None
    sinks: Tensor | None
    is_causal: bool
    scale: float
    window_left: int
    window_right: int
    softcap: float

    @property
    def capacity(self) -> int:
        """Tokens that a sequence's part of the cache can hold."""
        return self.key.shape[1] * (1 if self.block_table is None else self.block_table.shape[1])


class LayerNormCall(NamedTuple):
    """A call of one of the four functions, its meaning checked."""

    op: str
    input: Tensor
    residual: Tensor | None  # add_* only
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    dropout_p: float
    normalized_dims: int
    rms: bool


class QuantizeInt8Call(NamedTuple):
    input: Tensor


class Int8MatmulCall(NamedTuple):
    a: Tensor
    b: Tensor
    a_scale: Tensor
    b_scale: Tensor
    bias: Tensor | None
    activation: str
    out_dtype: torch.dtype


class Int8LinearCall(NamedTuple):
    input: Tensor
    weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None
    activation: str
    packed: Tensor | None = None  # compiled.pack_weight(weight), kept by Int8Linear
