"""Where a backend's tensors live."""

from __future__ import annotations

import torch


def device_for(backend: str) -> str:
    """Where ``backend`` runs here: Triton on the GPU, or, in its interpreter, on the CPU."""
    return "cuda" if backend in ("cuda", "triton") and torch.cuda.is_available() else "cpu"
