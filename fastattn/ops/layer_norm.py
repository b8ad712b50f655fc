"""Layer norm and RMS norm, and both fused with the residual addition before them."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral

import torch
from torch import Tensor

from fastattn.dispatch import Kernel, cuda_kernels, never_refuses, register, select, takes_cpu
from fastattn.ops import layer_norm_compiled, layer_norm_eager, layer_norm_triton
from fastattn.ops.calls import LayerNormCall
from fastattn.ops.tensor_checks import FLOATING, check_dense, check_number, check_probability


def layer_norm(
    input: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    backend: str = "auto",
) -> Tensor:
    """Layer norm, ``(x - mean) / sqrt(variance + eps) * weight + bias`` over the last dims of ``input``.

    Args:
        input: (..., *normalized_shape), float32, float16, bfloat16 or float64. Rows at any stride are read where they
            are; a last dim that is not contiguous is copied.
        normalized_shape: the sizes of the last dims, over which mean and (biased) variance are taken.
        weight, bias: ``normalized_shape``, any floating dtype: float32 parameters with 16-bit inputs are fine. Either
            may be None.
        eps: added to the variance.
        backend: which kernel runs, see ``fastattn.use_backend``.
    Returns: shape and dtype of ``input``, contiguous. Statistics are float32 (float64 for float64 inputs); where a
        row's squares overflow them, from about 1e19 on, its normalised elements are 0 or NaN, as they are in PyTorch.
    Raises: ValueError for shapes or devices that disagree; TypeError for dtypes that are not floating;
        NotImplementedError, with the reason, if ``backend`` cannot run the inputs.
    Source: Ba, Kiros, Hinton 2016 (arXiv:1607.06450).
    """
    if not torch.compiler.is_compiling() and takes_cpu(backend):
        out = layer_norm_compiled.layer_norm_if_plain(input, normalized_shape, weight, bias, eps)
        if out is not None:
            return out
    call = _prepare_layer_norm(input, normalized_shape, weight, bias, eps)
    return select("layer_norm", call, backend).run(call)


def rms_norm(
    input: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """RMS norm, ``x / sqrt(mean(x * x) + eps) * weight`` over the last dims of ``input``.

    Args:
        input, normalized_shape, weight, backend: as in :func:`layer_norm`.
        eps: added to the mean square. None = the machine epsilon of the dtype that statistics have (float32, or float64
            for float64 inputs), as ``torch.nn.functional.rms_norm`` has it.
    Returns: shape and dtype of ``input``, contiguous. Rows whose squares overflow the statistics are 0.
    Raises: as :func:`layer_norm`.
    Source: Zhang, Sennrich 2019 (arXiv:1910.07467).
    """
    if not torch.compiler.is_compiling() and takes_cpu(backend):
        out = layer_norm_compiled.rms_norm_if_plain(input, normalized_shape, weight, eps)
        if out is not None:
            return out
    call = _prepare_rms_norm(input, normalized_shape, weight, eps)
    return select("rms_norm", call, backend).run(call)


def add_layer_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    dropout_p: float = 0.0,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The end of one Transformer sub-layer and the start of the next, in one pass over memory::

        new_residual = residual + dropout(input)
        output = layer_norm(new_residual, normalized_shape, weight, bias, eps)

    Args:
        input: (..., *normalized_shape), as in :func:`layer_norm`; what a sub-layer returned.
        residual: shape and device of ``input``. Its dtype may differ: a float32 residual stream keeps its precision
            through 16-bit sub-layers.
        normalized_shape, weight, bias, eps, backend: as in :func:`layer_norm`.
        dropout_p: probability that an element of ``input`` is dropped, the others being divided by ``1 - dropout_p``.
            The seed comes from torch's generator, which is left alone when ``dropout_p`` is 0.
    Returns: ``(output, new_residual)``, contiguous, shape of ``input``; ``output`` has the dtype of ``input``,
        ``new_residual`` that of ``residual``. What is normalised is ``new_residual`` as it is returned, rounded.
    Raises: as :func:`layer_norm`; ValueError for a ``dropout_p`` outside [0, 1].
    """
    if dropout_p == 0.0 and not torch.compiler.is_compiling() and takes_cpu(backend):
        outputs = layer_norm_compiled.add_layer_norm_if_plain(input, residual, normalized_shape, weight, bias, eps)
        if outputs is not None:
            return outputs
    call = _prepare_add_layer_norm(input, residual, normalized_shape, weight, bias, eps, dropout_p=dropout_p)
    return select("add_layer_norm", call, backend).run(call)


