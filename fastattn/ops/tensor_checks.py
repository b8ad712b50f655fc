"""What every op asks of its operands, whatever they mean."""

from __future__ import annotations

import torch
from torch import Tensor


def check_dense(op: str, name: str, tensor: Tensor) -> None:
    if tensor.layout != torch.strided or tensor.is_nested:
        raise TypeError(f"{op}: {name} must be dense, not sparse or nested; call .to_dense() or .values() first.")
