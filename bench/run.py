"""Runs cases: check, then time at all threads and at one. Each gives a Row, whatever happens to it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

import fastattn
from bench.case import Case, Verdict
from bench.gpu_timing import Gpu, Rotation, copies, gpu_sample, is_cold
from bench.peaks import Peaks
from bench.timing import Comparison, Ratios, Times, compare, threads

OK, FAILED, REFUSED = "ok", "FAILED", "refused"


@dataclass(frozen=True)
class Peer:
    """One form of PyTorch's, beside ours."""

    name: str
    times: Times
    ratios: Ratios
    one_thread: float | None = None  # ratio of medians with one thread; measured for the strongest peer


@dataclass(frozen=True)
class Row:
    """A line of the table. Without times if the case failed its check or the backend refused it."""

    group: str
    op: str
    shape: str
    dtype: str
    backend: str
    status: str
    note: str = ""
    times: Times | None = None
    peers: list[Peer] = field(default_factory=list)  # the strongest first
    flops: float = 0.0
    bytes: float = 0.0
    compute_dtype: str = "float32"
    percent_of_peak: float | None = None  # of the nearer roof
    error: float | None = None
    allowed: float | None = None
    foreign_cpus: float | None = None
    attempts: int = 0
    disturbed: bool = False
    seqlen: int | None = None
    variant: str = ""
    headline: str = ""

    @classmethod
    def of(cls, case: Case, backend: str, status: str, note: str, **measured: Any) -> Row:
        """The row of ``case``, without times but for those in ``measured``."""
        return cls(
            case.group, case.op, case.shape, case.dtype, backend, status, note, seqlen=case.seqlen,
            variant=case.variant, headline=case.headline, **measured,
        )  # fmt: skip

    @property
    def strongest(self) -> Peer | None:
        return self.peers[0] if self.peers else None

    @property
    def gflops(self) -> float:
        return self.flops / self.times.median_us * 1e-3

    @property
    def gigabytes_per_s(self) -> float:
        return self.bytes / self.times.median_us * 1e-3

    def under(self, peaks: Peaks) -> Row:
        """The row with its place under this machine's roofs."""
        if self.times is None or not (self.flops or self.bytes):
            return self
        work = self.compute_dtype, self.flops, self.bytes
        return replace(self, percent_of_peak=peaks.percent(*work, self.times.median_us * 1e-6))

    def as_dict(self) -> dict:
        row = asdict(self)
        for peer, values in zip(self.peers, row["peers"], strict=True):
            values["ratios"] = peer.ratios._asdict()
        if self.times is not None:
            row |= {"gflops": self.gflops, "gigabytes_per_s": self.gigabytes_per_s}
        return row


@dataclass(frozen=True)
class Effort:
    """How long a row may take."""

    budget_s: float = 2.0
    one_thread_budget_s: float = 1.0
    retries: int = 2

    def within(self, seconds: float) -> Effort:
        """What of it fits in ``seconds`` for a row, its check included; on a busy machine repeats go first."""
        budget_s = min(self.budget_s, max(0.0, seconds) / 4)
        return Effort(
            budget_s,
            min(self.one_thread_budget_s, budget_s / 2),
            self.retries if seconds > 4 * self.budget_s else 0,
        )


def run_case(case: Case, backend: str, effort: Effort, gpu: Gpu | None = None) -> Row:
    """Checks ``case`` on ``backend`` and times it if it passes, on ``gpu`` if there is one.

    A backend that refuses the case gives a row that says so. A wrong answer and an error of any kind give a FAILED row.
    """
    try:
        with fastattn.use_backend(backend), warnings.catch_warnings():
            # torch announces prototypes (nested tensors) and successors on the peers' side.
            warnings.simplefilter("ignore")
            if gpu is None:
                return _check_and_time(case, backend, effort)
            return _check_and_time_on(gpu, case, backend, effort)
    except NotImplementedError as refusal:
        return Row.of(case, backend, REFUSED, str(refusal))
    except AssertionError as wrong:
        return Row.of(case, backend, FAILED, f"wrong answer: {wrong}")
    except Exception as error:
        return Row.of(case, backend, FAILED, f"{type(error).__name__}: {error}")


def _check_and_time(case: Case, backend: str, effort: Effort) -> Row:
    subject = case.build()
    verdict = subject.check()
    comparison = compare(
        {"fastattn": subject.ours, **subject.peers}, budget_s=effort.budget_s, retries=effort.retries
    )  # fmt: skip
    one_thread = _one_thread_ratio(subject.ours, subject.peers, comparison, effort)
    return _row(case, backend, verdict, comparison, [verdict.note], one_thread)


def _check_and_time_on(gpu: Gpu, case: Case, backend: str, effort: Effort) -> Row:
    count = copies(case.bytes, gpu.l2_bytes)
    with gpu.building():
        subjects = [case.build() for _ in range(count)]
        verdict = subjects[0].check()
        rotations = {"fastattn": Rotation(gpu, [subject.ours for subject in subjects])}
        for name in subjects[0].peers:
            rotations[name] = Rotation(gpu, [subject.peers[name] for subject in subjects])
        comparison = compare(
            rotations, budget_s=effort.budget_s, retries=effort.retries, take_sample=gpu_sample, watch_cpu=False
        )
        notes = [verdict.note, *(f"{name} {each.note}" for name, each in rotations.items() if each.note)]
        if not is_cold(case.bytes, count, gpu.l2_bytes):
            notes.append("operands fit in L2")
        del subjects, rotations
    return _row(case, backend, verdict, comparison, notes, None)


def _row(
    case: Case, backend: str, verdict: Verdict, comparison: Comparison, notes: list[str], one_thread: float | None
) -> Row:
    return Row.of(
        case,
        backend,
        OK,
        "; ".join(note for note in (*notes, comparison.disturbance) if note),
        times=comparison.subject,
        peers=[
            Peer(
                name, comparison.times[name], comparison.ratios(name),
                one_thread if name == comparison.strongest else None,
            )
            for name in sorted(comparison.peers, key=lambda name: comparison.times[name].median_us)
        ],
        flops=case.flops,
        bytes=case.bytes,
        compute_dtype=case.compute_dtype or case.dtype,
        error=verdict.error,
        allowed=verdict.allowed,
        foreign_cpus=comparison.foreign_cpus,
        attempts=comparison.attempts,
        disturbed=comparison.disturbance is not None,
    )  # fmt: skip


def _one_thread_ratio(ours: Callable, peers: dict[str, Callable], full: Comparison, effort: Effort) -> float | None:
    """The ratio to the strongest peer on one core: what is the kernel's merit, and not the threads'."""
    if full.strongest is None or torch.get_num_threads() == 1:
        return None
    with threads(1):
        pair = {"fastattn": ours, full.strongest: peers[full.strongest]}
        single = compare(pair, budget_s=effort.one_thread_budget_s, retries=0)
    return single.ratios(full.strongest).median
