"""The tolerance itself can fail, and memory nobody wrote shows."""

from __future__ import annotations

import pytest
import torch
from accuracy import assert_as_accurate_as_eager, ulp


def test_ulp_is_the_spacing_of_the_dtype():
    assert ulp(1.0, torch.float32) == 2.0**-23
    assert ulp(3.9, torch.bfloat16) == 2.0**-6
    assert ulp(0.0, torch.float32) > 0


def test_accepts_twice_the_error_of_eager_and_no_more():
    reference = torch.tensor([1.0, 2.0], dtype=torch.float64)
    eager = reference.float() + torch.tensor([1e-3, 0.0])
    assert_as_accurate_as_eager(reference.float() + 1.9e-3, eager, reference)
    with pytest.raises(AssertionError, match="exceeds 2 x eager"):
        assert_as_accurate_as_eager(reference.float() + 2.1e-3, eager, reference)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_accepts_one_rounding_where_eager_is_exact(dtype):
    reference = torch.tensor([1.0], dtype=torch.float64)
    exact = reference.to(dtype)
    assert_as_accurate_as_eager(torch.nextafter(exact, exact + 1), exact, reference)
    with pytest.raises(AssertionError):
        assert_as_accurate_as_eager(exact * (1 + 300 * torch.finfo(dtype).eps), exact, reference)


@pytest.mark.parametrize(
    ("actual", "message"),
    [
        (torch.tensor([1.0, float("nan")]), "NaN"),
        (torch.tensor([1.0, float("inf")]), "infinities"),
        (torch.tensor([1.0]), "shape"),
        (torch.tensor([1.0, float("-inf")], dtype=torch.float64), "dtype"),
    ],
)
def test_rejects(actual, message):
    reference = torch.tensor([1.0, float("-inf")], dtype=torch.float64)
    with pytest.raises(AssertionError, match=message):
        assert_as_accurate_as_eager(actual, reference.float(), reference)


def test_terms_widen_the_floor_where_everything_cancels():
    zero = torch.zeros(1, dtype=torch.float64)
    with pytest.raises(AssertionError):
        assert_as_accurate_as_eager(torch.tensor([1e-8]), zero.float(), zero)
    assert_as_accurate_as_eager(torch.tensor([1e-8]), zero.float(), zero, terms=1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_unwritten_memory_is_nan(dtype):
    assert torch.empty(1000, dtype=dtype).isnan().all()
