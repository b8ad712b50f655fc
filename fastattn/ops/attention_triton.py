"""The face of attention's Triton kernels: what they refuse, their ops, fake kernels and gradients.

The ops ``fastattn::attention_triton``, ``…_backward`` and ``…_weights`` have the schemas of those without the suffix
(csrc/ops.cpp) and are defined here, in Python, so that they exist where the C++ extension was not built. Triton itself
is imported when one of them runs for the first time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastattn import _triton
from fastattn.ops import attention_triton_tiles as tiles
from fastattn.ops.attention_compiled import empty_rows, refuses_kernels
from fastattn.ops.calls import AttentionCall

# 128 rows of a tile, at 32-bit offsets.
MAX_STRIDE = 2**24
_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})


def refuses_triton(call: Any) -> str | None:
    """Why the Triton kernels do not run ``call``, an ``AttentionCall`` or one that becomes one; None if they do."""
    query = call.query
    reason = _triton.refuses_device(query, "query")
    if reason is not None:
        return reason
    if query.dtype not in _DTYPES:
        return f"dtype {str(query.dtype).removeprefix('torch.')} is not float32, bfloat16 or float16"
    return refuses_kernels(call)


def run_triton(call: AttentionCall) -> tuple[Tensor, Tensor]:
    if call.alibi_slopes is not None:
        call = call._replace(alibi_slopes=call.alibi_slopes.float())
    return torch.ops.fastattn.attention_triton(*call)


def run_weights_triton(call: AttentionCall, lse: Tensor, average_heads: bool) -> Tensor:
    slopes = None if call.alibi_slopes is None else call.alibi_slopes.float()
    return torch.ops.fastattn.attention_triton_weights(
        call.query, call.key, lse, call.attn_mask, slopes, *call[6:], average_heads
    )


# --- The ops ---------------------------------------------------------------------------------------------------------

_SCORING = (
    "Tensor? rng_state, float dropout_p, bool is_causal, float scale, SymInt window_left, SymInt window_right, "
    "bool bottom_right, float softcap"
)
_library = torch.library.Library("fastattn", "FRAGMENT")
_library.define(
    "attention_triton(Tensor query, Tensor key, Tensor value, Tensor? attn_mask, Tensor? alibi_slopes, Tensor? sinks, "
    f"{_SCORING}) -> (Tensor out, Tensor lse)"
)
_library.define(
    "attention_triton_backward(Tensor dout, Tensor? dlse, Tensor query, Tensor key, Tensor value, Tensor out, "
    f"Tensor lse, Tensor? attn_mask, Tensor? alibi_slopes, Tensor? sinks, {_SCORING}, bool need_dmask, "
    "bool need_dsinks) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dmask, Tensor dsinks)"
)
_library.define(
    "attention_triton_weights(Tensor query, Tensor key, Tensor lse, Tensor? attn_mask, Tensor? alibi_slopes, "
    f"{_SCORING}, bool average_heads) -> Tensor"
)


def rows_of(tensor: Tensor) -> Tensor:
    """Kernels read the elements of a row as neighbours, and rows at strides that keep a tile's offsets in 32 bits."""
    return tensor if tensor.stride(3) == 1 and tensor.stride(2) < MAX_STRIDE else tensor.contiguous()


def _addressable(mask: Tensor | None) -> Tensor | None:
    """As ``rows_of``, for both dims of a mask's tiles; of a dim of one place the stride is never used."""
    if mask is None:
        return None
    dims = zip(mask.shape[-2:], mask.stride()[-2:], strict=True)
    return mask.contiguous() if any(size > 1 and stride >= MAX_STRIDE for size, stride in dims) else mask


def _forward(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, alibi_slopes: Tensor | None,
             sinks: Tensor | None, *scoring: Any) -> tuple[Tensor, Tensor]:  # fmt: skip
    from fastattn.ops import attention_triton_plan as plan
    from fastattn.ops import attention_triton_tuning as tuning

    out, lse = empty_rows(query, value.shape[3]), query.new_empty(query.shape[:3], dtype=torch.float32)
    if lse.numel() > 0:
        call = plan.Scoring(_addressable(attn_mask), alibi_slopes, sinks, *scoring)
        states = tuning.mask_states(query, value, call.attn_mask)
        tuning.run(query, plan.plan_forward, rows_of(query), rows_of(key), rows_of(value), out, lse, call, states)
    return out, lse


