"""The INT8 ops of the compiled extension: what they refuse, how they are called, what shapes they return."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn._extension import extension
from fastattn.dispatch import refuses_device
from fastattn.ops.calls import Int8LinearCall, Int8MatmulCall, QuantizeInt8Call

# kInt8MaxDepth of csrc/int8_matmul/int8_matmul.h: 128 * 128 * K < 2^31.
MAX_DEPTH = 131071


def _refuses_depth(depth: int) -> str | None:
    if depth > MAX_DEPTH:
        return f"K is {depth}, and the int32 sum of more than {MAX_DEPTH} products may overflow"
    return None


def refuses_cpu_quantize(call: QuantizeInt8Call) -> str | None:
    if call.input.device.type != "cpu":
        return f"input is on {call.input.device}"
    return None


def refuses_cpu_matmul(call: Int8MatmulCall) -> str | None:
    if call.a.device.type != "cpu":
        return f"a is on {call.a.device}"
    return _refuses_gradient(call) or _refuses_depth(call.a.shape[1])


def _refuses_gradient(call: Int8MatmulCall) -> str | None:
    tensors = (call.a_scale, call.b_scale) if call.bias is None else (call.a_scale, call.b_scale, call.bias)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return "a scale or the bias requires grad, and it has no backward (int8_linear has)"
    return None


def refuses_cpu_linear(call: Int8LinearCall) -> str | None:
    if call.input.device.type != "cpu":
        return f"input is on {call.input.device}"
    return _refuses_depth(call.weight.shape[1])


def refuses_cuda_quantize(call: QuantizeInt8Call, device_type: str) -> str | None:
    return refuses_device("input", call.input, device_type)


def refuses_cuda_matmul(call: Int8MatmulCall, device_type: str) -> str | None:
    return refuses_device("a", call.a, device_type) or _refuses_gradient(call) or _refuses_depth(call.a.shape[1])


def refuses_cuda_linear(call: Int8LinearCall, device_type: str) -> str | None:
    return refuses_device("input", call.input, device_type) or _refuses_depth(call.weight.shape[1])


def quantize_int8(call: QuantizeInt8Call) -> tuple[Tensor, Tensor]:
    return torch.ops.fastattn.quantize_int8.default(call.input.detach())


def int8_matmul(call: Int8MatmulCall) -> Tensor:
    return torch.ops.fastattn.int8_matmul.default(*call)


def int8_linear(call: Int8LinearCall) -> Tensor:
    input, weight, weight_scale, bias, activation, packed = call
    if packed is None:
        return torch.ops.fastattn.int8_linear.default(input, weight, weight_scale, bias, activation)
    return torch.ops.fastattn.int8_linear_packed.default(input, packed, weight, weight_scale, bias, activation)


def pack_weight(weight: Tensor) -> Tensor:
    """The form of an int8 weight (N, K) that the CPU's matrix loop reads, as an opaque int8 tensor.

    It remembers which weight it was made of: if that has changed since, ``int8_linear_packed`` does not use it.
    """
    return torch.ops.fastattn.int8_pack_weight.default(weight)


if extension is not None:
    # (input, packed, weight, weight_scale, bias, activation): the op int8_linear_packed, without the time that
    # torch.ops takes to match arguments; or None if the weight has changed since it was packed, or if somebody wants to
    # see the call: a subclass of Tensor, a mode of torch functions, torch.jit.trace.
    int8_linear_if_packed = extension.int8_linear_if_packed

    @torch.library.register_fake("fastattn::quantize_int8")
    def _(input: Tensor) -> tuple[Tensor, Tensor]:
        q = input.new_empty(input.shape, dtype=torch.int8)
        return q, input.new_empty(input.shape[:-1], dtype=torch.float32)

    @torch.library.register_fake("fastattn::int8_matmul")
    def _(
        a: Tensor,
        b: Tensor,
        a_scale: Tensor,
        b_scale: Tensor,
        bias: Tensor | None,
        activation: str,
        out_dtype: torch.dtype,
    ) -> Tensor:
        return a.new_empty((a.shape[0], b.shape[0]), dtype=out_dtype)

    @torch.library.register_fake("fastattn::int8_linear")
    def _(input: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, activation: str) -> Tensor:
        return input.new_empty((*input.shape[:-1], weight.shape[0]))

    @torch.library.register_fake("fastattn::int8_linear_packed")
    def _(
        input: Tensor,
        packed_weight: Tensor,
        weight: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None,
        activation: str,
    ) -> Tensor:
        return input.new_empty((*input.shape[:-1], weight.shape[0]))

    @torch.library.register_fake("fastattn::int8_pack_weight")
    def _(weight: Tensor) -> Tensor:
        # Header, then for each panel of 32 columns its int32 compensation and its groups of 4 in k (int8_matmul.h).
        panels, groups = (weight.shape[0] + 31) // 32, (weight.shape[1] + 3) // 4
        return weight.new_empty((64 + panels * (32 * 4 + groups * 128),))
