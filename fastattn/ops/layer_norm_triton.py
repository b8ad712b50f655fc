"""The norms on the Triton backend: ``torch.ops.fastattn.layer_norm_triton`` and its relatives, fakes and gradients.

They take what ``fastattn::layer_norm`` and its relatives take (csrc/ops.cpp), but need no compiled extension. Triton is
imported when one of them first runs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn import _triton
from fastattn.ops import layer_norm_compiled as compiled
from fastattn.ops import layer_norm_triton_launch as kernels
from fastattn.ops.calls import LayerNormCall
from fastattn.ops.philox import draw_rng_state
from fastattn.ops.tensor_checks import refuses_sharding

_DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))


def refuses(call: LayerNormCall) -> str | None:
    input, residual = call.input, call.residual
    reason = _triton.refuses_device(input, "input")
    if reason is not None:
        return reason
    for name, tensor in (("input", input), ("residual", residual)):
        if tensor is None:
            continue
        if tensor.layout is not torch.strided:
            return f"{name} is {tensor.layout}, not dense"
        if tensor.dtype not in _DTYPES:
            return f"{name} has dtype {tensor.dtype}, not float32, bfloat16 or float16"
    return refuses_sharding("input", input)


def norm(call: LayerNormCall) -> Tensor:
    """``layer_norm`` and ``rms_norm``."""
    _, input, _, weight, bias, eps, _, dims, rms = call
    return torch.ops.fastattn.layer_norm_triton.default(input, weight, bias, dims, eps, rms)[0]


def add_norm(call: LayerNormCall, rng_state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``add_layer_norm`` and ``add_rms_norm``; draws ``rng_state`` if it has to drop and none is given."""
    _, input, residual, weight, bias, eps, dropout_p, dims, rms = call
    if dropout_p > 0.0 and rng_state is None:
        rng_state = draw_rng_state(input.device)
    outputs = torch.ops.fastattn.add_layer_norm_triton.default(
        input, residual, weight, bias, rng_state, dropout_p, dims, eps, rms
    )
    return outputs[0], outputs[1]


# --- Ops -------------------------------------------------------------------------------------------------------------


def _layer_norm(input, weight, bias, normalized_dims, eps, rms):
    _check("layer_norm", input, normalized_dims, weight=weight, bias=bias)
    run = kernels.forward(input, None, weight, bias, kernels.dropout(None, 0.0), normalized_dims, eps, rms)
    return run.out, run.mean, run.rstd


def _add_layer_norm(input, residual, weight, bias, rng_state, dropout_p, normalized_dims, eps, rms):
    _check("add_layer_norm", input, normalized_dims, weight=weight, bias=bias, residual=residual, rng_state=rng_state)
    drop = _checked_dropout("add_layer_norm", rng_state, dropout_p)
    run = kernels.forward(input, residual, weight, bias, drop, normalized_dims, eps, rms)
    return run.out, run.new_residual, run.mean, run.rstd


def _layer_norm_backward(dout, input, mean, rstd, weight, normalized_dims, rms, need_dweight, need_dbias, bias_dtype):
    _check_backward("layer_norm_backward", dout, input, mean, rstd, weight, normalized_dims, rms, need_dweight,
                    need_dbias, bias_dtype)  # fmt: skip
    run = kernels.backward(
        dout, None, input, mean, rstd, weight, kernels.dropout(None, 0.0), normalized_dims, rms, need_dweight,
        need_dbias, bias_dtype, need_dinput=False,
    )  # fmt: skip
    return run.dx, run.dweight, run.dbias


def _add_layer_norm_backward(
    dout, dnew_residual, new_residual, mean, rstd, weight, rng_state, dropout_p, normalized_dims, rms, need_dweight,
    need_dbias, bias_dtype, input_dtype,
):  # fmt: skip
    _check_backward("add_layer_norm_backward", dout, new_residual, mean, rstd, weight, normalized_dims, rms,
                    need_dweight, need_dbias, bias_dtype, dnew_residual=dnew_residual, rng_state=rng_state)  # fmt: skip
    drop = _checked_dropout("add_layer_norm_backward", rng_state, dropout_p)
    need_dinput = not _gradients_are_one(dropout_p, input_dtype, new_residual)
    run = kernels.backward(
        dout, dnew_residual, new_residual, mean, rstd, weight, drop, normalized_dims, rms, need_dweight, need_dbias,
        bias_dtype, need_dinput,
    )  # fmt: skip
    return run.dinput, run.dx, run.dweight, run.dbias


