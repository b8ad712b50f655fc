"""Where a backend's tensors live."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def device_for(backend: str) -> str:
    """Where ``backend`` runs here: Triton on the GPU, or, in its interpreter, on the CPU."""
    return "cuda" if backend in ("cuda", "triton") and torch.cuda.is_available() else "cpu"


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
