"""Chooses among the tiles of Triton kernels by timing them, where the user asked for it; otherwise tables decide.

What is timed is everything that depends on the tiles: dk and dv may take one launch or two, and the norms' partial sums
have a row for each program. Triton's own decorator would tune one kernel, whose outputs have one shape, at a time.
"""

from __future__ import annotations

import hashlib
import json
import time
import warnings
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

Choice = TypeVar("Choice", bound=Hashable)

_enabled = False
# Which choice is fastest, by what it was timed for.
_known: dict[Hashable, int] = {}
_FILE = "fastattn.autotune.json"


def set_autotune(enabled: bool) -> None:
    """Whether Triton's attention, norms and INT8 products time several tile sizes and keep the fastest.

    Off at first: fixed tables decide, and nothing is timed. When on, the first call of each kind (op, GPU, dtype,
    head_dim or row length, features, and lengths to the next power of two) takes a second or so for each kernel, and
    256 MiB of memory while it lasts; results are kept, also on disk, in Triton's cache directory. Nothing is timed
    while a CUDA graph is captured: call once before. Where ``torch.use_deterministic_algorithms`` insists on the same
    bits in every process, the tables decide, since other tiles add in another order.

    ::

        fastattn.set_autotune(True)
        fastattn.attention(q, k, v)      # times the candidates
        fastattn.attention(q, k, v)      # takes the fastest
    """
    global _enabled
    if not isinstance(enabled, bool):
        raise TypeError(f"set_autotune: enabled must be a bool, got {enabled!r}.")
    _enabled = enabled


def is_on() -> bool:
    """Whether ``fastest`` may be asked."""
    if torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled():
        return False
    return _enabled


def fastest(
    kernel: Any,
    key: Hashable,
    choices: Sequence[Choice],
    default: Choice,
    prepare: Callable[[Choice], Callable[[], object]],
    on: Tensor,
) -> Choice:
    """The choice whose launches take least time on the device of ``on``; ``default`` while a CUDA graph is captured.

    Args:
        kernel: what @triton.jit made. Results on disk hold for its present source.
        key: what the times depend on besides kernel, device and choices; equal keys share a result, so that lengths
            in it are powers of two. Its ``repr`` is part of a result's name on disk.
        choices: in an order of their own, the same for equal keys.
        default: what is launched where nothing can be timed.
        prepare: gives a function that launches everything in a choice's tiles and writes every output in full, so that
            trials leave no trace.
    """
    if len(choices) == 1:
        return choices[0]
    identity = (kernel.__name__, on.device, key, tuple(choices))
    if identity not in _known:
        name = _name_on_disk(kernel, identity)
        index = _read(name, len(choices))
        if index is None:
            if on.is_cuda and torch.cuda.is_current_stream_capturing():
                return default
            times = [_milliseconds(prepare(choice), on) for choice in choices]
            index = times.index(min(times))
            _write(name, json.dumps({"fastest": index, "milliseconds": times}))
        _known[identity] = index
    return choices[_known[identity]]


def _milliseconds(launch: Callable[[], object], on: Tensor) -> float:
    """The median of some launches; infinite where a GPU cannot hold the tiles, or Triton cannot compile them."""
    if not on.is_cuda:
        # Interpreted: the time means little, but the way is the same.
        start = time.perf_counter()
        launch()
        return (time.perf_counter() - start) * 1e3
    from triton.compiler.errors import CompileTimeAssertionFailure
    from triton.runtime.errors import OutOfResources, PTXASError
    from triton.testing import do_bench

    try:
        with torch.cuda.device(on.device):
            return do_bench(launch, return_mode="median")
    except (OutOfResources, PTXASError, CompileTimeAssertionFailure, RuntimeError):
        # What is wrong with more than one candidate, the launch that follows will say.
        return float("inf")


# --- On disk ---------------------------------------------------------------------------------------------------------


def _name_on_disk(kernel: Any, identity: tuple[Hashable, ...]) -> str:
    """Of a result, where Triton keeps compiled kernels: as good for as long."""
    import triton

    _, device, key, choices = identity
    assert isinstance(device, torch.device)
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"
    source = getattr(kernel, "cache_key", "")  # interpreted kernels have none
    text = repr((triton.__version__, gpu, kernel.__name__, source, key, choices))
    return hashlib.sha256(text.encode()).hexdigest()


def _read(name: str, choices: int) -> int | None:
    from triton.runtime.cache import get_cache_manager

    try:
        path = get_cache_manager(name).get_file(_FILE)
        index = None if path is None else json.loads(Path(path).read_text())["fastest"]
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return index if isinstance(index, int) and 0 <= index < choices else None


def _write(name: str, text: str) -> None:
    """Warns where the disk takes nothing, as in a container whose cache is read-only: the result holds all the same."""
    from triton.runtime.cache import get_cache_manager

    try:
        get_cache_manager(name).put(text, _FILE, binary=False)
    except OSError as error:
        message = f"set_autotune: results are not kept on disk, and hold for this process alone ({error})."
        warnings.warn(message, stacklevel=2)