def _gradients_are_one(dropout_p: float, input_dtype: torch.dtype, new_residual: Tensor) -> bool:
    return dropout_p == 0.0 and input_dtype == new_residual.dtype


def _check_backward(
    op, dout, x, mean, rstd, weight, normalized_dims, rms, need_dweight, need_dbias, bias_dtype, **more
):
    mean = None if rms else mean
    _check(op, x, normalized_dims, weight=weight, rstd=rstd, dout=dout, mean=mean, **more)
    if need_dweight and weight is None:
        raise ValueError(f"{op}: dweight needs a weight.")
    if need_dbias and bias_dtype is None:
        raise ValueError(f"{op}: dbias needs bias_dtype.")


def _checked_dropout(op: str, rng_state: Tensor | None, dropout_p: float) -> kernels.Dropout:
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"{op}: dropout_p must be in [0, 1], got {dropout_p}.")
    if dropout_p > 0.0 and rng_state is None:
        raise ValueError(f"{op}: dropout_p = {dropout_p} needs rng_state.")
    return kernels.dropout(rng_state, dropout_p)


def _check(op: str, x: Tensor, normalized_dims: int, **tensors: Tensor | None) -> None:
    """What the kernels need so as not to read past the end of a tensor: the ops may be called directly."""
    if not 1 <= normalized_dims <= x.dim():
        raise ValueError(f"{op}: normalized_dims must be from 1 to the dims of input, got {normalized_dims}.")
    leading, row = x.shape[: x.dim() - normalized_dims], x.shape[x.dim() - normalized_dims :]
    others = {"weight": row, "bias": row, "mean": leading, "rstd": leading, "rng_state": (2,)}
    for name, tensor in {"input": x, **tensors}.items():
        if tensor is None:
            continue
        expected = tuple(others.get(name, x.shape))
        if tensor.shape != expected:
            raise ValueError(f"{op}: {name} must be {expected}, got {tuple(tensor.shape)}.")
        if tensor.device != x.device:
            raise ValueError(f"{op}: {name} is on {tensor.device} but input is on {x.device}.")
        if name in ("mean", "rstd") and tensor.dtype != torch.float32:
            raise TypeError(f"{op}: {name} must be float32, got {tensor.dtype}.")
        if name == "rng_state" and (tensor.dtype != torch.int64 or not tensor.is_contiguous()):
            raise ValueError(f"{op}: rng_state must be contiguous int64.")
        if name not in others and tensor.dtype not in _DTYPES:
            raise TypeError(f"{op}: {name} must be float32, bfloat16 or float16, got {tensor.dtype}.")


# --- Gradients -------------------------------------------------------------------------------------------------------


def _save_layer_norm(ctx: Any, inputs: tuple, output: tuple) -> None:
    input, weight, bias, normalized_dims, _, rms = inputs
    _, mean, rstd = output
    ctx.save_for_backward(input, mean, rstd, weight)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    ctx.normalized_dims, ctx.rms = normalized_dims, rms
    ctx.bias_dtype = None if bias is None else bias.dtype


def _layer_norm_gradients(ctx: Any, dout: Tensor | None, *_: None) -> tuple:
    if dout is None:
        return (None,) * 6
    input, mean, rstd, weight = ctx.saved_tensors
    _, need_dweight, need_dbias, *_ = ctx.needs_input_grad
    dinput, dweight, dbias = torch.ops.fastattn.layer_norm_backward_triton.default(
        dout, input, mean, rstd, weight, ctx.normalized_dims, ctx.rms, need_dweight, need_dbias, ctx.bias_dtype
    )
    return dinput, dweight if need_dweight else None, dbias if need_dbias else None, None, None, None


def _save_add_layer_norm(ctx: Any, inputs: tuple, output: tuple) -> None:
    input, _, weight, bias, rng_state, dropout_p, normalized_dims, _, rms = inputs
    _, new_residual, mean, rstd = output
    ctx.save_for_backward(new_residual, mean, rstd, weight, rng_state)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    ctx.dropout_p, ctx.normalized_dims, ctx.rms, ctx.input_dtype = dropout_p, normalized_dims, rms, input.dtype
    ctx.bias_dtype = None if bias is None else bias.dtype