def add_rms_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    dropout_p: float = 0.0,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """:func:`add_layer_norm` with RMS norm::

        new_residual = residual + dropout(input)
        output = rms_norm(new_residual, normalized_shape, weight, eps)

    Args, returns and raises: as :func:`add_layer_norm`, ``eps`` as in :func:`rms_norm`.
    """
    if dropout_p == 0.0 and not torch.compiler.is_compiling() and takes_cpu(backend):
        outputs = layer_norm_compiled.add_rms_norm_if_plain(input, residual, normalized_shape, weight, eps)
        if outputs is not None:
            return outputs
    call = _prepare_add_rms_norm(input, residual, normalized_shape, weight, eps, dropout_p=dropout_p)
    return select("add_rms_norm", call, backend).run(call)


# --- What the arguments mean -----------------------------------------------------------------------------------------


def _describe(shape: Sequence[int]) -> str:
    return str(tuple(shape))


def _as_tuple(op: str, normalized_shape: int | Sequence[int]) -> tuple[int, ...]:
    if isinstance(normalized_shape, (int, Integral)):
        return (normalized_shape,)
    if not isinstance(normalized_shape, Sequence):
        got = type(normalized_shape).__name__
        raise TypeError(f"{op}: normalized_shape must be an int or a sequence of ints, got {got}.")
    if not all(isinstance(size, (int, torch.SymInt, Integral)) for size in normalized_shape):
        raise TypeError(f"{op}: normalized_shape must be an int or a sequence of ints, got {normalized_shape!r}.")
    return tuple(normalized_shape)


def _checked_eps(op: str, eps: float) -> float:
    check_number(op, "eps", eps)
    return float(eps)


def _check_norm(
    op: str, input: Tensor, normalized_shape: int | Sequence[int], weight: Tensor | None, bias: Tensor | None
) -> int:
    """Checks what the four functions share; returns how many dims are normalised."""
    if not isinstance(input, Tensor):
        raise TypeError(f"{op}: input must be a tensor, got {type(input).__name__}.")
    check_dense(op, "input", input)
    shape = _as_tuple(op, normalized_shape)
    dims = len(shape)
    if dims == 0:
        raise ValueError(f"{op}: normalized_shape is empty; it must name at least the last dim of input.")
    if input.shape[-dims:] != shape:
        raise ValueError(
            f"{op}: normalized_shape is {_describe(shape)} but input is {_describe(input.shape)}; "
            f"the last {dims} dim(s) of input must be equal to it."
        )
    if input.dtype not in FLOATING:
        raise TypeError(
            f"{op}: input must be float32, bfloat16, float16 or float64, got {input.dtype}. Convert it, e.g. with "
            "input.float()."
        )
    if weight is not None:
        _check_parameter(op, "weight", weight, shape, input)
    if bias is not None:
        _check_parameter(op, "bias", bias, shape, input)
    return dims


