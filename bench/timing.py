"""Times callables against each other, on machines where other work comes and goes: what it trusts are ratios.

The subjects take turns in one process, A B C then C B A, so that a slow phase of the machine hits all of them. A sample
is one to three milliseconds of calls: long enough for the clock, short enough that most samples meet no other process.
Samples in which the scheduler took a core away are dropped. The ratio of two subjects is taken three ways, of medians,
of first quartiles and of minima; where the three disagree, or others used the machine meanwhile, the comparison was
disturbed: it is repeated, and if it stays so it says so.
"""

from __future__ import annotations

import gc
import os
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch

SAMPLE_S = 0.002
MIN_ROUNDS, MAX_ROUNDS = 5, 60  # fewer, down to 3, where a round takes longer than the whole budget
MAX_DISAGREEMENT = 0.15  # of the three ratios, (highest / lowest) - 1
MAX_FOREIGN_CPUS = 0.15  # processors kept busy by others

Callee = Callable[[], object]


class Sample(NamedTuple):
    seconds: float  # for one call
    clean: bool  # False if the scheduler interrupted it


@dataclass(frozen=True)
class Times:
    """What one subject's samples say, in microseconds a call."""

    median_us: float
    q1_us: float
    q3_us: float
    min_us: float
    samples: int
    dropped: int

    @property
    def spread(self) -> float:
        """Half the interquartile range over the median."""
        return (self.q3_us - self.q1_us) / 2 / self.median_us


class Ratios(NamedTuple):
    """A peer's time over the subject's: above 1 the subject is faster."""

    median: float
    q1: float
    minimum: float

    @property
    def disagreement(self) -> float:
        return max(self) / min(self) - 1


@dataclass(frozen=True)
class Comparison:
    """Times of each subject, the first of which is compared with each other one."""

    times: dict[str, Times]
    foreign_cpus: float | None  # None where the system does not tell
    attempts: int = 1
    disturbance: str | None = field(default=None)

    @property
    def subject(self) -> Times:
        return next(iter(self.times.values()))

    @property
    def peers(self) -> list[str]:
        return list(self.times)[1:]

    @property
    def strongest(self) -> str | None:
        """The peer with the lowest median."""
        return min(self.peers, key=lambda name: self.times[name].median_us, default=None)

    def ratios(self, peer: str) -> Ratios:
        ours, theirs = self.subject, self.times[peer]
        return Ratios(
            theirs.median_us / ours.median_us, theirs.q1_us / ours.q1_us, theirs.min_us / ours.min_us
        )  # fmt: skip

    @property
    def disagreement(self) -> float:
        return self.ratios(self.strongest).disagreement if self.peers else 0.0


# --- One sample ------------------------------------------------------------------------------------------------------


