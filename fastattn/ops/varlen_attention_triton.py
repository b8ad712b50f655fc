"""Attention of packed sequences on Triton: the ops, their fake kernels and gradients around attention's kernels.

``fastattn::varlen_attention_triton`` and ``…_backward`` have the schemas of those without the suffix (csrc/ops.cpp).
How the kernels find their sequences: attention_triton_packed.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn.ops import attention_checks as checks
from fastattn.ops.attention_compiled import empty_rows
from fastattn.ops.attention_triton import MAX_STRIDE, refuse_second_derivatives
from fastattn.ops.calls import VarlenCall


def run_varlen_triton(call: VarlenCall) -> tuple[Tensor, Tensor]:
    if call.alibi_slopes is not None:
        call = call._replace(alibi_slopes=call.alibi_slopes.float())
    return torch.ops.fastattn.varlen_attention_triton(*call)


# --- The ops ---------------------------------------------------------------------------------------------------------

_PACKING = "Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k"
_SCORING = (
    "Tensor? alibi_slopes, Tensor? sinks, Tensor? rng_state, float dropout_p, bool is_causal, float scale, "
    "SymInt window_left, SymInt window_right, bool bottom_right, float softcap"
)
_library = torch.library.Library("fastattn", "FRAGMENT")
_library.define(
    f"varlen_attention_triton(Tensor query, Tensor key, Tensor value, {_PACKING}, {_SCORING}) -> "
    "(Tensor out, Tensor lse)"
)
_library.define(
    "varlen_attention_triton_backward(Tensor dout, Tensor? dlse, Tensor query, Tensor key, Tensor value, Tensor out, "
    f"Tensor lse, {_PACKING}, {_SCORING}, bool need_dsinks) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dsinks)"
)


def as_entry(rows: Tensor) -> Tensor:
    """(total, heads, head_dim) as (1, heads, total, head_dim), whose stride of batches is that of rows."""
    if rows.stride(2) != 1 or rows.stride(0) >= MAX_STRIDE:
        rows = rows.contiguous()
    total, heads, head_dim = rows.shape
    stride_row, stride_head, _ = rows.stride()
    return rows.as_strided((1, heads, total, head_dim), (stride_row, stride_head, stride_row, 1))


def _empty_like(rows: Tensor, head_dim: int) -> Tensor:
    """(total, heads, head_dim), laid out as the same rows of a dense batch would be."""
    return empty_rows(rows.transpose(0, 1)[None], head_dim)[0].transpose(0, 1)


def _scoring(packing: tuple[Tensor, Tensor, int, int], scoring: tuple[Any, ...]) -> Any:
    from fastattn.ops import attention_triton_plan as plan

    cu_seqlens_q, cu_seqlens_k, *longest = packing
    packing = plan.Packing(cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous(), *longest)
    return plan.Scoring(None, *scoring)._replace(packing=packing)


def _forward(query: Tensor, key: Tensor, value: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
             max_seqlen_k: int, *scoring: Any) -> tuple[Tensor, Tensor]:  # fmt: skip
    from fastattn.ops import attention_triton_plan as plan
    from fastattn.ops import attention_triton_tuning as tuning

    if query.is_cpu:
        op = "varlen_attention"
        checks.sequence_lengths(op, "cu_seqlens_q", cu_seqlens_q, max_seqlen_q, query.shape[0])
        checks.sequence_lengths(op, "cu_seqlens_k", cu_seqlens_k, max_seqlen_k, key.shape[0])
    out = _empty_like(query, value.shape[2])
    lse = query.new_empty(query.shape[1], query.shape[0], dtype=torch.float32)
    call = _scoring((cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k), scoring)
    if call.packing.batch == 0 or max_seqlen_q == 0:
        return out.zero_(), lse.fill_(float("-inf"))
    if lse.numel() > 0:
        operands = (as_entry(operand) for operand in (query, key, value, out))
        tuning.run(query, plan.plan_forward, *operands, lse, call, None)
    return out, lse


def _backward(dout: Tensor, dlse: Tensor | None, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor,
              cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int, *scoring: Any,
              ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    from fastattn.ops import attention_triton_tuning as tuning

    *scoring_values, need_dsinks = scoring
    call = _scoring((cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k), tuple(scoring_values))
    dq, dk, dv = (_empty_like(rows, rows.shape[2]) for rows in (query, key, value))
    dsinks = call.sinks.new_zeros(call.sinks.shape) if need_dsinks else query.new_empty(0)
    if max_seqlen_k == 0:
        # No program: nobody fills what lies between sequences without keys.
        dk.zero_(), dv.zero_()
    if call.packing.batch == 0 or max_seqlen_q == 0 or lse.numel() == 0:
        return dq.zero_(), dk.zero_(), dv.zero_(), dsinks
    operands = as_entry(query), as_entry(key), as_entry(value), as_entry(out), as_entry(dout)
    gradients = as_entry(dq), as_entry(dk), as_entry(dv)
    _, of_rows = tuning.run_backward(*operands, dlse, lse, gradients, call, None, call.sinks if need_dsinks else None)
    return dq, dk, dv, dsinks if of_rows.dsinks is None else of_rows.dsinks.sum((0, 2)).to(call.sinks.dtype)


for _name, _implementation in (("", _forward), ("_backward", _backward)):
    for _key in ("CUDA", "CPU"):
        _library.impl(f"varlen_attention_triton{_name}", _implementation, _key)


@torch.library.register_fake("fastattn::varlen_attention_triton", lib=_library)
def _(query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *scoring):
    lse = query.new_empty(query.shape[1], query.shape[0], dtype=torch.float32)
    return _empty_like(query, value.shape[2]), lse


@torch.library.register_fake("fastattn::varlen_attention_triton_backward", lib=_library)
def _(dout, dlse, query, key, value, out, lse, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, alibi_slopes,
      sinks, *scoring):  # fmt: skip
    dsinks = sinks.new_empty(sinks.shape) if scoring[-1] else query.new_empty(0)
    return *(_empty_like(rows, rows.shape[2]) for rows in (query, key, value)), dsinks


# --- Gradients -------------------------------------------------------------------------------------------------------


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    query, key, value, cu_seqlens_q, cu_seqlens_k, *longest, alibi_slopes, sinks, rng_state = inputs[:10]
    ctx.save_for_backward(query, key, value, cu_seqlens_q, cu_seqlens_k, alibi_slopes, sinks, rng_state, *output)
    ctx.longest, ctx.scoring = longest, inputs[10:]
    ctx.need_dsinks = sinks is not None and sinks.requires_grad


def _differentiate(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple:
    query, key, value, cu_seqlens_q, cu_seqlens_k, alibi_slopes, sinks, rng_state, out, lse = ctx.saved_tensors
    gradients: list[Tensor | None] = [None] * 17
    if dout is None and dlse is None:
        return tuple(gradients)
    *gradients[:3], dsinks = torch.ops.fastattn.varlen_attention_triton_backward(
        torch.zeros_like(out) if dout is None else dout, dlse, query, key, value, out, lse, cu_seqlens_q, cu_seqlens_k,
        *ctx.longest, alibi_slopes, sinks, rng_state, *ctx.scoring, ctx.need_dsinks,
    )  # fmt: skip
    gradients[8] = dsinks if ctx.need_dsinks else None
    return tuple(gradients)


torch.library.register_autograd("fastattn::varlen_attention_triton", _differentiate, setup_context=_save, lib=_library)
torch.library.register_autograd(
    "fastattn::varlen_attention_triton_backward", refuse_second_derivatives("varlen_attention"), lib=_library
)
