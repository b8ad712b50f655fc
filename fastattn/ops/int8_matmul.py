"""INT8 matrix products: symmetric quantisation by row, exact int32 sums, fused scale, bias and activation."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn import dispatch
from fastattn.dispatch import Kernel, cuda_kernels, never_refuses
from fastattn.ops import int8_matmul_compiled as compiled
from fastattn.ops import int8_matmul_eager as eager
from fastattn.ops import int8_matmul_triton as triton
from fastattn.ops.calls import Int8LinearCall, Int8MatmulCall, QuantizeInt8Call
from fastattn.ops.tensor_checks import FLOATING, check_tensor

# Public name -> name in the op schemas.
ACTIVATIONS = {None: "none", "relu": "relu", "gelu": "gelu", "gelu_tanh": "gelu_tanh", "silu": "silu"}


# --- Public functions ------------------------------------------------------------------------------------------------


def quantize_int8(input: Tensor, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """Symmetric INT8 quantisation with one scale per row of the last dimension: ``input ≈ q * scale[..., None]``.

    ``scale = max|row| / 127``, ``q = round(row * (1 / scale))`` to the nearest, ties to even, in float32; so
    ``|q| <= 127`` and ``|input - q * scale| <= scale / 2`` (up to float32 rounding).

    Args:
        input: (..., K), float32, bfloat16, float16 or float64 (which is converted to float32 first).
    Returns: q (..., K) int8 and scale (...) float32, neither with a gradient. A row of zeros, or of no elements, has
        scale 1. No scale is below 2**-126. A row that holds NaN or infinity has q = 0 and scale NaN, so that what is
        computed from it is NaN.
    Raises: TypeError for another dtype; ValueError for a 0-dimensional input; NotImplementedError, with reasons, if
        ``backend`` cannot run the input.
    """
    call = _prepare_quantize(input)
    return dispatch.select("quantize_int8", call, backend).run(call)


def int8_matmul(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    out_dtype: torch.dtype = torch.float32,
    backend: str = "auto",
) -> Tensor:
    """``activation((a @ b.T) * a_scale[:, None] * b_scale + bias)`` of int8 matrices, in one pass.

    The sums are exact: of int32 up to K = 131071, beyond which an int32 may overflow and eager runs; scales, bias and
    activation are applied in float32, then the result is converted.

    Args:
        a: (M, K) int8.
        b: (N, K) int8: row n makes column n of the result, as the weight of ``nn.Linear`` does.
        a_scale, b_scale: (M,) and (N,) float32, as ``quantize_int8`` returns them.
        bias: (N,) floating.
        activation: None, ``"relu"``, ``"gelu"`` (erf), ``"gelu_tanh"`` or ``"silu"``.
        out_dtype: float32, bfloat16, float16 or float64.
    Returns: (M, N) of ``out_dtype``. Differentiable in scales and bias, by the eager backend only.
    Raises: TypeError for other dtypes, ValueError for shapes that disagree or an unknown activation,
        NotImplementedError, with reasons, if ``backend`` cannot run the inputs.
    """
    call = _prepare_matmul(a, b, a_scale, b_scale, bias, activation=activation, out_dtype=out_dtype)
    return dispatch.select("int8_matmul", call, backend).run(call)


def int8_linear(
    input: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    backend: str = "auto",
) -> Tensor:
    """A linear layer with int8 weights: quantises ``input`` by row, multiplies, and applies bias and activation.

    Equals ``int8_matmul(*quantize_int8(input), ...)`` in one fused op. On the CPU every call packs the weight, which
    ``Int8Linear`` keeps packed; on a GPU the weight is read as it is (if K is no multiple of 16, from an aligned copy).

    Args:
        input: (..., K), float32, bfloat16, float16 or float64 (computed in float32).
        weight: (N, K) int8; weight_scale: (N,) float32. ``quantize_int8`` makes both from a float weight.
        bias: (N,) floating.
        activation: None, ``"relu"``, ``"gelu"`` (erf), ``"gelu_tanh"`` or ``"silu"``, after the bias.
    Returns: (..., N), dtype of ``input``. Differentiable in ``input``, straight through its rounding
        (``dout @ (weight * weight_scale[:, None])``), and in ``bias``, also twice.
    Raises: TypeError for other dtypes, ValueError for shapes that disagree, an unknown activation, or a weight_scale
        that requires grad, NotImplementedError, with reasons, if ``backend`` cannot run the inputs.
    """
    call = _prepare_linear(input, weight, weight_scale, bias, activation=activation)
    return dispatch.select("int8_linear", call, backend).run(call)


# --- Meaning ---------------------------------------------------------------------------------------------------------


def _check_floating(op: str, name: str, dtype: torch.dtype) -> None:
    if not isinstance(dtype, torch.dtype) or dtype not in FLOATING:
        raise TypeError(f"{op}: {name} must be float32, bfloat16, float16 or float64, got {dtype}.")


def _check_int8_matrix(op: str, name: str, tensor: Tensor) -> None:
    check_tensor(op, name, tensor)
    if tensor.dtype != torch.int8:
        raise TypeError(f"{op}: {name} must be int8, got {tensor.dtype}; quantize_int8 makes it from a float tensor.")
    if tensor.dim() != 2:
        raise ValueError(f"{op}: {name} must be a matrix, got shape {tuple(tensor.shape)}.")


def _check_scale(op: str, name: str, scale: Tensor, count: int) -> None:
    check_tensor(op, name, scale)
    if scale.dtype != torch.float32:
        raise TypeError(f"{op}: {name} must be float32, got {scale.dtype}; half precision would lose accuracy.")
    if scale.dim() != 1 or scale.shape[0] != count:
        raise ValueError(f"{op}: {name} must have shape ({count},), one scale per row, got {tuple(scale.shape)}.")


def _check_bias(op: str, bias: Tensor | None, count: int) -> None:
    if bias is None:
        return
    check_tensor(op, "bias", bias)
    _check_floating(op, "bias", bias.dtype)
    if bias.dim() != 1 or bias.shape[0] != count:
        raise ValueError(f"{op}: bias must have shape ({count},), got {tuple(bias.shape)}.")


def _check_devices(op: str, **tensors: Tensor | None) -> None:
    devices = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
    if len(set(devices.values())) > 1:
        placed = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ValueError(f"{op}: all tensors must be on one device, got {placed}.")


def _activation_name(op: str, activation: str | None) -> str:
    if not (activation is None or isinstance(activation, str)) or activation not in ACTIVATIONS:
        known = ", ".join(map(repr, ACTIVATIONS))
        raise ValueError(f"{op}: activation must be one of {known}, got {activation!r}.")
    return ACTIVATIONS[activation]


def _prepare_quantize(input: Tensor) -> QuantizeInt8Call:
    check_tensor("quantize_int8", "input", input)
    _check_floating("quantize_int8", "input", input.dtype)
    if input.dim() == 0:
        raise ValueError("quantize_int8: input must have at least one dimension, got a scalar.")
    return QuantizeInt8Call(input)


def _prepare_matmul(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    out_dtype: torch.dtype = torch.float32,
) -> Int8MatmulCall:
    op = "int8_matmul"
    _check_int8_matrix(op, "a", a)
    _check_int8_matrix(op, "b", b)
    if a.shape[1] != b.shape[1]:
        raise ValueError(
            f"{op}: a has K = {a.shape[1]} but b has K = {b.shape[1]} (a: {tuple(a.shape)}, b: {tuple(b.shape)}); "
            "they must be equal, b being (N, K) like the weight of nn.Linear."
        )
    _check_scale(op, "a_scale", a_scale, a.shape[0])
    _check_scale(op, "b_scale", b_scale, b.shape[0])
    _check_bias(op, bias, b.shape[0])
    _check_floating(op, "out_dtype", out_dtype)
    _check_devices(op, a=a, b=b, a_scale=a_scale, b_scale=b_scale, bias=bias)
    return Int8MatmulCall(a, b, a_scale, b_scale, bias, _activation_name(op, activation), out_dtype)


def _prepare_linear(
    input: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    packed: Tensor | None = None,
) -> Int8LinearCall:
    op = "int8_linear"
    check_tensor(op, "input", input)
    _check_floating(op, "input", input.dtype)
    _check_int8_matrix(op, "weight", weight)
    columns, depth = weight.shape
    if input.dim() == 0 or input.shape[-1] != depth:
        raise ValueError(
            f"{op}: input has shape {tuple(input.shape)} but weight has shape {tuple(weight.shape)}; "
            f"the last dimension of input must be {depth}."
        )
    _check_scale(op, "weight_scale", weight_scale, columns)
    _check_bias(op, bias, columns)
    if weight_scale.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{op}: weight_scale requires grad, but only input and bias get one; detach it.")
    _check_devices(op, input=input, weight=weight, weight_scale=weight_scale, bias=bias)
    return Int8LinearCall(input, weight, weight_scale, bias, _activation_name(op, activation), packed)


# --- Backends --------------------------------------------------------------------------------------------------------


_QUANTIZE_CUDA, _QUANTIZE_EMULATED = cuda_kernels(compiled.refuses_cuda_quantize, compiled.quantize_int8)
dispatch.register(
    "quantize_int8",
    _QUANTIZE_CUDA,
    Kernel("triton", triton.refuses_quantize, triton.quantize_int8),
    Kernel("cpu", compiled.refuses_cpu_quantize, compiled.quantize_int8),
    Kernel("eager", never_refuses, eager.quantize_int8),
    _QUANTIZE_EMULATED,
    prepare=_prepare_quantize,
)
_MATMUL_CUDA, _MATMUL_EMULATED = cuda_kernels(compiled.refuses_cuda_matmul, compiled.int8_matmul)
dispatch.register(
    "int8_matmul",
    _MATMUL_CUDA,
    Kernel("triton", triton.refuses_matmul, triton.int8_matmul),
    Kernel("cpu", compiled.refuses_cpu_matmul, compiled.int8_matmul),
    Kernel("eager", never_refuses, eager.int8_matmul),
    _MATMUL_EMULATED,
    prepare=_prepare_matmul,
)
_LINEAR_CUDA, _LINEAR_EMULATED = cuda_kernels(compiled.refuses_cuda_linear, compiled.int8_linear)
dispatch.register(
    "int8_linear",
    _LINEAR_CUDA,
    Kernel("triton", triton.refuses_linear, triton.int8_linear),
    Kernel("cpu", compiled.refuses_cpu_linear, compiled.int8_linear),
    Kernel("eager", never_refuses, eager.int8_linear),
    _LINEAR_EMULATED,
    prepare=_prepare_linear,
)
