"""What every op asks of its operands, whatever they mean."""

from __future__ import annotations

from numbers import Real
from typing import Any

import torch
from torch import Tensor


def check_dense(op: str, name: str, tensor: Tensor) -> None:
    if tensor.layout != torch.strided or tensor.is_nested:
        raise TypeError(f"{op}: {name} must be dense, not sparse or nested; call .to_dense() or .values() first.")


def check_number(op: str, name: str, x: Any, advice: str = "", kind: str = "a number") -> None:
    """Numbers are what PyTorch takes as such: NumPy's too, which are Real, and bool, so that ``training and p`` is one.
    int and float stand for themselves and for compiled code's symbolic numbers."""
    if not isinstance(x, (int, float, Real)):
        raise TypeError(f"{op}: {name} must be {kind}, got {type(x).__name__}{advice and f'; {advice}'}.")


def check_probability(op: str, name: str, p: Any) -> None:
    check_number(op, name, p, "0 switches it off")
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"{op}: {name} must be between 0 and 1, got {p}.")
