"""Layer norm, RMS norm and add + layer norm against F.layer_norm and F.rms_norm; eager forms are far slower still."""

from __future__ import annotations

if __name__ == "__main__":
    import os
    import runpy

    runpy.run_path(os.path.join(os.path.dirname(__file__), "by_path.py"))

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import fastattn
from bench.case import Case, Subject, as_accurate_as_eager, gradients, like, seeded_generator, torch_dtype
from fastattn import dispatch

GROUP = "layer_norm"
EPS = 1e-5
SHAPES = ((128, 768), (512, 768), (4096, 768), (4096, 4096), (16384, 1024))
SMALL_SHAPES = ((128, 768), (512, 768))  # where a call of autograd's engine takes as long as the kernel


def cases() -> Iterator[Case]:
    for direction in ("forward", "backward"):
        for rows, columns in SHAPES:
            yield norm("layer norm", direction, rows, columns)
    for rows, columns in SMALL_SHAPES:
        yield op_alone(rows, columns)
    for direction in ("forward", "backward"):
        for rows, columns in ((512, 768), (4096, 4096)):
            yield norm("rms norm", direction, rows, columns)
    yield norm("layer norm", "forward", 4096, 768, "bfloat16")
    for direction in ("forward", "backward"):
        for rows, columns in ((512, 768), (4096, 768)):
            yield norm("add + layer norm", direction, rows, columns)


# --- The definitions, for the check ----------------------------------------------------------------------------------


def eager_layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    centred = x.float() if x.dtype.itemsize < 4 else x
    centred = centred - centred.mean(-1, keepdim=True)
    normed = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + EPS)
    return (normed * weight + bias).to(x.dtype)


def eager_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * weight


def eager_add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    added = x + residual
    return eager_layer_norm(added, weight, bias), added


# --- Rows ------------------------------------------------------------------------------------------------------------

# op -> (ours, PyTorch's, the definition, how many tensors of rows x columns come before the weights, the weights)
Form = Callable[..., Tensor | tuple[Tensor, Tensor]]


def forms(op: str, columns: int) -> tuple[Form, Form, Form, int, tuple[str, ...]]:
    shape = (columns,)

    def torch_add(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        added = x + residual
        return F.layer_norm(added, shape, weight, bias, EPS), added

    return {
        "layer norm": (
            lambda x, weight, bias: fastattn.layer_norm(x, shape, weight, bias, EPS),
            lambda x, weight, bias: F.layer_norm(x, shape, weight, bias, EPS),
            eager_layer_norm, 1, ("weight", "bias"),
        ),
        "rms norm": (
            lambda x, weight: fastattn.rms_norm(x, shape, weight, EPS),
            lambda x, weight: F.rms_norm(x, shape, weight, EPS),
            eager_rms_norm, 1, ("weight",),
        ),
        "add + layer norm": (
            lambda x, residual, weight, bias: fastattn.add_layer_norm(x, residual, shape, weight, bias, EPS),
            torch_add, eager_add_layer_norm, 2, ("weight", "bias"),
        ),
    }[op]  # fmt: skip


def norm(op: str, direction: str, rows: int, columns: int, dtype: str = "float32") -> Case:
    tensor_bytes = rows * columns * torch_dtype(dtype).itemsize
    inputs = 2 if op.startswith("add") else 1
    # Tensors of rows x columns read and written: forward reads its inputs and writes out (and the sum); backward reads
    # dout and the input (and the sum's gradient) and writes the input's gradient, one buffer for both terms of a sum.
    streams = 2 * inputs if direction == "forward" else 2 + inputs
    return Case(
        GROUP, f"{op} {direction}", f"{rows}×{columns}", dtype, partial(build, op, direction, rows, columns, dtype),
        flops=rows * columns * (8 if direction == "forward" else 14), bytes=streams * tensor_bytes,
        quick=columns == 768 and rows >= 512,
        headline=f"{op} {direction}" if (rows, columns, dtype) == (512, 768, "float32") else "",
    )  # fmt: skip


def build(op: str, direction: str, rows: int, columns: int, dtype: str) -> Subject:
    ours, theirs, definition, activations, weights = forms(op, columns)
    generator = seeded_generator(0)
    kind, grad = torch_dtype(dtype), direction == "backward"
    tensors = [torch.randn(rows, columns, generator=generator).to(kind) for _ in range(activations)]
    tensors += [(1 + 0.1 * torch.randn(columns, generator=generator)).to(kind) for _ in weights]
    tensors = [tensor.requires_grad_(grad) for tensor in tensors]
    outputs = 2 if op.startswith("add") else 1
    douts = [torch.randn(rows, columns, generator=generator).to(kind) for _ in range(outputs)]

    def callee(form: Form, inputs: list[Tensor], cotangents: list[Tensor]) -> Callable[[], object]:
        if direction == "forward":
            return partial(form, *inputs)
        return partial(gradients, form(*inputs), inputs, cotangents)

    names = ("out", "new_residual")[:outputs]
    if grad:
        names = (*(("dx", "dresidual")[:activations]), *(f"d{weight}" for weight in weights))
    exact, exact_douts = like(tensors, torch.float64), [dout.double() for dout in douts]
    mine = callee(ours, tensors, douts)
    check = as_accurate_as_eager(
        mine, lambda: callee(definition, tensors, douts)(), lambda: callee(definition, exact, exact_douts)(), names
    )
    peer = {"layer norm": "F.layer_norm", "rms norm": "F.rms_norm", "add + layer norm": "add, F.layer_norm"}[op]
    return Subject(mine, {peer: callee(theirs, tensors, douts)}, check)


def op_alone(rows: int, columns: int) -> Case:
    """The backward without autograd's engine, which a network pays once for all its layers."""
    whole = norm("layer norm", "backward", rows, columns)
    return replace(whole, op=f"{whole.op}, op", build=partial(build_op_alone, rows, columns), quick=False, headline="")


def build_op_alone(rows: int, columns: int) -> Subject:
    if not dispatch.takes_cpu("auto"):
        raise NotImplementedError("the op that is timed alone is the CPU's")
    generator = seeded_generator(0)
    x, dout = (torch.randn(rows, columns, generator=generator) for _ in range(2))
    weight, bias = 1 + 0.1 * torch.randn(columns, generator=generator), torch.randn(columns, generator=generator)
    _, mean, rstd = torch.native_layer_norm(x, (columns,), weight, bias, EPS)
    row_mean, row_rstd = mean.flatten(), rstd.flatten()

    def ours() -> tuple[Tensor, ...]:
        return torch.ops.fastattn.layer_norm_backward.default(
            dout, x, row_mean, row_rstd, weight, 1, False, True, True, torch.float32
        )

    def theirs() -> tuple[Tensor, ...]:
        return torch.ops.aten.native_layer_norm_backward.default(
            dout, x, (columns,), mean, rstd, weight, bias, (True, True, True)
        )

    def definition(dtype: torch.dtype) -> tuple[Tensor, ...]:
        inputs = [tensor.to(dtype).requires_grad_() for tensor in (x, weight, bias)]
        return gradients(eager_layer_norm(*inputs), inputs, dout.to(dtype))

    names = ("dx", "dweight", "dbias")
    check = as_accurate_as_eager(ours, lambda: definition(torch.float32), lambda: definition(torch.float64), names)
    return Subject(ours, {"native_layer_norm_backward": theirs}, check)
