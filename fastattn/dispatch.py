"""Which kernel runs: one table of backends per op, in order of preference, each with its reasons to refuse a call."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from fastattn import _extension

BACKENDS = ("cuda", "triton", "cpu", "eager", "emulated")


@dataclass(frozen=True)
class Kernel:
    """One backend's form of one op.

    ``call`` is the op's argument tuple after its meaning was checked (``AttentionCall``, ``LayerNormCall``, …).
    """

    backend: str
    refuses: Callable[[Any], str | None]  # None = runs it, else the reason, without the backend's name
    run: Callable[[Any], Any]


# Filled by the modules in fastattn/ops, each of which ends with `register(op, ...)`: backends in order of preference.
TABLE: dict[str, tuple[Kernel, ...]] = {}


def register(op: str, *kernels: Kernel) -> None:
    """Adds an op to the table; ``kernels`` come in order of preference and end with eager, which never refuses."""
    TABLE[op] = kernels


def not_written(op: str) -> Callable[[Any], str | None]:
    """The refusal of a backend that has no kernel for ``op``."""
    return lambda call: f"it has no {op} kernel yet"


# --- Which backends this machine can run -----------------------------------------------------------------------------


def _cuda_unavailable() -> str | None:
    return "this version of fastattn has no CUDA kernels"


def _triton_unavailable() -> str | None:
    return "this version of fastattn has no Triton kernels"


def _emulated_unavailable() -> str | None:
    return "this version of fastattn has no emulated CUDA kernels"


_UNAVAILABLE: dict[str, Callable[[], str | None]] = {
    "cuda": _cuda_unavailable,
    "triton": _triton_unavailable,
    "cpu": lambda: _extension.missing_reason,
    "eager": lambda: None,
    "emulated": _emulated_unavailable,
}


def available_backends() -> dict[str, str | None]:
    """Every backend, with None if this machine can run it, else the reason why not."""
    return {name: _UNAVAILABLE[name]() for name in BACKENDS}


# --- The choice ------------------------------------------------------------------------------------------------------

_preferred: ContextVar[str] = ContextVar("fastattn_backend", default="auto")


def _check_name(name: str) -> None:
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"backend must be 'auto' or one of {', '.join(map(repr, BACKENDS))}, got {name!r}.")


class use_backend:
    """Sets the backend for calls that say ``backend="auto"``, in this thread and context.

    Call it to switch for good, or use it as a context manager to switch for a block::

        fastattn.use_backend("eager")
        with fastattn.use_backend("cpu"): ...

    Raises: ValueError for an unknown name; NotImplementedError, with the reason, if this machine cannot run the backend.
    """

    def __init__(self, name: str) -> None:
        _check_name(name)
        reason = None if name == "auto" else _UNAVAILABLE[name]()
        if reason is not None:
            raise NotImplementedError(f"use_backend: backend {name!r} cannot run here: {reason}.")
        self._token = _preferred.set(name)

    def __enter__(self) -> use_backend:
        return self

    def __exit__(self, *exc_info: object) -> None:
        _preferred.reset(self._token)


class Choice(NamedTuple):
    kernel: Kernel
    refusals: dict[str, str]


def select(op: str, call: Any, backend: str = "auto") -> Kernel:
    """The kernel that runs ``call``: the one asked for by name, else the first in the table that does not refuse.

    Raises: ValueError for an unknown backend; NotImplementedError if the backend asked for by name refuses.
    """
    if backend == "auto":
        backend = _preferred.get()
    if backend == "auto":
        for kernel in TABLE[op]:
            if kernel.backend != "emulated" and kernel.refuses(call) is None:
                return kernel
    _check_name(backend)
    for kernel in TABLE[op]:
        if kernel.backend == backend:
            reason = kernel.refuses(call)
            if reason is None:
                return kernel
            raise NotImplementedError(
                f"{op}: backend {backend!r} cannot run this: {reason}. Use backend='auto' to let fastattn choose."
            )
    raise NotImplementedError(f"{op}: backend {backend!r} has no kernel for this op. Use backend='auto'.")
