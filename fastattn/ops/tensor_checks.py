"""What every op asks of its operands, whatever they mean."""

from __future__ import annotations

from numbers import Real
from typing import Any

import torch
from torch import Tensor

# What the kernels compute.
FLOATING = frozenset({torch.float32, torch.bfloat16, torch.float16, torch.float64})


def check_dense(op: str, name: str, tensor: Tensor, for_nested: str = "") -> None:
    """``for_nested``: what to do with a nested tensor, where its values alone are of no use."""
    if tensor.is_nested:
        values = "pass its .values(), or " if tensor.layout is torch.jagged else ""
        raise TypeError(
            f"{op}: {name} must be dense, not nested; {for_nested or f'{values}pad it with .to_padded_tensor(0.0)'}."
        )
    if tensor.layout != torch.strided:
        raise TypeError(f"{op}: {name} must be dense, not sparse; call .to_dense() first.")


def check_tensor(op: str, name: str, x: Any) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name} must be a Tensor, got {type(x).__name__}.")
    check_dense(op, name, x)


def check_number(op: str, name: str, x: Any, advice: str = "", kind: str = "a number") -> None:
    """Numbers are what PyTorch takes as such: NumPy's too, which are Real, and bool, so that ``training and p`` is one.
    int and float stand for themselves and for compiled code's symbolic numbers."""
    if not isinstance(x, (int, float, Real)):
        raise TypeError(f"{op}: {name} must be {kind}, got {type(x).__name__}{advice and f'; {advice}'}.")


def check_probability(op: str, name: str, p: Any) -> None:
    check_number(op, name, p, "0 switches it off")
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"{op}: {name} must be between 0 and 1, got {p}.")


def refuses_sharding(name: str, tensor: Tensor) -> str | None:
    """Why kernels do not run on a DTensor, which PyTorch's own operators divide; None for any other tensor."""
    # By the name of its class: the import of its module takes seconds.
    return f"{name} is a DTensor, and its kernels know no sharding" if type(tensor).__name__ == "DTensor" else None
