"""PyTorch's counter of floating-point operations over fastattn's ops::

    fastattn.integrations.flop_counter.register()
    with torch.utils.flop_counter.FlopCounterMode() as counter:
        model(input).sum().backward()

Without ``register`` it passes over them, as over every op for which it has no formula, and counts ``eager`` only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor


def register() -> None:
    """Gives ``torch.utils.flop_counter`` the formulas of fastattn's ops, for counters made from here on.

    A multiply-add counts as two operations, of integers too. As in torch's formulas for its own kernels, attention
    counts every query with every key, whatever masks, causality and windows hide, and its backward pass counts the five
    products of "FlashAttention-2" (arXiv:2307.08691), algorithm 2, whatever a kernel computes once more. Packed
    sequences and caches count the keys that they have; where lengths cannot be read (fake tensors), the most there may
    be. Norms and quantisation count nothing, nor do they in torch.
    """
    from torch.utils import flop_counter

    for name, formula in _FORMULAS.items():
        op = getattr(torch.ops.fastattn, name, None)  # those that are compiled may be missing
        if op is not None and op not in flop_counter.flop_registry:
            flop_counter.register_flop_formula(op, get_raw=True)(formula)


# --- Attention: operations of each pair of a query and a key, in one head ---------------------------------------------


def _forward(query: Tensor, value: Tensor) -> int:
    return 2 * (query.shape[-1] + value.shape[-1])


def _backward(query: Tensor, value: Tensor) -> int:
    # The scores again, dq and dk; the gradient of the probabilities, dv.
    return 2 * (3 * query.shape[-1] + 2 * value.shape[-1])


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return _pairs(query, key) * _forward(query, value)


def _attention_backward(dout: Tensor, dlse: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return _pairs(query, key) * _backward(query, value)


def _attention_weights(query: Tensor, key: Tensor, *_: Any, **__: Any) -> int:
    return _pairs(query, key) * 2 * query.shape[-1]


def _pairs(query: Tensor, key: Tensor) -> int:
    return query.shape[:-1].numel() * key.shape[-2]


def _varlen_attention(query: Tensor, key: Tensor, value: Tensor, *lengths: Any, **_: Any) -> int:
    return _packed_pairs(query, *lengths[:4]) * _forward(query, value)


def _varlen_attention_backward(
    dout: Tensor, dlse: Any, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, *lengths: Any,
    **_: Any,
) -> int:  # fmt: skip
    return _packed_pairs(query, *lengths[:4]) * _backward(query, value)


def _packed_pairs(
    query: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int
) -> int:
    lengths_q, lengths_k = (
        [longest] * (len(cu_seqlens) - 1) if _is_unreadable(cu_seqlens) else cu_seqlens.diff().tolist()
        for cu_seqlens, longest in ((cu_seqlens_q, max_seqlen_q), (cu_seqlens_k, max_seqlen_k))
    )
    return query.shape[1] * sum(q * k for q, k in zip(lengths_q, lengths_k, strict=True))


def _attention_with_kv_cache(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, key: Tensor | None, value: Tensor | None,
    cache_seqlens: Tensor | None, cache_seqlen: int, block_table: Tensor | None, *_: Any, **__: Any,
) -> int:  # fmt: skip
    batch, seqlen, heads, _head_dim = query.shape
    new = 0 if key is None else key.shape[1]
    if cache_seqlens is None:
        keys = batch * (cache_seqlen + new)
    elif _is_unreadable(cache_seqlens):
        keys = batch * key_cache.shape[1] * (1 if block_table is None else block_table.shape[1])
    else:
        keys = int(cache_seqlens.sum()) + batch * new
    return seqlen * heads * keys * _forward(query, value_cache)


def _is_unreadable(tensor: Tensor) -> bool:
    return isinstance(tensor, FakeTensor) or tensor.is_meta


# --- Matrix products -------------------------------------------------------------------------------------------------


def _linear(input: Tensor, weight: Tensor, *_: Any, **__: Any) -> int:
    """(..., K) by (N, K)."""
    return 2 * input.numel() * weight.shape[0]


def _linear_packed(input: Tensor, packed_weight: Tensor, weight: Tensor, *_: Any, **__: Any) -> int:
    return _linear(input, weight)


_FORMULAS: dict[str, Callable[..., int]] = {
    "attention": _attention,
    "attention_triton": _attention,
    "attention_backward": _attention_backward,
    "attention_triton_backward": _attention_backward,
    "attention_weights": _attention_weights,
    "attention_triton_weights": _attention_weights,
    "varlen_attention": _varlen_attention,
    "varlen_attention_triton": _varlen_attention,
    "varlen_attention_backward": _varlen_attention_backward,
    "varlen_attention_triton_backward": _varlen_attention_backward,
    "attention_with_kv_cache": _attention_with_kv_cache,
    "attention_with_kv_cache_triton": _attention_with_kv_cache,
    "linear": _linear,
    "int8_matmul": _linear,
    "int8_matmul_triton": _linear,
    "int8_linear": _linear,
    "int8_linear_triton": _linear,
    "int8_linear_packed": _linear_packed,
}
