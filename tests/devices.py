"""Where a backend's tensors live, and what is done when a GPU is lost."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from fastattn import _triton


def device_for(backend: str) -> str:
    """Where ``backend`` runs here: Triton on the GPU, or, in its interpreter, on the CPU."""
    return "cuda" if backend in ("cuda", "triton") and torch.cuda.is_available() else "cpu"


def triton_compiled_for() -> str | None:
    """The GPU, "80" or "90", whose kernels of Triton run on the emulator (tests/triton_compiled.py)."""
    return os.environ.get("FASTATTN_TEST_TRITON")


def triton_is_slow() -> bool:
    """Whether Triton's interpreter runs its kernels, thousands of times slower than a GPU: at small shapes."""
    return _triton.is_interpreted() and triton_compiled_for() is None


def dtype_for(backend: str) -> torch.dtype:
    """What a test of a model runs in: the CUDA kernels' attention takes 16 bits alone."""
    return torch.float16 if backend == "cuda" else torch.float32


@contextmanager
def new_tensors_for(backend: str) -> Iterator[None]:
    """While entered, new tensors are where ``backend`` runs.

    For the CPU nothing is entered: it would be a mode of torch functions, before which ops leave their short ways.
    """
    if device_for(backend) == "cpu":
        yield
        return
    with torch.device(device_for(backend)):
        yield


def moved_for(backend: str, options: dict) -> dict:
    """``options`` with its tensors where ``backend`` runs: those made when a file is read are on the CPU."""
    device = device_for(backend)
    return {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in options.items()}


def generator_state(backend: str) -> torch.Tensor:
    """Of the generator that ``backend`` draws from."""
    return torch.cuda.get_rng_state() if device_for(backend) == "cuda" else torch.get_rng_state()


def set_generator_state(backend: str, state: torch.Tensor) -> None:
    (torch.cuda if device_for(backend) == "cuda" else torch).set_rng_state(state)


# --- A lost device ---------------------------------------------------------------------------------------------------


def device_is_lost() -> bool:
    """After an illegal access, say, every later call to the GPU of this process fails."""
    if not (torch.cuda.is_available() and torch.cuda.is_initialized()):
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """A test process that has lost the device leaves, so that pytest-xdist starts another in its place and only this
    test counts as failed. Its report would go with it: it is printed."""
    report = yield
    if report.failed and os.environ.get("PYTEST_XDIST_WORKER") and device_is_lost():
        with item.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
            print(f"\n{item.nodeid} has lost the device:\n{report.longreprtext}", file=sys.stderr, flush=True)
        os._exit(1)
    return report
