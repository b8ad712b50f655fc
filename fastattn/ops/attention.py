"""Fused scaled dot-product attention: what its arguments mean, checked, and the backend that runs them."""

from __future__ import annotations

from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from fastattn import dispatch
from fastattn.dispatch import Kernel, not_written, select
from fastattn.ops import attention_compiled as compiled
from fastattn.ops.attention_eager import attention_eager, attention_weights_eager
from fastattn.ops.philox import draw_rng_state

ALIGNMENTS = ("top_left", "bottom_right")


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
    call, lead = _normalise(
        query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa,
        window, alignment, softcap, alibi_slopes, sinks,
    )  # fmt: skip
    kernel = select("attention", call, backend)
    if call.dropout_p > 0.0:
        call = call._replace(rng_state=draw_rng_state(call.query.device))
    out, lse = kernel.run(call)
    if lead is not None:
        out, lse = _restore(out, lead, 2), _restore(lse, lead, 1)
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
    average_heads: bool = True,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """``attention`` of 4-dim operands, with any heads_kv, and its probabilities after dropout, from the lse.

    Returns: out, and weights (batch, heads, seqlen_q, seqlen_k), or with ``average_heads`` their mean over the heads,
    (batch, seqlen_q, seqlen_k), in query's dtype. Both are differentiable.
    """
    call, _ = _normalise(
        query, key, value, attn_mask, dropout_p, is_causal, scale, True, window, "top_left", 0.0, None, None
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
    op: str = "attention",
) -> tuple[AttentionCall, tuple[int, ...] | None]:  # fmt: skip
    """The checked call with 4-dim operands, and the leading dims (batch..., heads) to restore, or None if there are 4.

    Quick comparisons come first: only when they fail are the operands broadcast, or is the error looked for.
    """
    for operand, name in ((query, "query"), (key, "key"), (value, "value")):
        if not isinstance(operand, Tensor):
            raise TypeError(f"{op}: {name} must be a Tensor, got {type(operand).__name__}.")
    if torch.is_autocast_enabled(query.device.type):
        query, key, value = (_autocast(operand) for operand in (query, key, value))
    if not (query.dtype == key.dtype == value.dtype and query.device == key.device == value.device):
        _raise_mixed(op, query, key, value)
    if not query.is_floating_point():
        raise TypeError(f"{op}: query must be float32, float16, bfloat16 or float64, got {_name(query.dtype)}.")

    lead = None
    shape_q, shape_k, shape_v = query.shape, key.shape, value.shape
    agree = len(shape_q) == len(shape_k) == len(shape_v) == 4 and shape_k[:3] == shape_v[:3]
    if not (agree and shape_q[:2] == shape_k[:2] and shape_q[3] == shape_k[3]):
        query, key, value, lead = _broadcast_operands(op, query, key, value, enable_gqa)
        shape_q, shape_k = query.shape, key.shape
    if shape_q[3] < 1:
        raise ValueError(f"{op}: query must have a head_dim of at least 1, got shape {tuple(shape_q)}.")

    if scale is None:
        scale = shape_q[3] ** -0.5
    elif not isinstance(scale, (int, float)):
        raise TypeError(f"{op}: scale must be a number or None, got {type(scale).__name__}; fold a tensor into query.")
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"{op}: dropout_p must be between 0 and 1, got {dropout_p}.")
    if not 0.0 <= softcap < float("inf"):
        raise ValueError(f"{op}: softcap must be a finite number >= 0 (0 = none), got {softcap}.")
    if alignment not in ALIGNMENTS:
        raise ValueError(f"{op}: alignment must be 'top_left' or 'bottom_right', got {alignment!r}.")
    window_left, window_right = (-1, -1) if window is None else _checked_window(op, window)

    if attn_mask is not None:
        attn_mask = _checked_mask(op, attn_mask, query, (*shape_q[:3], shape_k[2]), lead)
    if alibi_slopes is not None:
        alibi_slopes = _checked_per_head(op, "alibi_slopes", alibi_slopes, query, lead)
    if sinks is not None:
        sinks = _checked_per_head(op, "sinks", sinks, query, None)
    call = AttentionCall(
        query, key, value, attn_mask, alibi_slopes, sinks, None, float(dropout_p), bool(is_causal), float(scale),
        window_left, window_right, alignment == "bottom_right", float(softcap),
    )  # fmt: skip
    return call, lead


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _autocast(operand: Tensor) -> Tensor:
    """What torch.autocast does to SDPA's operands: everything floating but float64 to the lower precision."""
    if not operand.is_floating_point() or operand.dtype == torch.float64:
        return operand
    return operand.to(torch.get_autocast_dtype(operand.device.type))


