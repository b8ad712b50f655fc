"""Operands of the INT8 ops, for tests."""

from __future__ import annotations

import pytest
import torch

import fastattn
from fastattn._extension import extension, missing_reason

needs_cpu = pytest.mark.skipif(extension is None, reason=str(missing_reason))


def shape_id(shape):
    return "x".join(map(str, shape))


def random_int8(*shape):
    return torch.randint(-127, 128, shape, dtype=torch.int8)


def random_linear(columns, depth, dtype=torch.float32):
    weight, scale = fastattn.quantize_int8(torch.randn(columns, depth) / max(depth, 1) ** 0.5)
    return weight, scale, torch.randn(columns, dtype=dtype)
