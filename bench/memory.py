"""The heap that calls find, and how much memory the tensors of a call hold at once."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch.profiler import ProfilerActivity, profile


def settle_heap() -> None:
    """Brings malloc to the state that a process reaches which has freed a tensor of 32 MiB.

    From then on glibc keeps up to 64 MiB of freed memory at the top of its heap. A young process gives 128 KiB and more
    back to the system, and the next call faults it in again, page by page: as much time as the kernel itself, or none,
    as earlier rows and the order of allocations have it. Tensors of more than 32 MiB come from the system in any case.
    """
    torch.empty((32 << 20) - (64 << 10), dtype=torch.uint8)


def peak_megabytes(callee: Callable[[], object]) -> float:
    """The most that torch's allocator has given out at any time during one call, less what it had before, in MB.

    Buffers that kernels keep between calls are no tensors and not counted; nor is what an earlier call left in place.
    """
    callee()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        callee()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    with _silent_stderr(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = callee()
    # Each event is an allocation, or with a negative size the return of one.
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    del result
    return peak / 1e6


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """Some builds of the profiler announce its start and end on the process's own standard error."""
    sys.stderr.flush()
    saved = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
