"""Fused scaled dot-product attention: what its arguments mean, checked, and the backend that runs them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn import dispatch
from fastattn.dispatch import Kernel, never_refuses, select
from fastattn.ops import attention_checks as checks
from fastattn.ops import attention_compiled as compiled
from fastattn.ops.attention_eager import attention_eager, attention_weights_eager
from fastattn.ops.attention_triton import refuses_triton, run_triton, run_weights_triton
from fastattn.ops.calls import AttentionCall
from fastattn.ops.philox import draw_rng_state


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    window: tuple[int, int] | None = None,
    alignment: str = "top_left",
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Scaled dot-product attention, ``softmax(scale * query @ key.T + mask) @ value``, without storing the scores.

    The first eight parameters mean what ``torch.nn.functional.scaled_dot_product_attention``'s mean, except that
    ``is_causal`` and ``attn_mask`` may be given together: both apply.

    Args:
        query: (batch, heads, seqlen_q, head_dim), float32, float16, bfloat16 or float64, at any strides: a transposed
            (batch, seqlen, heads, head_dim) costs no copy. Fewer or more leading dims work as in PyTorch's function.
        key: (batch, heads_kv, seqlen_k, head_dim), dtype and device of ``query``.
        value: (batch, heads_kv, seqlen_k, head_dim_v), dtype and device of ``query``.
        attn_mask: bool, True = may attend, or of any floating dtype, added to the scores; broadcastable to
            (batch, heads, seqlen_q, seqlen_k). A floating mask that requires grad gets its gradient. A key that a mask
            hides must still hold finite numbers: its probability is 0, and 0 * NaN is NaN.
        dropout_p: probability with which a softmax probability is set to 0 (the others are multiplied by
            1 / (1 - dropout_p)), also in evaluation. The choice depends only on torch's generator, not on the backend.
        is_causal: a query sees no key to the right of its own position.
        scale: multiplies the scores; default ``head_dim ** -0.5``.
        enable_gqa: allow fewer heads in key and value than in query: head h uses key head h // (heads / heads_kv).
        window: (left, right), how many keys to each side of its own position a query sees; -1 = unlimited.
        alignment: where a query stands when the lengths differ: ``is_causal``, ``window`` and ``alibi_slopes`` measure
            from there. Query i stands at key i, or at key i + seqlen_k - seqlen_q::

                seqlen_q = 2, seqlen_k = 4      "top_left"  1 0 0 0     "bottom_right"  1 1 1 0
                is_causal                                   1 1 0 0                     1 1 1 1
        softcap: c > 0 replaces a score s by ``c * tanh(s / c)``, before masks and ALiBi.
        alibi_slopes: (heads,) or (batch, heads): ``slope * distance`` is subtracted from the scores.
        sinks: (heads,), one more logit in each row's softmax, without a value; differentiable.
        return_lse: return ``(out, lse)``.
        backend: "auto", or the one backend to run or to raise; see ``fastattn.explain``.

    Returns:
        out: (batch, heads, seqlen_q, head_dim_v), dtype of ``query``. Rows that may attend to nothing are 0, and so are
        their gradients.
        lse, if asked for: (batch, heads, seqlen_q), float32 (float64 for float64), the natural log of the sum of
        exponentials of each row's scores, before dropout; -inf for a row that may attend to nothing. Differentiable.

    Raises:
        ValueError, TypeError: for arguments that disagree in shape, device or dtype.
        NotImplementedError: if ``backend`` is named and cannot run this call, with its reason.

    Source: Vaswani et al. 2017 (arXiv:1706.03762), eq. 1; Dao 2023 (arXiv:2307.08691) for the tiled form.
    """
    plain = attn_mask is None and window is None and alibi_slopes is None and sinks is None and not return_lse
    plain = plain and dropout_p == 0.0 and softcap == 0.0 and alignment == "top_left"
    if plain and not torch.compiler.is_compiling() and dispatch.takes_cpu(backend):
        out = compiled.attention_if_plain(query, key, value, is_causal, scale, enable_gqa)
        if out is not None:
            return out
    call, lead = _normalise(
        query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa,
        window, alignment, softcap, alibi_slopes, sinks,
    )  # fmt: skip
    kernel = select("attention", call, backend)
    if call.dropout_p > 0.0:
        call = call._replace(rng_state=draw_rng_state(call.query.device))
    out, lse = kernel.run(call)
    if lead is not None:
        out, lse = checks.restore(out, lead), checks.restore(lse, lead)
    return (out, lse) if return_lse else out