def _raise_mixed(op: str, query: Tensor, key: Tensor, value: Tensor) -> NoReturn:
    for name, other in (("key", key), ("value", value)):
        if other.device != query.device:
            raise ValueError(f"{op}: query is on {query.device} but {name} on {other.device}; move them to one device.")
        if other.dtype != query.dtype:
            raise TypeError(
                f"{op}: query is {_name(query.dtype)} but {name} is {_name(other.dtype)}; convert them to one dtype."
            )
    raise AssertionError("operands agree")


def _broadcast_operands(
    op: str, query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool
) -> tuple[Tensor, Tensor, Tensor, tuple[int, ...] | None]:
    """4-dim operands by SDPA's rules: heads are the third dim from the end, leading dims and one head broadcast."""
    operands = {"query": query, "key": key, "value": value}
    for name, operand in operands.items():
        if operand.dim() < 2:
            raise ValueError(f"{op}: {name} must have at least 2 dims (seqlen, head_dim), got {tuple(operand.shape)}.")
    if query.shape[-1] != key.shape[-1]:
        raise ValueError(
            f"{op}: query has head_dim {query.shape[-1]} but key has head_dim {key.shape[-1]} "
            f"(key: {tuple(key.shape)}); they must be equal."
        )
    if key.shape[-2] != value.shape[-2]:
        raise ValueError(
            f"{op}: key has seqlen {key.shape[-2]} but value has seqlen {value.shape[-2]} "
            f"(value: {tuple(value.shape)}); they must be equal."
        )

    dims = max(operand.dim() for operand in operands.values())
    heads, heads_k, heads_v = (x.shape[-3] if x.dim() > 2 else 1 for x in (query, key, value))
    heads_kv = heads_k if heads_v == 1 else heads_v
    if heads_k not in (1, heads_kv):
        raise ValueError(f"{op}: key has {heads_k} heads but value has {heads_v}; they must be equal.")
    heads = heads_kv if heads == 1 else heads
    if heads != heads_kv and heads_kv != 1:
        if not enable_gqa:
            raise ValueError(
                f"{op}: query has {heads} heads but key and value have {heads_kv}; "
                "pass enable_gqa=True to share each of theirs among several query heads."
            )
        if heads_kv == 0 or heads % heads_kv:
            raise ValueError(
                f"{op}: query has {heads} heads, which is not a multiple of the {heads_kv} heads of key and value."
            )
    try:
        batch = torch.broadcast_shapes(*(operand.shape[:-3] for operand in operands.values()))
    except RuntimeError:
        shapes = ", ".join(f"{name} {tuple(operand.shape)}" for name, operand in operands.items())
        raise ValueError(f"{op}: the leading dims must be equal or 1, got {shapes}.") from None

    def expand(operand: Tensor, operand_heads: int) -> Tensor:
        expanded = operand.expand(*batch, operand_heads, *operand.shape[-2:])
        return expanded if len(batch) == 1 else expanded.reshape(-1, *expanded.shape[-3:]) if batch else expanded[None]

    lead = None if dims == 4 else (*batch, heads) if dims > 2 else ()
    return expand(query, heads), expand(key, heads_kv), expand(value, heads_kv), lead


def _restore(result: Tensor, lead: tuple[int, ...], trailing: int) -> Tensor:
    """(batch, heads, ...) with the caller's leading dims; ``trailing`` dims follow them."""
    if len(lead) == 0:
        return result[0, 0]
    return result[0] if len(lead) == 1 else result.unflatten(0, lead[:-1])


