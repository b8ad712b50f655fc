"""INT8 matmul in plain PyTorch: the definition of correct."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn.dispatch import within_transform
from fastattn.ops.calls import Int8LinearCall, Int8MatmulCall, QuantizeInt8Call
from fastattn.ops.linear import ACTIVATION_FUNCTIONS

# The smallest normal float32: 1 / scale is finite for every scale from here on.
_SMALLEST_SCALE = 2.0**-126


def quantize(input: Tensor) -> tuple[Tensor, Tensor]:
    x = input.detach().float()
    amax = x.abs().amax(-1) if x.shape[-1] > 0 else x.new_zeros(x.shape[:-1])
    scale = torch.where(amax == 0, 1.0, (amax / 127).clamp_min(_SMALLEST_SCALE))
    scale = torch.where(amax.isfinite(), scale, torch.nan)
    q = (x * (1 / scale).unsqueeze(-1)).round()
    return torch.where(amax.isfinite().unsqueeze(-1), q, 0.0).to(torch.int8), scale


def int32_product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b.T`` of int8 matrices, exactly: float64 holds every integer up to 2^53. Returned in float32."""
    return (a.double() @ b.double().T).float()


def _in_floats(weight: Tensor, weight_scale: Tensor) -> Tensor:
    return weight.float() * weight_scale.unsqueeze(1)


class _StraightThrough(torch.autograd.Function):
    """(input quantised by row) @ weight.T, scaled; the gradient ignores the rounding: ``dout @ (weight * scale)``."""

    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        input, weight, weight_scale = inputs
        ctx.save_for_backward(weight, weight_scale)
        ctx.save_for_forward(weight, weight_scale)
        ctx.input_dtype = input.dtype

    @staticmethod
    def forward(input: Tensor, weight: Tensor, weight_scale: Tensor) -> Tensor:  # type: ignore[override]
        q, scale = quantize(input)
        return int32_product(q, weight) * scale.unsqueeze(-1) * weight_scale

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        weight, weight_scale = ctx.saved_tensors
        return (dout @ _in_floats(weight, weight_scale)).to(ctx.input_dtype), None, None

    @staticmethod
    def jvp(ctx: Any, dinput: Tensor | None, *_: Any) -> Tensor | None:  # type: ignore[override]
        weight, weight_scale = ctx.saved_tensors
        return None if dinput is None else dinput.float() @ _in_floats(weight, weight_scale).T


def _straight_through(input: Tensor, weight: Tensor, weight_scale: Tensor) -> Tensor:
    if not torch.compiler.is_compiling():
        return _StraightThrough.apply(input, weight, weight_scale)  # type: ignore[no-any-return]
    # torch.compile refuses a Function with a jvp, and within torch.func's transforms it traces the forward alone.
    out = _StraightThrough.forward(input, weight, weight_scale)
    if not (within_transform() or (input.requires_grad and torch.is_grad_enabled())):
        return out
    linear = input.float() @ _in_floats(weight, weight_scale).T
    return out + (linear - linear.detach())


def quantize_int8(call: QuantizeInt8Call) -> tuple[Tensor, Tensor]:
    return quantize(call.input)


def int8_matmul(call: Int8MatmulCall) -> Tensor:
    out = int32_product(call.a, call.b) * call.a_scale.unsqueeze(1) * call.b_scale
    if call.bias is not None:
        out = out + call.bias.float()
    return ACTIVATION_FUNCTIONS[call.activation](out).to(call.out_dtype)


def int8_linear(call: Int8LinearCall) -> Tensor:
    out = _straight_through(call.input, call.weight, call.weight_scale)
    if call.bias is not None:
        out = out + call.bias.float()
    return ACTIVATION_FUNCTIONS[call.activation](out).to(call.input.dtype)