def attention_and_weights(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    *,
    window: tuple[int, int] | None = None,
    alignment: str = "top_left",
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    average_heads: bool = True,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """``attention`` of 4-dim operands, with any heads_kv, and its probabilities after dropout, from the lse.

    Returns: out, and weights (batch, heads, seqlen_q, seqlen_k), or with ``average_heads`` their mean over the heads,
    (batch, seqlen_q, seqlen_k), in query's dtype. Both are differentiable.
    """
    call, _ = _normalise(
        query, key, value, attn_mask, dropout_p, is_causal, scale, True, window, alignment, softcap, None, sinks
    )
    kernel, weights_kernel = select("attention", call, backend), select("attention_weights", call, backend)
    if call.dropout_p > 0.0:
        call = call._replace(rng_state=draw_rng_state(call.query.device))
    out, lse = kernel.run(call)
    return out, weights_kernel.run(call, lse, average_heads)


# --- What the arguments mean -----------------------------------------------------------------------------------------


def _normalise(
    query: Any, key: Any, value: Any, attn_mask: Any, dropout_p: float, is_causal: bool, scale: float | None,
    enable_gqa: bool, window: tuple[int, int] | None, alignment: str, softcap: float, alibi_slopes: Any, sinks: Any,
) -> tuple[AttentionCall, tuple[int, ...] | None]:  # fmt: skip
    """The checked call with 4-dim operands, and the leading dims (batch..., heads) to restore, or None if there are 4.

    Quick comparisons come first: only when they fail are the operands broadcast, or is the error looked for.
    """
    op = "attention"
    query, key, value = checks.operands(op, query, key, value)
    checks.flag(op, "is_causal", is_causal)
    checks.flag(op, "enable_gqa", enable_gqa)
    lead = None
    shape_q, shape_k, shape_v = query.shape, key.shape, value.shape
    agree = len(shape_q) == len(shape_k) == len(shape_v) == 4 and shape_k[:3] == shape_v[:3]
    agree = agree and shape_q[0] == shape_k[0] and shape_q[3] == shape_k[3]
    if not (agree and (shape_q[1] == shape_k[1] or (enable_gqa and _is_multiple(shape_q[1], shape_k[1])))):
        query, key, value, lead = checks.broadcast(op, query, key, value, enable_gqa)
        shape_q, shape_k = query.shape, key.shape
    scale, window_left, window_right = checks.options(op, shape_q[3], dropout_p, scale, softcap, window, alignment)
    if attn_mask is not None:
        attn_mask = checks.attn_mask(op, attn_mask, query, (*shape_q[:3], shape_k[2]), lead)
    if alibi_slopes is not None:
        alibi_slopes = checks.alibi_slopes(op, alibi_slopes, query, shape_q[:2], lead)
    if sinks is not None:
        sinks = checks.sinks(op, sinks, query, shape_q[1])
    call = AttentionCall(
        query, key, value, attn_mask, alibi_slopes, sinks, None, float(dropout_p), bool(is_causal), float(scale),
        window_left, window_right, alignment == "bottom_right", float(softcap),
    )  # fmt: skip
    return call, lead


def _is_multiple(heads: int, heads_kv: int) -> bool:
    return heads_kv > 0 and heads % heads_kv == 0


# --- The table -------------------------------------------------------------------------------------------------------


def run_eager(call: AttentionCall) -> tuple[Tensor, Tensor]:
    # Under autocast the products in float32 would be rounded to 16 bits.
    with checks.without_autocast(call.query.device):
        return attention_eager(*call)


def run_weights_eager(call: AttentionCall, lse: Tensor, average_heads: bool) -> Tensor:
    with checks.without_autocast(call.query.device):
        return attention_weights_eager(
            call.query, call.key, lse, call.attn_mask, call.alibi_slopes, call.rng_state, call.dropout_p,
            call.is_causal, call.scale, call.window_left, call.window_right, call.bottom_right, call.softcap,
            average_heads,
        )  # fmt: skip


def prepare(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    window: tuple[int, int] | None = None,
    alignment: str = "top_left",
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
) -> AttentionCall:
    return _normalise(
        query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa,
        window, alignment, softcap, alibi_slopes, sinks,
    )[0]  # fmt: skip


_CUDA, _EMULATED = dispatch.cuda_kernels(compiled.refuses_cuda, compiled.run)
_WEIGHTS_CUDA, _WEIGHTS_EMULATED = dispatch.cuda_kernels(compiled.refuses_cuda, compiled.run_weights)
dispatch.register(
    "attention",
    _CUDA,
    Kernel("triton", refuses_triton, run_triton),
    Kernel("cpu", compiled.refuses_cpu, compiled.run),
    Kernel("eager", never_refuses, run_eager),
    _EMULATED,
    prepare=prepare,
)
dispatch.register(
    "attention_weights",
    _WEIGHTS_CUDA,
    Kernel("triton", refuses_triton, run_weights_triton),
    Kernel("cpu", compiled.refuses_cpu, compiled.run_weights),
    Kernel("eager", never_refuses, run_weights_eager),
    _WEIGHTS_EMULATED,
    prepare=prepare,
)
