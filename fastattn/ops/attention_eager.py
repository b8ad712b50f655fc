"""Attention in plain PyTorch, with PyTorch's own autograd: the definition of correct that kernels are tested against.

Takes the arguments of ``torch.ops.fastattn.attention`` (csrc/ops.cpp), already checked. Everything is computed in
float32, or in float64 for float64 inputs, and the outputs are rounded once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.ops.philox import dropout_mask

_NEGATIVE_INFINITY = float("-inf")


def positions(query: Tensor, key: Tensor, bottom_right: bool) -> Tensor:
    """(seqlen_q, seqlen_k): how far key j lies to the right of the key at which query i stands."""
    seqlen_q, seqlen_k = query.shape[-2], key.shape[-2]
    diagonal = seqlen_k - seqlen_q if bottom_right else 0
    rows = torch.arange(seqlen_q, device=query.device)[:, None]
    return torch.arange(seqlen_k, device=query.device) - rows - diagonal


def scores(
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None,
    alibi_slopes: Tensor | None,
    is_causal: bool,
    scale: float,
    window_left: int,
    window_right: int,
    bottom_right: bool,
    softcap: float,
) -> Tensor:
    """(batch, heads, seqlen_q, seqlen_k), -inf where a query may not attend."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    key = key.repeat_interleave(query.shape[1] // max(key.shape[1], 1), dim=1)
    score = scale * (query.to(dtype) @ key.to(dtype).mT)
    if softcap > 0:
        score = softcap * torch.tanh(score / softcap)
    offset = positions(query, key, bottom_right)
    if alibi_slopes is not None:
        score = score - alibi_slopes.to(dtype)[..., None, None] * offset.abs()
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        score = score + attn_mask.to(dtype)
    elif attn_mask is not None:
        score = score.masked_fill(~attn_mask, _NEGATIVE_INFINITY)
    if is_causal:
        score = score.masked_fill(offset > 0, _NEGATIVE_INFINITY)
    if window_left >= 0:
        score = score.masked_fill(offset < -window_left, _NEGATIVE_INFINITY)
    if window_right >= 0:
        score = score.masked_fill(offset > window_right, _NEGATIVE_INFINITY)
    return score


def attention_eager(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    rng_state: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float,
    window_left: int,
    window_right: int,
    bottom_right: bool,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """(out, lse): (batch, heads, seqlen_q, head_dim_v) in query's dtype, and (batch, heads, seqlen_q)."""
    score = scores(
        query, key, attn_mask, alibi_slopes, is_causal, scale, window_left, window_right, bottom_right, softcap
    )
    logits = score
    if sinks is not None:
        sink = sinks.to(score.dtype)[:, None, None].expand(*score.shape[:-1], 1)
        logits = torch.cat((score, sink), dim=-1)
    # A row of -inf has neither a softmax nor a gradient: it is computed as a row of 0 and then overwritten.
    empty = (logits == _NEGATIVE_INFINITY).all(dim=-1, keepdim=True)
    logits = logits.masked_fill(empty, 0.0)
    lse = torch.logsumexp(logits, dim=-1).masked_fill(empty.squeeze(-1), _NEGATIVE_INFINITY)
    weights = torch.softmax(logits, dim=-1)[..., : score.shape[-1]].masked_fill(empty, 0.0)
    weights = _dropout(weights, rng_state, dropout_p)
    value = value.to(score.dtype).repeat_interleave(query.shape[1] // max(value.shape[1], 1), dim=1)
    return (weights @ value).to(query.dtype), lse


def attention_weights_eager(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    attn_mask: Tensor | None,
    alibi_slopes: Tensor | None,
    rng_state: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float,
    window_left: int,
    window_right: int,
    bottom_right: bool,
    softcap: float,
    average_heads: bool,
) -> Tensor:
    """The probabilities after dropout, (batch, heads, seqlen_q, seqlen_k), or their mean over the heads."""
    score = scores(
        query, key, attn_mask, alibi_slopes, is_causal, scale, window_left, window_right, bottom_right, softcap
    )
    # A row with lse = -inf has only -inf scores: taking 0 for its lse gives exp(-inf) = 0 instead of NaN.
    weights = torch.exp(score - lse.masked_fill(lse == _NEGATIVE_INFINITY, 0.0)[..., None])
    weights = _dropout(weights, rng_state, dropout_p)
    return (weights.mean(dim=1) if average_heads else weights).to(query.dtype)


def _dropout(weights: Tensor, rng_state: Tensor | None, dropout_p: float) -> Tensor:
    if rng_state is None:
        return weights
    batch, heads, seqlen_q, seqlen_k = weights.shape
    kept = dropout_mask(rng_state, batch, heads, seqlen_q, seqlen_k, dropout_p)
    return weights.masked_fill(~kept, 0.0) * (1.0 / (1.0 - dropout_p) if dropout_p < 1 else 0.0)
