"""Calls of the norm ops with their inputs, and the comparison with eager PyTorch and float64."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from accuracy import assert_as_accurate_as_eager
from devices import device_for
from torch import Tensor

import fastattn
from fastattn.dispatch import available_backends

OPS = ("layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
HALF = (torch.bfloat16, torch.float16)
needs_cpu = pytest.mark.skipif(
    available_backends()["cpu"] is not None, reason=f"no cpu backend: {available_backends()['cpu']}"
)


def dtype_id(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@contextmanager
def skip_refusals() -> Iterator[None]:
    """Skips the test, with the reason, where the backend asked for by name refuses the call."""
    try:
        yield
    except NotImplementedError as refusal:
        if "cannot run this" in str(refusal):
            pytest.skip(str(refusal))
        raise


def make_inputs(
    op, shape, dtype, *, affine="weight bias", normalized_dims=1, parameter_dtype=None, residual_dtype=None
):
    """The tensors that ``op`` takes, by name."""
    parameter_shape = shape[len(shape) - normalized_dims :]
    inputs = {"input": torch.randn(shape).mul(2).add(0.5).to(dtype)}
    if op.startswith("add"):
        inputs["residual"] = torch.randn(shape).to(residual_dtype or dtype)
    if "weight" in affine:
        inputs["weight"] = torch.randn(parameter_shape).to(parameter_dtype or dtype)
    if "bias" in affine and "layer" in op:
        inputs["bias"] = torch.randn(parameter_shape).to(parameter_dtype or dtype)
    return inputs


def evaluate(
    op, inputs, backend, *, normalized_dims=1, dtype=None, wanted=(0, 1), device=None, **options
) -> dict[str, Tensor]:
    """Outputs and gradients by name, on the CPU; ``dtype`` converts everything first. The same random numbers in every
    call."""
    device = device or device_for(backend)
    leaves = {name: t.to(device, dtype or t.dtype).detach().requires_grad_() for name, t in inputs.items()}
    shape = leaves["input"].shape[leaves["input"].dim() - normalized_dims :]
    torch.manual_seed(7)
    outputs = getattr(fastattn, op)(normalized_shape=shape, backend=backend, **leaves, **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(8)
    gradients = [torch.randn(o.shape, generator=generator, dtype=torch.float64, device="cpu") for o in outputs]
    # Every run must see the same numbers: rounded to what the outputs' dtypes hold in the run that is not converted.
    if dtype is not None:
        dtypes = [inputs["input"].dtype, inputs.get("residual", inputs["input"]).dtype]
        gradients = [g.to(d) for g, d in zip(gradients, dtypes, strict=False)]
    gradients = [g.to(o.device, o.dtype) for g, o in zip(gradients, outputs, strict=True)]
    used = [i for i in wanted if i < len(outputs)]
    computed = torch.autograd.grad([outputs[i] for i in used], list(leaves.values()), [gradients[i] for i in used],
                                   allow_unused=True)  # fmt: skip
    results = dict(zip(("out", "new_residual"), (o.detach().cpu() for o in outputs), strict=False))
    results.update({f"d{name}": g.cpu() for name, g in zip(leaves, computed, strict=True) if g is not None})
    return results


def _largest_rstd(op, normalized, *, normalized_dims=1, eps=None, **_) -> float:
    """1 / the smallest deviation of a row of ``normalized``, float64."""
    rows = normalized.flatten(-normalized_dims)
    if not rows.numel():
        return 1.0
    centred = rows - rows.mean(-1, keepdim=True) if "layer" in op else rows
    default = 1e-5 if "layer" in op else 0.0  # rms_norm's depends on the dtype and is smaller still
    variance = centred.square().mean(-1).min().item() + (default if eps is None else eps)
    return variance**-0.5 if variance > 0 else 1.0


def check(op, inputs, backend, **options) -> dict[str, Tensor]:
    """Asserts that ``backend`` is as accurate as eager, in every output and gradient; returns its results."""
    # On one device: each draws its own random numbers.
    options["device"] = device_for(backend)
    actual = evaluate(op, inputs, backend, **options)
    eager = evaluate(op, inputs, "eager", **options)
    reference = evaluate(op, inputs, "eager", dtype=torch.float64, **options)
    assert actual.keys() == eager.keys() == reference.keys()
    largest = max((g.abs().max().item() for n, g in reference.items() if n.startswith("d") and g.numel()), default=0)
    rstd = _largest_rstd(op, reference.get("new_residual", inputs["input"].double()), **options)
    for name, result in actual.items():
        # Rows of one element have gradient 0, the difference of terms as large as the parameters' gradients; in float64
        # (elsewhere eager's own error says so) times rstd.
        terms = largest * max(1.0, rstd) if result.dtype == torch.float64 else largest
        assert_as_accurate_as_eager(result, eager[name], reference[name], f"{op} {name}", terms=terms)
    return actual