def cpu_sample(callee: Callee, calls: int) -> Sample:
    """Wall-clock time of ``calls`` calls in a row, whose results are freed as they come."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
    start = time.perf_counter()
    for _ in range(calls):
        callee()
    seconds = time.perf_counter() - start
    switches = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw - before
    # Calls of many milliseconds always meet a timer tick or two; those cost them nothing that shows.
    return Sample(seconds / calls, switches <= 1 + seconds / 0.02)


def summarize(samples: list[Sample]) -> Times:
    """Statistics of the clean samples, or of all where too few are clean to stand for them."""
    clean = [sample.seconds for sample in samples if sample.clean]
    used = clean if len(clean) >= max(4, len(samples) // 2) else [sample.seconds for sample in samples]
    q1, median, q3 = statistics.quantiles(used, n=4, method="inclusive") if len(used) > 1 else used * 3
    return Times(median * 1e6, q1 * 1e6, q3 * 1e6, min(used) * 1e6, len(used), len(samples) - len(used))


# --- A comparison ----------------------------------------------------------------------------------------------------


def compare(
    subjects: dict[str, Callee],
    *,
    budget_s: float = 2.0,
    retries: int = 2,
    take_sample: Callable[[Callee, int], Sample] = cpu_sample,
    watch_cpu: bool = True,
) -> Comparison:
    """Times every subject beside the others.

    Args:
        subjects: name -> callable without arguments; the first is the one that is compared with the rest.
        budget_s: seconds for one attempt, kept to but for the least number of rounds.
        retries: how often a disturbed comparison is repeated; the attempt that agrees best with itself counts.
        take_sample: times a number of calls in a row.
        watch_cpu: whether other work on the processor disturbs; it does not slow a GPU that replays graphs.
    """
    best = None
    for attempt in range(1 + retries):
        if attempt and watch_cpu:
            wait_until_idle()
        result = _compare_once(subjects, budget_s, take_sample, watch_cpu)
        if best is None or _unrest(result) < _unrest(best):
            best = result
        if result.disturbance is None:
            break
    return Comparison(best.times, best.foreign_cpus, attempt + 1, best.disturbance)


def _unrest(result: Comparison) -> tuple[bool, float]:
    return result.disturbance is not None, result.disagreement


def _compare_once(
    subjects: dict[str, Callee], budget_s: float, take_sample: Callable, watch_cpu: bool
) -> Comparison:  # fmt: skip
    collecting = gc.isenabled()
    gc.disable()
    try:
        start, load = time.perf_counter(), ForeignLoad()
        calls = {name: _calls_per_sample(callee, take_sample) for name, callee in subjects.items()}
        samples: dict[str, list[Sample]] = {name: [] for name in subjects}
        for round_ in range(MAX_ROUNDS):
            for name in list(subjects)[:: 1 if round_ % 2 == 0 else -1]:
                samples[name].append(take_sample(subjects[name], calls[name]))
            spent = time.perf_counter() - start
            if spent > budget_s and round_ + 1 >= (MIN_ROUNDS if spent < 4 * budget_s else 3):
                break
        foreign_cpus = load.stop() if watch_cpu else None
    finally:
        if collecting:
            gc.enable()
    result = Comparison({name: summarize(taken) for name, taken in samples.items()}, foreign_cpus)
    return Comparison(result.times, foreign_cpus, 1, _disturbance(result))


def _calls_per_sample(callee: Callee, take_sample: Callable) -> int:
    first = take_sample(callee, 1).seconds  # pays for lazy initialisation and cold caches
    if first > 20 * SAMPLE_S:
        return 1
    once = min(take_sample(callee, 1).seconds for _ in range(2))
    return max(1, round(SAMPLE_S / max(once, 1e-7)))


def _disturbance(result: Comparison) -> str | None:
    if result.foreign_cpus is not None and result.foreign_cpus > MAX_FOREIGN_CPUS:
        return f"disturbed: others used {result.foreign_cpus:.1f} CPUs"
    if result.disagreement > MAX_DISAGREEMENT:
        return f"disturbed: ratios differ by {result.disagreement:.0%}"
    return None


# --- Other work on the machine ---------------------------------------------------------------------------------------


class ForeignLoad:
    """Processors that other processes (and the hypervisor's other guests) kept busy since it was made."""

    def __init__(self) -> None:
        self.start, self.busy = time.perf_counter(), _foreign_seconds()

    def stop(self) -> float | None:
        """The mean number of processors; None where there is no /proc/stat."""
        busy, seconds = _foreign_seconds(), time.perf_counter() - self.start
        if self.busy is None or busy is None:
            return None
        return max(0.0, (busy - self.busy) / max(seconds, 1e-9))


def _foreign_seconds(stat: Path = Path("/proc/stat")) -> float | None:
    if not stat.exists():
        return None
    # cpu  user nice system idle iowait irq softirq steal ...
    ticks = [int(value) for value in stat.read_text().split("\n", 1)[0].split()[1:9]]
    busy = sum(ticks) - ticks[3] - ticks[4]
    own = resource.getrusage(resource.RUSAGE_SELF)
    return busy / os.sysconf("SC_CLK_TCK") - own.ru_utime - own.ru_stime


def wait_until_idle(seconds: float = 2.0) -> bool:
    """Waits up to ``seconds`` for the rest of the machine to fall silent; says whether it did."""
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline:
        load = ForeignLoad()
        time.sleep(0.2)
        foreign_cpus = load.stop()
        if foreign_cpus is None or foreign_cpus < MAX_FOREIGN_CPUS:
            return True
    return False


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Runs a block with torch at ``count`` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
