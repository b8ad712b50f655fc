"""Times callables on a GPU: replays of CUDA graphs between events, over copies of the tensors that L2 cannot hold.

A call from Python costs more than many kernels take, so that the GPU would wait for the processor: a graph of calls is
captured once and replayed, which leaves the kernels. Each call of the graph has tensors of its own, in turn, so that
none finds its operands in L2 because the call before put them there. What cannot be captured is timed call by call, and
says so. The alternation, the quartiles and the ratios are those of bench/timing.py.
"""

from __future__ import annotations

import itertools
import math
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from bench.timing import Callee, Sample

# Calls of a graph: enough to cover L2 twice, within reason. Fewer than the least would time the graph's own launch.
MIN_COPIES, MAX_COPIES = 4, 48
COVER_L2 = 2.0


def copies(bytes_each: float, l2_bytes: int) -> int:
    """How many calls' tensors it takes so that a call finds nothing of its own in L2."""
    return min(max(math.ceil(COVER_L2 * l2_bytes / max(bytes_each, 1.0)), MIN_COPIES), MAX_COPIES)


def is_cold(bytes_each: float, count: int, l2_bytes: int) -> bool:
    return count * bytes_each >= COVER_L2 * l2_bytes


class Gpu:
    """What timing needs of the device; tests put a clock of their own in its place."""

    def __init__(self) -> None:
        # Autograd runs a backward on the stream of its forward: whatever will be captured is built on this one.
        self.stream = torch.cuda.Stream()
        self.l2_bytes = torch.cuda.get_device_properties(0).L2_cache_size

    @contextmanager
    def building(self) -> Iterator[None]:
        """Where cases make their tensors and check their answers; what they leave is given back afterwards."""
        torch.set_default_device("cuda")
        try:
            with torch.cuda.stream(self.stream):
                yield
        finally:
            torch.set_default_device(None)
            torch.cuda.empty_cache()

    def is_lost(self) -> bool:
        """After an illegal access, say, the process can use the device no more."""
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            return True
        return False

    def capture(self, callees: list[Callee]) -> Callable[[], object]:
        """A function that replays all calls, once each. Raises what a call raises that cannot be captured."""
        with torch.cuda.stream(self.stream):
            for _ in range(2):  # compiles, tunes, allocates
                callees[0]()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream):
            for callee in callees:
                callee()
        return graph.replay

    def seconds(self, run: Callable[[], object], times: int) -> float:
        """GPU time of ``times`` runs in a row."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.stream(self.stream):
            start.record()
            for _ in range(times):
                run()
            end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3

    def best_seconds(self, callee: Callee, budget_s: float) -> float:
        """The fastest sample of a call, for the roofs; `bench.peaks` asks for it in this form."""
        rotation = Rotation(self, [callee] * MIN_COPIES)
        best, deadline = float("inf"), time.perf_counter() + budget_s
        for run in itertools.count():
            best = min(best, gpu_sample(rotation, 1).seconds)
            if run >= 4 and time.perf_counter() > deadline:
                return best
        raise AssertionError("unreachable: the loop above returns")

    def clocks(self) -> str:
        clocks = read_clocks()
        return clocks.text if clocks is not None else "clocks unknown"


class Rotation:
    """One subject's calls, each on its own copy of the tensors."""

    def __init__(self, gpu: Gpu, callees: list[Callee]) -> None:
        self.gpu, self.callees, self.note = gpu, callees, ""
        try:
            self.replay = gpu.capture(callees)
        except Exception as error:
            self.replay = self._call_each
            self.note = f"not captured ({type(error).__name__}): times include launches"

    def _call_each(self) -> None:
        for callee in self.callees:
            callee()

    def __call__(self) -> None:
        self.replay()


def gpu_sample(rotation: Rotation, calls: int) -> Sample:
    """The form that ``bench.timing.compare`` asks for: seconds for one call of ``calls`` or a few more."""
    replays = max(1, round(calls / len(rotation.callees)))
    return Sample(rotation.gpu.seconds(rotation, replays) / (replays * len(rotation.callees)), True)


# --- Clocks ----------------------------------------------------------------------------------------------------------

_CLOCK_QUERY = "clocks.sm,clocks.max.sm,clocks.mem,power.draw,power.limit,clocks_event_reasons.active"


@dataclass(frozen=True)
class Clocks:
    """What the driver says at one moment."""

    sm_mhz: float
    max_sm_mhz: float
    memory_mhz: float
    watts: float
    limit_watts: float
    reasons: int  # why the clock is below its maximum: NVML's bits; 1 = idle

    @property
    def text(self) -> str:
        slowed = self.reasons & ~1
        return (
            f"SM {self.sm_mhz:.0f} of {self.max_sm_mhz:.0f} MHz, memory {self.memory_mhz:.0f} MHz, "
            f"{self.watts:.0f} of {self.limit_watts:.0f} W" + (f", slowed (0x{slowed:x})" if slowed else "")
        )


def parse_clocks(line: str) -> Clocks | None:
    """Of one line that nvidia-smi prints; None where it knows nothing."""
    fields = [field.strip() for field in line.split(",")]
    try:
        *numbers, reasons = fields
        return Clocks(*map(float, numbers), int(reasons, 16))
    except (TypeError, ValueError):
        return None


def read_clocks(index: int = 0) -> Clocks | None:
    command = ["nvidia-smi", f"--id={index}", f"--query-gpu={_CLOCK_QUERY}", "--format=csv,noheader,nounits"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return parse_clocks(run.stdout.strip())