def _checked_window(op: str, window: Any) -> tuple[int, int]:
    valid = isinstance(window, (tuple, list)) and len(window) == 2
    if not (valid and all(isinstance(side, int) and side >= -1 for side in window)):
        raise ValueError(
            f"{op}: window must be (left, right), two integers >= -1, with -1 for no limit; got {window!r}. "
            "For no window pass None."
        )
    return window[0], window[1]


def _checked_mask(op: str, mask: Any, query: Tensor, scores: tuple[int, ...], lead: tuple[int, ...] | None) -> Tensor:
    """The mask with at most 4 dims; ``scores`` is (batch, heads, seqlen_q, seqlen_k)."""
    if not isinstance(mask, Tensor) or not (mask.dtype == torch.bool or mask.is_floating_point()):
        got = _name(mask.dtype) if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(
            f"{op}: attn_mask must be a bool Tensor (True = attend) or a floating one (added to the scores), "
            f"got {got}; convert 0/1 masks with .bool()."
        )
    if mask.device != query.device:
        raise ValueError(f"{op}: query is on {query.device} but attn_mask on {mask.device}; move it there.")
    expected = scores if lead is None else (*lead, *scores[2:])
    shape = mask.shape
    if len(shape) > len(expected) or any(
        size not in (1, full) for size, full in zip(reversed(shape), reversed(expected), strict=False)
    ):
        raise ValueError(f"{op}: attn_mask {tuple(shape)} does not broadcast to the scores, {tuple(expected)}.")
    if len(shape) <= 4 and (lead is None or len(lead) < 2):
        return mask
    # More leading dims than one batch: merge them, expanded unless the mask has none of them.
    if len(shape) <= 3:
        return mask
    batch = lead[:-1] if lead else ()
    mask = mask[(None,) * (len(expected) - len(shape))]
    return mask.expand(*batch, *mask.shape[-3:]).reshape(-1, *mask.shape[-3:])


def _checked_per_head(op: str, name: str, tensor: Any, query: Tensor, lead: tuple[int, ...] | None) -> Tensor:
    """``sinks`` (heads,), or ``alibi_slopes`` (heads,) or (batch, heads)."""
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        got = _name(tensor.dtype) if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(f"{op}: {name} must be a floating Tensor, got {got}.")
    if tensor.device != query.device:
        raise ValueError(f"{op}: query is on {query.device} but {name} on {tensor.device}; move it there.")
    batch, heads = query.shape[:2]
    if tensor.shape == (heads,) or (name == "alibi_slopes" and tensor.shape == (batch, heads)):
        return tensor
    if name == "alibi_slopes" and lead and tuple(tensor.shape) == lead:
        return tensor.reshape(batch, heads)
    expected = "(heads,) or (batch, heads)" if name == "alibi_slopes" else "(heads,)"
    raise ValueError(
        f"{op}: {name} must be {expected} with batch {batch} and heads {heads}, got shape {tuple(tensor.shape)}."
    )


# --- The table -------------------------------------------------------------------------------------------------------


def run_eager(call: AttentionCall) -> tuple[Tensor, Tensor]:
    # Under autocast the products in float32 would be rounded to 16 bits.
    with torch.autocast(call.query.device.type, enabled=False):
        return attention_eager(*call)


def run_weights_eager(call: AttentionCall, lse: Tensor, average_heads: bool) -> Tensor:
    with torch.autocast(call.query.device.type, enabled=False):
        return attention_weights_eager(call.query, call.key, lse, *call[3:5], *call[6:], average_heads)


def never_refuses(call: Any) -> None:
    return None


def _prepare(
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


dispatch.register(
    "attention",
    Kernel("cuda", not_written("attention"), None),
    Kernel("triton", not_written("attention"), None),
    Kernel("cpu", compiled.refuses_cpu, compiled.run_cpu),
    Kernel("eager", never_refuses, run_eager),
    prepare=_prepare,
)
dispatch.register(
    "attention_weights",
    Kernel("cpu", compiled.refuses_cpu, compiled.run_weights_cpu),
    Kernel("eager", never_refuses, run_weights_eager),
    prepare=_prepare,
)