def _backward(dout: Tensor, dlse: Tensor | None, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor,
              attn_mask: Tensor | None, alibi_slopes: Tensor | None, sinks: Tensor | None, *scoring: Any,
              ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    from fastattn.ops import attention_triton_plan as plan
    from fastattn.ops import attention_triton_tuning as tuning

    *scoring_values, need_dmask, need_dsinks = scoring
    learned_mask, learned_sinks = attn_mask if need_dmask else None, sinks if need_dsinks else None
    call = plan.Scoring(_addressable(attn_mask), alibi_slopes, sinks, *scoring_values)
    dq, dk, dv = (empty_rows(like, like.shape[3]) for like in (query, key, value))
    dmask, dsinks = query.new_empty(0), query.new_empty(0)
    if lse.numel() == 0 or key.numel() == 0:
        # Without keys a sink still has a gradient: its probability is 1, whatever it is, so that only dlse reaches it.
        for gradient in (dq, dk, dv):
            gradient.zero_()
        if learned_mask is not None:
            dmask = torch.zeros_like(learned_mask, memory_format=torch.contiguous_format)
        if learned_sinks is not None:
            total = torch.zeros_like(lse) if dlse is None else dlse
            dsinks = total.masked_fill(lse == float("-inf"), 0.0).sum((0, 2)).to(learned_sinks.dtype)
        return dq, dk, dv, dmask, dsinks

    states = tuning.mask_states(query, value, call.attn_mask)
    operands = rows_of(query), rows_of(key), rows_of(value), rows_of(out), rows_of(dout)
    inputs, of_rows = tuning.run_backward(*operands, dlse, lse, (dq, dk, dv), call, states, learned_sinks, learned_mask)
    if learned_mask is not None and of_rows.dmask is not None:
        dmask = of_rows.dmask[..., None].sum_to_size(learned_mask.shape).to(learned_mask.dtype)
    elif learned_mask is not None:
        launch, partial, sums = plan.plan_dmask(inputs, call, tiles.gpu_of(query))
        launch.run(query)
        dmask = (partial.sum(sums) if sums else partial).to(learned_mask.dtype).reshape(learned_mask.shape)
    if of_rows.dsinks is not None and learned_sinks is not None:
        dsinks = of_rows.dsinks.sum((0, 2)).to(learned_sinks.dtype)
    return dq, dk, dv, dmask, dsinks


def _weights(query: Tensor, key: Tensor, lse: Tensor, attn_mask: Tensor | None, alibi_slopes: Tensor | None,
             *scoring: Any) -> Tensor:  # fmt: skip
    from fastattn.ops import attention_triton_plan as plan

    *scoring_values, average_heads = scoring
    batch, heads, seqlen_q, _ = query.shape
    shape = (batch, seqlen_q, key.shape[2]) if average_heads else (batch, heads, seqlen_q, key.shape[2])
    weights = query.new_empty(shape)
    if heads == 0:
        return weights.zero_()
    if weights.numel() > 0:
        call = plan.Scoring(_addressable(attn_mask), alibi_slopes, None, *scoring_values)
        rows = rows_of(query), rows_of(key), lse.contiguous()
        plan.plan_weights(*rows, weights, call, average_heads, tiles.gpu_of(query)).run(query)
    return weights


for _name, _implementation in (("", _forward), ("_backward", _backward), ("_weights", _weights)):
    # CPU tensors arrive only in Triton's interpreter; elsewhere `refuses_triton` keeps them away.
    for _key in ("CUDA", "CPU"):
        _library.impl(f"attention_triton{_name}", _implementation, _key)


# --- Fake kernels ----------------------------------------------------------------------------------------------------


@torch.library.register_fake("fastattn::attention_triton", lib=_library)
def _(query, key, value, attn_mask, alibi_slopes, sinks, rng_state, dropout_p, is_causal, scale, window_left,
      window_right, bottom_right, softcap):  # fmt: skip
    return empty_rows(query, value.shape[3]), query.new_empty(query.shape[:3], dtype=torch.float32)


@torch.library.register_fake("fastattn::attention_triton_backward", lib=_library)
def _(dout, dlse, query, key, value, out, lse, attn_mask, alibi_slopes, sinks, rng_state, dropout_p, is_causal,
      scale, window_left, window_right, bottom_right, softcap, need_dmask, need_dsinks):  # fmt: skip
    dmask = attn_mask.new_empty(attn_mask.shape) if need_dmask else query.new_empty(0)
    dsinks = sinks.new_empty(sinks.shape) if need_dsinks else query.new_empty(0)
    dk, dv = empty_rows(key, key.shape[3]), empty_rows(value, value.shape[3])
    return empty_rows(query, query.shape[3]), dk, dv, dmask, dsinks


@torch.library.register_fake("fastattn::attention_triton_weights", lib=_library)
def _(query, key, lse, attn_mask, alibi_slopes, rng_state, dropout_p, is_causal, scale, window_left, window_right,
      bottom_right, softcap, average_heads):  # fmt: skip
    batch, heads, seqlen_q, _ = query.shape
    shape = (batch, seqlen_q) if average_heads else (batch, heads, seqlen_q)
    return query.new_empty(*shape, key.shape[2])


# --- Gradients -------------------------------------------------------------------------------------------------------


def _save_attention(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:7], *output)
    ctx.scoring = inputs[7:]
    mask, sinks = inputs[3], inputs[5]
    ctx.needs = (mask is not None and mask.requires_grad, sinks is not None and sinks.requires_grad)


