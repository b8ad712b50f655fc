"""The one tolerance of the test suite: as accurate as eager PyTorch in the same dtype, judged against float64."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# A float64 result is judged against another float64 computation, which is no more exact than itself: both may round.
# Elsewhere the reference counts as exact and one ulp covers a final rounding where eager happens to be exact.
_FLOOR_ULPS = {torch.float64: 256.0}


def ulp(magnitude: float, dtype: torch.dtype) -> float:
    """The spacing of ``dtype`` at ``magnitude``, never below its smallest normal number's."""
    info = torch.finfo(dtype)
    exponent = torch.frexp(torch.tensor(max(magnitude, info.tiny), dtype=torch.float64)).exponent.item() - 1
    return info.eps * 2.0**exponent


def max_error(tensor: Tensor, reference: Tensor) -> float:
    """The largest absolute error over the elements that are finite in the reference; 0 for an empty tensor."""
    finite = torch.isfinite(reference)
    error = (tensor.double() - reference.double())[finite].abs()
    return error.max().item() if error.numel() else 0.0


def allowed_error(
    eager: Tensor, reference: Tensor, *, terms: float = 0.0, dtype: torch.dtype | None = None, rounding: float = 0.0
) -> float:
    """``2 * max|eager - reference| + 1 ulp`` in eager's dtype: how far from the float64 reference a kernel may be.

    The options are those of `assert_as_accurate_as_eager`.
    """
    finite = reference[torch.isfinite(reference)]
    magnitude = max(finite.abs().max().item() if finite.numel() else 0.0, terms)
    floor = _FLOOR_ULPS.get(eager.dtype, 1.0) * ulp(magnitude, dtype or eager.dtype)
    return 2 * max_error(eager, reference) + floor + rounding


def assert_as_accurate_as_eager(
    actual: Tensor,
    eager: Tensor,
    reference: Tensor,
    name: str = "",
    *,
    terms: float = 0.0,
    dtype: torch.dtype | None = None,
    rounding: float = 0.0,
) -> None:
    """Asserts that ``max|actual - reference| <= 2 * max|eager - reference| + 1 ulp``.

    Args:
        actual: the result under test.
        eager: eager PyTorch's result in the same dtype; ``actual`` must have its shape and dtype.
        reference: the same computation in float64. Where it is infinite ``actual`` must be the same infinity.
        name: names the tensor in the message.
        terms: the size of the terms that were summed, where they cancel: the ulp is taken at the larger of this and the
            largest element (a sum whose terms cancel exactly has size 0, but nobody computes it to that precision).
        dtype: the dtype of the ulp, default ``actual``'s. A float32 gradient of a bfloat16 computation has rounded to
            bfloat16 on its way.
        rounding: an absolute error to allow besides, derived by the caller, where a kernel has to round something that
            eager does not.
    """
    label = name or "result"
    assert actual.dtype == eager.dtype, f"{label}: dtype {actual.dtype}, expected {eager.dtype}"
    assert actual.shape == eager.shape, f"{label}: shape {tuple(actual.shape)}, expected {tuple(eager.shape)}"
    assert reference.shape == eager.shape, f"{label}: reference has shape {tuple(reference.shape)}"
    assert reference.dtype == torch.float64, f"{label}: the reference must be float64, got {reference.dtype}"
    assert not torch.isnan(reference).any(), f"{label}: the reference has NaN"
    assert not torch.isnan(actual).any(), f"{label}: {int(torch.isnan(actual).sum())} NaN of {actual.numel()} elements"
    infinite = torch.isinf(reference)
    assert torch.equal(actual.double()[infinite], reference[infinite]), f"{label}: infinities differ"

    error = max_error(actual, reference)
    allowed = allowed_error(eager, reference, terms=terms, dtype=dtype, rounding=rounding)
    assert error <= allowed, (
        f"{label}: max error {error:.3e} exceeds 2 x eager's {max_error(eager, reference):.3e} + an ulp = {allowed:.3e}"
        f" (shape {tuple(actual.shape)}, {actual.dtype})"
    )


def assert_model_as_accurate_as_eager(
    actual: Sequence[Tensor], eager: Sequence[Tensor], exact: Sequence[Tensor]
) -> None:
    """For the outputs, the loss, if it is among them, and the gradients of a model, in that order.

    In float32 each tensor is held to the rule. In 16 bits the loss of one batch and a gradient's largest element tell
    of luck: all gradients together are compared as one vector, by its length. Models with a ReLU are not to be judged
    so: one rounding decides whether it passes a gradient.
    """
    if actual[0].dtype == torch.float32:
        for each in zip(actual, eager, exact, strict=True):
            assert_as_accurate_as_eager(*each, terms=1.0)
        return
    assert_as_accurate_as_eager(actual[0], eager[0], exact[0], terms=1.0)
    for loss, exact_loss in zip(actual[1:], exact[1:], strict=True):
        assert loss.dim() > 0 or abs(loss.item() - exact_loss.item()) <= 1e-3 * abs(exact_loss.item())

    def gradients(results: Sequence[Tensor]) -> Tensor:
        return torch.cat([t.flatten().double() for t in results[1:] if t.dim() > 0])

    def distance(results: Sequence[Tensor]) -> float:
        return ((gradients(results) - gradients(exact)).norm() / gradients(exact).norm()).item()

    assert distance(actual) <= 2 * distance(eager) + 0.005, f"{distance(actual):.1e}, eager {distance(eager):.1e}"
