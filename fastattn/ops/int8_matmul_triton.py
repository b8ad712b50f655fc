"""The INT8 ops on the Triton backend: ``torch.ops.fastattn.int8_matmul_triton`` and its relatives, fakes and gradient.

They need no compiled extension. The weight is read as it is: nothing is packed. Triton is imported when one of them
first runs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn import _triton
from fastattn.ops import int8_matmul_triton_launch as kernels
from fastattn.ops.calls import Int8LinearCall, Int8MatmulCall, QuantizeInt8Call
from fastattn.ops.int8_matmul_compiled import MAX_DEPTH

_FLOATING = frozenset((torch.float32, torch.bfloat16, torch.float16, torch.float64))
_ACTIVATIONS = frozenset(("none", "relu", "gelu", "gelu_tanh", "silu"))


def _refuses_shape(columns: int, depth: int) -> str | None:
    if depth > MAX_DEPTH:
        return f"K is {depth}, and the int32 sum of more than {MAX_DEPTH} products may overflow"
    if columns > kernels.MAX_STRIDE:
        return (
            f"N is {columns}, and a tile of rows of more than {kernels.MAX_STRIDE} outputs is not addressed by 32 bits"
        )
    return None


def refuses_quantize(call: QuantizeInt8Call) -> str | None:
    return _triton.refuses_device(call.input, "input")


def refuses_matmul(call: Int8MatmulCall) -> str | None:
    reason = _triton.refuses_device(call.a, "a")
    if reason is not None:
        return reason
    tensors = (call.a_scale, call.b_scale) if call.bias is None else (call.a_scale, call.b_scale, call.bias)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return "a scale or the bias requires grad, and it has no backward (int8_linear has)"
    return _refuses_shape(*call.b.shape)


def refuses_linear(call: Int8LinearCall) -> str | None:
    return _triton.refuses_device(call.input, "input") or _refuses_shape(*call.weight.shape)


def quantize_int8(call: QuantizeInt8Call) -> tuple[Tensor, Tensor]:
    return torch.ops.fastattn.quantize_int8_triton.default(call.input.detach())


def int8_matmul(call: Int8MatmulCall) -> Tensor:
    return torch.ops.fastattn.int8_matmul_triton.default(*call)


def int8_linear(call: Int8LinearCall) -> Tensor:
    input, weight, weight_scale, bias, activation, _ = call
    return torch.ops.fastattn.int8_linear_triton.default(input, weight, weight_scale, bias, activation)


# --- Ops: they may be called directly, so they check what the kernels need to stay within their tensors ---------------


def _check(op: str, name: str, tensor: Tensor, shape: tuple[int, ...], dtypes: frozenset, device: torch.device) -> None:
    if tensor.shape != shape:
        raise ValueError(f"{op}: {name} must be {shape}, got {tuple(tensor.shape)}.")
    if tensor.dtype not in dtypes:
        raise TypeError(f"{op}: {name} must be {' or '.join(sorted(map(str, dtypes)))}, got {tensor.dtype}.")
    if tensor.device != device:
        raise ValueError(f"{op}: {name} is on {tensor.device}, the others on {device}.")


_INT8, _FLOAT32 = frozenset((torch.int8,)), frozenset((torch.float32,))


def _check_weight(op, weight, depth, weight_scale, bias, activation, device) -> None:
    if weight.dim() != 2:
        raise ValueError(f"{op}: weight must be a matrix, got shape {tuple(weight.shape)}.")
    columns = weight.shape[0]
    _check(op, "weight", weight, (columns, depth), _INT8, device)
    _check(op, "weight_scale", weight_scale, (columns,), _FLOAT32, device)
    if bias is not None:
        _check(op, "bias", bias, (columns,), _FLOATING, device)
    if activation not in _ACTIVATIONS:
        raise ValueError(f"{op}: activation must be one of {', '.join(sorted(_ACTIVATIONS))}, got {activation!r}.")
    reason = _refuses_shape(columns, depth)
    if reason is not None:
        raise NotImplementedError(f"{op}: {reason}. Use backend='eager' or split the product.")


def _check_input(op: str, input: Tensor) -> None:
    if input.dim() == 0:
        raise ValueError(f"{op}: input must have at least one dimension.")
    _check(op, "input", input, tuple(input.shape), _FLOATING, input.device)


def _quantize(input: Tensor) -> tuple[Tensor, Tensor]:
    _check_input("quantize_int8", input)
    return kernels.quantize(input)


def _matmul(a, b, a_scale, b_scale, bias, activation, out_dtype):
    op = "int8_matmul"
    if a.dim() != 2:
        raise ValueError(f"{op}: a must be a matrix, got shape {tuple(a.shape)}.")
    _check(op, "a", a, tuple(a.shape), _INT8, a.device)
    _check(op, "a_scale", a_scale, (a.shape[0],), _FLOAT32, a.device)
    _check_weight(op, b, a.shape[1], b_scale, bias, activation, a.device)
    if out_dtype not in _FLOATING:
        raise TypeError(f"{op}: out_dtype must be float32, bfloat16, float16 or float64, got {out_dtype}.")
    return kernels.matmul(a, b, a_scale, b_scale, bias, activation, out_dtype)


def _linear(input, weight, weight_scale, bias, activation):
    _check_input("int8_linear", input)
    _check_weight("int8_linear", weight, input.shape[-1], weight_scale, bias, activation, input.device)
    return kernels.linear(input, weight, weight_scale, bias, activation)


def _fake_quantize(input: Tensor) -> tuple[Tensor, Tensor]:
    return input.new_empty(input.shape, dtype=torch.int8), input.new_empty(input.shape[:-1], dtype=torch.float32)


def _fake_matmul(a, b, a_scale, b_scale, bias, activation, out_dtype):
    return a.new_empty((a.shape[0], b.shape[0]), dtype=out_dtype)


def _fake_linear(input, weight, weight_scale, bias, activation):
    return input.new_empty((*input.shape[:-1], weight.shape[0]))


# --- Gradient of int8_linear -----------------------------------------------------------------------------------------


def _save_linear(ctx: Any, inputs: tuple, output: Tensor) -> None:
    input, weight, weight_scale, bias, activation = inputs
    if weight_scale.requires_grad:
        raise ValueError("int8_linear: weight_scale requires grad, but only input and bias get one; detach it.")
    linear_only = activation == "none"
    # The pre-activation is computed again in backward: that costs less than keeping it.
    ctx.save_for_backward(None if linear_only else input, weight, weight_scale, None if linear_only else bias)
    ctx.activation, ctx.input_dtype = activation, input.dtype
    ctx.bias_dtype = None if bias is None else bias.dtype


def _activation_backward(activation: str, dout: Tensor, preactivation: Tensor) -> Tensor:
    aten = torch.ops.aten
    match activation:
        case "relu":
            return aten.threshold_backward(dout, preactivation, 0)
        case "silu":
            if torch.is_grad_enabled():
                # PyTorch does not differentiate silu_backward again.
                sigmoid = preactivation.sigmoid()
                return dout * sigmoid * (1 + preactivation * (1 - sigmoid))
            return aten.silu_backward(dout, preactivation)
        case "gelu":
            return aten.gelu_backward(dout, preactivation, approximate="none")
        case "gelu_tanh":
            return aten.gelu_backward(dout, preactivation, approximate="tanh")
    raise ValueError(f"unknown activation {activation!r}")


def _linear_gradients(ctx: Any, dout: Tensor) -> tuple[Tensor | None, None, None, Tensor | None, None]:
    """Straight through the rounding of the input: dinput = (dout * activation') @ (weight * weight_scale), in fp32."""
    input, weight, weight_scale, bias = ctx.saved_tensors
    dout = dout.float()
    if ctx.activation != "none":
        # It depends on input and bias, too, which counts where this gradient is differentiated again.
        preactivation = torch.ops.fastattn.int8_linear_triton.default(input.float(), weight, weight_scale, bias, "none")
        dout = _activation_backward(ctx.activation, dout, preactivation)
    dinput = dbias = None
    if ctx.needs_input_grad[0]:
        dinput = (dout @ (weight.float() * weight_scale.unsqueeze(1))).to(ctx.input_dtype)
    if ctx.needs_input_grad[3]:
        dbias = (dout.sum(tuple(range(dout.dim() - 1))) if dout.dim() > 1 else dout).to(ctx.bias_dtype)
    return dinput, None, None, dbias, None


# --- Registration ----------------------------------------------------------------------------------------------------

_LIBRARY = torch.library.Library("fastattn", "FRAGMENT")


def _define(name: str, schema: str, run: Any, fake: Any) -> None:
    _LIBRARY.define(name + schema, tags=torch.Tag.pt2_compliant_tag)
    for device in ("CUDA", "CPU"):  # CPU: Triton's interpreter
        _LIBRARY.impl(name, run, device)
    torch.library.register_fake(f"fastattn::{name}", fake, lib=_LIBRARY)


_define("quantize_int8_triton", "(Tensor input) -> (Tensor q, Tensor scale)", _quantize, _fake_quantize)
_define(
    "int8_matmul_triton",
    "(Tensor a, Tensor b, Tensor a_scale, Tensor b_scale, Tensor? bias, str activation, ScalarType out_dtype) -> "
    "Tensor",
    _matmul,
    _fake_matmul,
)
_define(
    "int8_linear_triton",
    "(Tensor input, Tensor weight, Tensor weight_scale, Tensor? bias, str activation) -> Tensor",
    _linear,
    _fake_linear,
)
torch.library.register_autograd(
    "fastattn::int8_linear_triton", _linear_gradients, setup_context=_save_linear, lib=_LIBRARY
)