def _differentiate_attention(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple:
    query, key, value, mask, slopes, sinks, rng_state, out, lse = ctx.saved_tensors
    gradients: list[Tensor | None] = [None] * 14
    if dout is None and dlse is None:
        return tuple(gradients)
    dq, dk, dv, dmask, dsinks = torch.ops.fastattn.attention_triton_backward(
        torch.zeros_like(out) if dout is None else dout, dlse, query, key, value, out, lse, mask, slopes, sinks,
        rng_state, *ctx.scoring, *ctx.needs,
    )  # fmt: skip
    gradients[:3] = dq, dk, dv
    gradients[3], gradients[5] = dmask if ctx.needs[0] else None, dsinks if ctx.needs[1] else None
    return tuple(gradients)


def refuse_second_derivatives(op: str) -> Callable[..., tuple]:
    """The gradient of the backward of ``op``."""

    def refuse(ctx: Any, *gradients: Any) -> tuple:
        raise NotImplementedError(
            f"{op}: the backward of a fastattn kernel cannot be differentiated again. Use backend='eager' for second "
            "derivatives."
        )

    return refuse


def _save_weights(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:6])
    *ctx.scoring, ctx.average_heads = inputs[6:]
    ctx.need_dmask = inputs[3] is not None and inputs[3].requires_grad


def _differentiate_weights(ctx: Any, dweights: Tensor) -> tuple:
    """W = exp(s - lse) z, so dW/ds = W and dW/dlse = -W: two plain matrix products, and W once more.

    z is dropout's factor, 0 or 1 / (1 - dropout_p).
    """
    query, key, lse, mask, slopes, rng_state = ctx.saved_tensors
    _, _, scale, _, _, _, softcap = ctx.scoring
    batch, heads, seqlen_q, head_dim = query.shape
    dweights = dweights.float()
    if ctx.average_heads:
        dweights = dweights.unsqueeze(1) / heads
    weights = torch.ops.fastattn.attention_triton_weights(
        query, key, lse, mask, slopes, rng_state, *ctx.scoring, False
    )  # fmt: skip
    dscores = weights.float() * dweights
    # Query heads (kv, group) share key head kv.
    group = heads // max(key.shape[1], 1)
    q = query.float().reshape(batch, key.shape[1], group, seqlen_q, head_dim)
    k = key.float().unsqueeze(2)
    ddots = dscores.reshape(batch, key.shape[1], group, seqlen_q, key.shape[2])
    if softcap > 0:
        ddots = ddots * (1 - torch.tanh(q @ k.mT * (scale / softcap)) ** 2)
    ddots = ddots * scale
    dmask = dscores.sum_to_size(mask.shape).to(mask.dtype) if ctx.need_dmask else None
    dq, dk = (ddots @ k).reshape(query.shape).to(query.dtype), (ddots.mT @ q).sum(2).to(key.dtype)
    return dq, dk, -dscores.sum(-1), dmask, *(None,) * 10


torch.library.register_autograd(
    "fastattn::attention_triton", _differentiate_attention, setup_context=_save_attention, lib=_library
)
torch.library.register_autograd(
    "fastattn::attention_triton_backward", refuse_second_derivatives("attention"), lib=_library
)
torch.library.register_autograd(
    "fastattn::attention_triton_weights", _differentiate_weights, setup_context=_save_weights, lib=_library
)