def _add_layer_norm_gradients(ctx: Any, dout: Tensor | None, dnew_residual: Tensor | None, *_: None) -> tuple:
    new_residual, mean, rstd, weight, rng_state = ctx.saved_tensors
    if dout is None:
        if dnew_residual is None:
            return (None,) * 9
        # Only new_residual was used: rare, and not worth a kernel of its own.
        dout = torch.zeros_like(new_residual, dtype=ctx.input_dtype)
    _, _, need_dweight, need_dbias, *_ = ctx.needs_input_grad
    dinput, dresidual, dweight, dbias = torch.ops.fastattn.add_layer_norm_backward_triton.default(
        dout, dnew_residual, new_residual, mean, rstd, weight, rng_state, ctx.dropout_p, ctx.normalized_dims, ctx.rms,
        need_dweight, need_dbias, ctx.bias_dtype, ctx.input_dtype,
    )  # fmt: skip
    if _gradients_are_one(ctx.dropout_p, ctx.input_dtype, new_residual):
        dinput = dresidual
    none = (None,) * 5
    return dinput, dresidual, dweight if need_dweight else None, dbias if need_dbias else None, *none


def _name_layer_norm(ctx: Any, inputs: tuple, output: tuple) -> None:
    *_, rms, _, _, _ = inputs
    ctx.op = "rms_norm" if rms else "layer_norm"


def _name_add_layer_norm(ctx: Any, inputs: tuple, output: tuple) -> None:
    *_, rms, _, _, _, _ = inputs
    ctx.op = "add_rms_norm" if rms else "add_layer_norm"


def _no_double_backward(ctx: Any, *gradients: Any) -> None:
    raise NotImplementedError(
        f"{ctx.op}: the kernels do not compute gradients of gradients. Use backend='eager', which does."
    )


# --- Registration ----------------------------------------------------------------------------------------------------

_LIBRARY = torch.library.Library("fastattn", "FRAGMENT")


def _define(name: str, schema: str, run: Any, fake: Any, gradients: Any, save: Any = None) -> None:
    _LIBRARY.define(name + schema, tags=torch.Tag.pt2_compliant_tag)
    for device in ("CUDA", "CPU"):  # CPU: Triton's interpreter
        _LIBRARY.impl(name, run, device)
    torch.library.register_fake(f"fastattn::{name}", fake, lib=_LIBRARY)
    torch.library.register_autograd(f"fastattn::{name}", gradients, setup_context=save, lib=_LIBRARY)


_define(
    "layer_norm_triton",
    "(Tensor input, Tensor? weight, Tensor? bias, int normalized_dims, float eps, bool rms) -> "
    "(Tensor out, Tensor mean, Tensor rstd)",
    _layer_norm,
    compiled.fake_layer_norm,
    _layer_norm_gradients,
    _save_layer_norm,
)
_define(
    "layer_norm_backward_triton",
    "(Tensor dout, Tensor input, Tensor mean, Tensor rstd, Tensor? weight, int normalized_dims, bool rms, "
    "bool need_dweight, bool need_dbias, ScalarType? bias_dtype) -> (Tensor dinput, Tensor dweight, Tensor dbias)",
    _layer_norm_backward,
    compiled.fake_layer_norm_backward,
    _no_double_backward,
    _name_layer_norm,
)
_define(
    "add_layer_norm_triton",
    "(Tensor input, Tensor residual, Tensor? weight, Tensor? bias, Tensor? rng_state, float dropout_p, "
    "int normalized_dims, float eps, bool rms) -> (Tensor out, Tensor new_residual, Tensor mean, Tensor rstd)",
    _add_layer_norm,
    compiled.fake_add_layer_norm,
    _add_layer_norm_gradients,
    _save_add_layer_norm,
)
_define(
    "add_layer_norm_backward_triton",
    "(Tensor dout, Tensor? dnew_residual, Tensor new_residual, Tensor mean, Tensor rstd, Tensor? weight, "
    "Tensor? rng_state, float dropout_p, int normalized_dims, bool rms, bool need_dweight, bool need_dbias, "
    "ScalarType? bias_dtype, ScalarType input_dtype) -> "
    "(Tensor dinput, Tensor dresidual, Tensor dweight, Tensor dbias)",
    _add_layer_norm_backward,
    compiled.fake_add_layer_norm_backward,
    _no_double_backward,
    _name_add_layer_norm,
)
