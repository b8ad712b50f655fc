"""``make gpu`` cannot be tried again on a borrowed machine: its stages, without a GPU."""

from __future__ import annotations

import os
import sys

from bench import gpu


def test_stages_keep_their_time_and_their_log(tmp_path):
    log, environment = tmp_path / "log.txt", dict(os.environ)
    good = gpu.Stage("good", [sys.executable, "-c", "print('hello')"], 30)
    bad = gpu.Stage("bad", [sys.executable, "-c", "raise SystemExit(3)"], 30)
    slow = gpu.Stage("slow", [sys.executable, "-c", "import time; time.sleep(60)"], 0.5)
    assert good.run(log, environment) and good.last_line == "hello"
    assert not bad.run(log, environment) and bad.outcome == "failed (3)"
    assert not slow.run(log, environment) and slow.outcome.startswith("stopped after") and slow.seconds < 30
    assert [line for line in log.read_text().splitlines() if line.startswith("== ")][2].startswith("== slow")


def test_the_tests_that_run_on_the_device_exist():
    for path in gpu.DEVICE_TESTS:
        assert (gpu.ROOT / path).exists(), path
    names = [stage.name for stage in gpu.stages(gpu.ROOT, rehearse=False, workers=1)]
    assert names == ["build", "backends", "tests", "bench cuda", "bench triton"]
    assert gpu.BUILD_S <= 300 and gpu.TESTS_S + 2 * gpu.BENCH_S <= 540
