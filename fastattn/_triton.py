"""Whether Triton runs here, and how: compiled for a GPU, or, for tests, in its interpreter on CPU tensors.

Triton is imported only by the modules that hold its kernels, and those only when one of them is about to run. What this
module answers must be traceable by dynamo: plain globals and functions of torch.cuda.
"""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

# Older GPUs lack what Triton's compiler relies on (bf16 arithmetic, asynchronous copies).
_OLDEST_CAPABILITY = (8, 0)
_INSTALLED = importlib.util.find_spec("triton") is not None
# Triton reads the variable once for each kernel, when it is defined, so that the answer holds for the process.
_INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")
# The answer of _gpu_reason, once asked for, in a list.
_known_gpu_reason: list[str | None] = []


def is_interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, which is for tests: thousands of times slower than compiled."""
    return _INTERPRETED


def missing_reason() -> str | None:
    """Why this machine runs no Triton kernel; None if it does."""
    if not _INSTALLED:
        return "Triton is not installed"
    if _INTERPRETED:
        return None
    if _known_gpu_reason:
        return _known_gpu_reason[0]
    reason = _gpu_reason()
    if not torch.compiler.is_compiling():
        _known_gpu_reason.append(reason)
    return reason


def _gpu_reason() -> str | None:
    if not torch.cuda.is_available():
        return "no GPU (for tests, TRITON_INTERPRET=1 runs it on CPU tensors)"
    reasons = [_refuses_gpu(index) for index in range(torch.cuda.device_count())]
    return None if None in reasons else reasons[0]


def _refuses_gpu(index: int) -> str | None:
    if torch.version.hip is not None:
        return None
    major, minor = torch.cuda.get_device_capability(index)
    if (major, minor) >= _OLDEST_CAPABILITY:
        return None
    oldest = ".".join(map(str, _OLDEST_CAPABILITY))
    return f"the GPU has compute capability {major}.{minor}, and Triton serves {oldest} and newer"


def refuses_device(tensor: Tensor, name: str) -> str | None:
    """Why Triton kernels do not run on the device of ``tensor``, called ``name`` in the reason; None if they do."""
    device = tensor.device
    if device.type == "cuda":
        return None if _INTERPRETED else _refuses_gpu(device.index or 0)
    if device.type == "cpu" and _INTERPRETED:
        return None
    return f"{name} is on {device}, not on a GPU of CUDA or ROCm"
