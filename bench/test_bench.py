"""The cases of ``python -m bench`` under pytest-benchmark: ``pytest bench --benchmark-only [--bench-all]``.

Each case is timed twice, as fastattn and as the first form of PyTorch named for it, in one group of the table. The
interleaved ratios that can be trusted on a noisy machine come from ``python -m bench``.
"""

from __future__ import annotations

import pytest

import fastattn
from bench.__main__ import select_cases
from bench.case import Case


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        cases = select_cases(quick=not metafunc.config.getoption("--bench-all"))
        metafunc.parametrize("case", cases, ids=[case.plain_name for case in cases])


@pytest.mark.parametrize("whose", ["fastattn", "pytorch"])
def test_case(benchmark, case: Case, whose: str, request: pytest.FixtureRequest) -> None:
    benchmark.group = case.name
    with fastattn.use_backend(request.config.getoption("--bench-backend")):
        try:
            subject = case.build()
            verdict = subject.check()
        except NotImplementedError as refusal:
            pytest.skip(str(refusal))
        benchmark.extra_info |= {"error": verdict.error, "allowed": verdict.allowed}
        benchmark(subject.ours if whose == "fastattn" else next(iter(subject.peers.values())))
