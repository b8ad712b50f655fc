"""The face of ``torch.ops.fastattn.layer_norm`` and its relatives: when they run, how they are called, their fakes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastattn._extension import extension, short_way
from fastattn.dispatch import refuses_device
from fastattn.ops.calls import LayerNormCall
from fastattn.ops.philox import draw_rng_state
from fastattn.ops.tensor_checks import refuses_sharding

_CPU_DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16, torch.float64))
_CUDA_DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))
_CUDA_MAX_COLS = 2**30


def refuses_cpu(call: LayerNormCall) -> str | None:
    input = call.input
    if input.device.type != "cpu":
        return f"input is on {input.device}"
    if input.layout is not torch.strided:
        return f"input is {input.layout}, not dense"
    if input.dtype not in _CPU_DTYPES:
        return f"input has dtype {input.dtype}, not float32, bfloat16, float16 or float64"
    return refuses_sharding("input", call.input) or _refuses_residual(call)


def refuses_cuda(call: LayerNormCall, device_type: str) -> str | None:
    reason = refuses_device("input", call.input, device_type)
    if reason is not None:
        return reason
    if call.input.dtype not in _CUDA_DTYPES:
        return f"input has dtype {call.input.dtype}, not float32, bfloat16 or float16"
    cols = call.input.shape[call.input.dim() - call.normalized_dims :].numel()
    if cols > _CUDA_MAX_COLS:
        return f"rows have {cols} elements, more than {_CUDA_MAX_COLS}"
    return refuses_sharding("input", call.input) or _refuses_residual(call)


def _refuses_residual(call: LayerNormCall) -> str | None:
    input, residual = call.input, call.residual
    if residual is None or residual.dtype == input.dtype:
        return None
    if residual.dtype == torch.float32 and input.dtype != torch.float64:
        return None
    return (
        f"residual has dtype {residual.dtype} but input has {input.dtype}; "
        "they must be equal, or residual float32 and input of 16 bits"
    )


def norm(call: LayerNormCall) -> Tensor:
    """``layer_norm`` and ``rms_norm``."""
    _, input, _, weight, bias, eps, _, dims, rms = call
    return torch.ops.fastattn.layer_norm.default(input, weight, bias, dims, eps, rms)[0]


def add_norm(call: LayerNormCall, rng_state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``add_layer_norm`` and ``add_rms_norm``; draws ``rng_state`` if it has to drop and none is given."""
    _, input, residual, weight, bias, eps, dropout_p, dims, rms = call
    if dropout_p > 0.0 and rng_state is None:
        rng_state = draw_rng_state(input.device)
    outputs = torch.ops.fastattn.add_layer_norm.default(
        input, residual, weight, bias, rng_state, dropout_p, dims, eps, rms
    )
    return outputs[0], outputs[1]


# (input, normalized_shape, weight, bias, eps): layer_norm of plain tensors on the CPU without the general way's checks,
# which cost as much as the kernel at 64 rows of 768; None where the call is not one of these, which then says why.
layer_norm_if_plain: Callable[..., Tensor | None] = short_way("layer_norm_if_plain")
# (input, normalized_shape, weight, eps), the same for rms_norm.
rms_norm_if_plain: Callable[..., Tensor | None] = short_way("rms_norm_if_plain")
# (input, residual, normalized_shape, weight, bias, eps) and, of RMS norm, (…, weight, eps), without dropout.
add_layer_norm_if_plain: Callable[..., tuple[Tensor, Tensor] | None] = short_way("add_layer_norm_if_plain")
add_rms_norm_if_plain: Callable[..., tuple[Tensor, Tensor] | None] = short_way("add_rms_norm_if_plain")


# --- Fake kernels ----------------------------------------------------------------------------------------------------


def _statistics_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _fake_statistics(x, normalized_dims, rms):
    shape, dtype = x.shape[: x.dim() - normalized_dims], _statistics_dtype(x)
    return x.new_empty((0,) if rms else shape, dtype=dtype), x.new_empty(shape, dtype=dtype)


def fake_layer_norm(input, weight, bias, normalized_dims, eps, rms):
    return (input.new_empty(input.shape), *_fake_statistics(input, normalized_dims, rms))


def fake_add_layer_norm(input, residual, weight, bias, rng_state, dropout_p, normalized_dims, eps, rms):
    statistics = _fake_statistics(residual, normalized_dims, rms)
    return input.new_empty(input.shape), residual.new_empty(input.shape), *statistics


def _fake_parameter_gradients(x, weight, normalized_dims, need_dweight, need_dbias, bias_dtype):
    shape, dtype = x.shape[x.dim() - normalized_dims :], _statistics_dtype(x)
    dweight = x.new_empty(shape if need_dweight else (0,), dtype=dtype if weight is None else weight.dtype)
    dbias = x.new_empty(shape if need_dbias else (0,), dtype=bias_dtype or dtype)
    return dweight, dbias


def fake_layer_norm_backward(
    dout, input, mean, rstd, weight, normalized_dims, rms, need_dweight, need_dbias, bias_dtype
):  # fmt: skip
    gradients = _fake_parameter_gradients(input, weight, normalized_dims, need_dweight, need_dbias, bias_dtype)
    return input.new_empty(input.shape), *gradients


def fake_add_layer_norm_backward(
    dout, dnew_residual, new_residual, mean, rstd, weight, rng_state, dropout_p, normalized_dims, rms, need_dweight,
    need_dbias, bias_dtype, input_dtype,
):  # fmt: skip
    same = dropout_p == 0.0 and input_dtype == new_residual.dtype
    dinput = new_residual.new_empty((0,) if same else new_residual.shape, dtype=input_dtype)
    gradients = _fake_parameter_gradients(new_residual, weight, normalized_dims, need_dweight, need_dbias, bias_dtype)
    return dinput, new_residual.new_empty(new_residual.shape), *gradients


if extension is not None:
    torch.library.register_fake("fastattn::layer_norm")(fake_layer_norm)
    torch.library.register_fake("fastattn::layer_norm_backward")(fake_layer_norm_backward)
    torch.library.register_fake("fastattn::add_layer_norm")(fake_add_layer_norm)
    torch.library.register_fake("fastattn::add_layer_norm_backward")(fake_add_layer_norm_backward)
