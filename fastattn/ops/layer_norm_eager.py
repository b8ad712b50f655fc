"""Layer norm and RMS norm in plain PyTorch: the definition of correct."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.ops.calls import LayerNormCall
from fastattn.ops.philox import draw_rng_state, dropout_mask


def _statistics_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _normalize(call: LayerNormCall, x: Tensor) -> Tensor:
    """The norm of ``x``, in the dtype of ``call.input``."""
    weight, bias = call.weight, call.bias
    if bias is not None and weight is None:
        # PyTorch's gradient of the gradient is wrong for a bias alone.
        weight = torch.ones_like(bias)
    given = [t for t in (weight, bias) if t is not None]
    if any(t.dtype != x.dtype for t in given):
        # PyTorch's own kernels take one dtype.
        dtype = _statistics_dtype(x)
        x = x.to(dtype)
        weight, bias = (None if t is None else t.to(dtype) for t in (weight, bias))
    shape = x.shape[x.dim() - call.normalized_dims :]
    if call.rms:
        out = F.rms_norm(x, shape, weight, call.eps)
    else:
        out = F.layer_norm(x, shape, weight, bias, call.eps)
    return out.to(call.input.dtype)


def norm(call: LayerNormCall) -> Tensor:
    """``layer_norm`` and ``rms_norm``."""
    return _normalize(call, call.input)


def add_norm(call: LayerNormCall, rng_state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``add_layer_norm`` and ``add_rms_norm``; draws ``rng_state`` if it has to drop and none is given."""
    input, residual = call.input, call.residual
    assert residual is not None  # add_* calls have one
    dtype = _statistics_dtype(residual)
    added = input.to(dtype)
    if call.dropout_p > 0.0:
        if rng_state is None:
            rng_state = draw_rng_state(input.device)
        # The rule counts elements of a matrix: one batch, one head, a row for each row that is normalised.
        # (math.prod, for torch.Size.numel() makes numbers of the symbolic sizes of torch.export.)
        split = input.dim() - call.normalized_dims
        rows, cols = math.prod(input.shape[:split]), math.prod(input.shape[split:])
        kept = dropout_mask(rng_state, 1, 1, rows, cols, call.dropout_p).view(input.shape)
        scale = 1.0 / (1.0 - call.dropout_p) if call.dropout_p < 1.0 else 0.0
        added = torch.where(kept, added * scale, 0.0)
    new_residual = (residual.to(dtype) + added).to(residual.dtype)
    return _normalize(call, new_residual), new_residual