def _check_parameter(op: str, name: str, parameter: Tensor, shape: tuple[int, ...], input: Tensor) -> None:
    if not isinstance(parameter, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor or None, got {type(parameter).__name__}.")
    check_dense(op, name, parameter)
    if parameter.shape != shape:
        raise ValueError(
            f"{op}: {name} is {_describe(parameter.shape)} but normalized_shape is {_describe(shape)}; "
            "they must be equal."
        )
    if not parameter.is_floating_point():
        raise TypeError(f"{op}: {name} must be floating, got {parameter.dtype}.")
    if parameter.device != input.device:
        raise ValueError(f"{op}: {name} is on {parameter.device} but input is on {input.device}; move one of them.")


def _check_residual(op: str, input: Tensor, residual: Tensor, dropout_p: float) -> None:
    if not isinstance(residual, Tensor):
        raise TypeError(f"{op}: residual must be a tensor, got {type(residual).__name__}.")
    check_dense(op, "residual", residual)
    if residual.shape != input.shape:
        raise ValueError(
            f"{op}: residual is {_describe(residual.shape)} but input is {_describe(input.shape)}; they must be equal."
        )
    if residual.dtype not in FLOATING:
        raise TypeError(f"{op}: residual must be float32, bfloat16, float16 or float64, got {residual.dtype}.")
    if residual.device != input.device:
        raise ValueError(f"{op}: residual is on {residual.device} but input is on {input.device}; move one of them.")
    check_probability(op, "dropout_p", dropout_p)


def _rms_eps(op: str, eps: float | None, dtype: torch.dtype) -> float:
    if eps is not None:
        return _checked_eps(op, eps)
    return torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps


def _prepare_layer_norm(input, normalized_shape, weight=None, bias=None, eps=1e-5) -> LayerNormCall:
    dims = _check_norm("layer_norm", input, normalized_shape, weight, bias)
    eps = _checked_eps("layer_norm", eps)
    return LayerNormCall("layer_norm", input, None, weight, bias, eps, 0.0, dims, False)


def _prepare_rms_norm(input, normalized_shape, weight=None, eps=None) -> LayerNormCall:
    dims = _check_norm("rms_norm", input, normalized_shape, weight, None)
    return LayerNormCall("rms_norm", input, None, weight, None, _rms_eps("rms_norm", eps, input.dtype), 0.0, dims, True)


def _prepare_add_layer_norm(
    input, residual, normalized_shape, weight=None, bias=None, eps=1e-5, *, dropout_p=0.0
) -> LayerNormCall:
    dims = _check_norm("add_layer_norm", input, normalized_shape, weight, bias)
    eps = _checked_eps("add_layer_norm", eps)
    _check_residual("add_layer_norm", input, residual, dropout_p)
    return LayerNormCall("add_layer_norm", input, residual, weight, bias, eps, float(dropout_p), dims, False)


def _prepare_add_rms_norm(input, residual, normalized_shape, weight=None, eps=None, *, dropout_p=0.0) -> LayerNormCall:
    dims = _check_norm("add_rms_norm", input, normalized_shape, weight, None)
    _check_residual("add_rms_norm", input, residual, dropout_p)
    eps = _rms_eps("add_rms_norm", eps, residual.dtype)
    return LayerNormCall("add_rms_norm", input, residual, weight, None, eps, float(dropout_p), dims, True)


# --- The table -------------------------------------------------------------------------------------------------------

_CUDA, _EMULATED = cuda_kernels(layer_norm_compiled.refuses_cuda, layer_norm_compiled.norm)
_NORM = (
    _CUDA,
    Kernel("triton", layer_norm_triton.refuses, layer_norm_triton.norm),
    Kernel("cpu", layer_norm_compiled.refuses_cpu, layer_norm_compiled.norm),
    Kernel("eager", never_refuses, layer_norm_eager.norm),
    _EMULATED,
)
_ADD_CUDA, _ADD_EMULATED = cuda_kernels(layer_norm_compiled.refuses_cuda, layer_norm_compiled.add_norm)
_ADD_NORM = (
    _ADD_CUDA,
    Kernel("triton", layer_norm_triton.refuses, layer_norm_triton.add_norm),
    Kernel("cpu", layer_norm_compiled.refuses_cpu, layer_norm_compiled.add_norm),
    Kernel("eager", never_refuses, layer_norm_eager.add_norm),
    _ADD_EMULATED,
)
register("layer_norm", *_NORM, prepare=_prepare_layer_norm)
register("rms_norm", *_NORM, prepare=_prepare_rms_norm)
register("add_layer_norm", *_ADD_NORM, prepare=_prepare_add_layer_norm)
register("add_rms_norm", *_ADD_NORM, prepare=_prepare_add_rms_norm)
