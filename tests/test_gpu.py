"""``make gpu`` cannot be tried again on a borrowed machine: its stages, without a GPU."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch

from bench import gpu, gpu_stages, gpu_summary
from bench.gpu_stages import ROOT, Stage

ENVIRONMENT = dict(os.environ)


def python(name: str, code: str, limit_s: float = 30, **options) -> Stage:
    return Stage(name, [sys.executable, "-u", "-c", code], limit_s, **options)


def test_stages_keep_their_time_and_their_log(tmp_path):
    log = tmp_path / "log.txt"
    good, bad = python("good", "print('hello')"), python("bad", "raise SystemExit(3)")
    slow = python("slow", "import time; time.sleep(60)", 0.5)
    assert good.run(log, ENVIRONMENT) and good.last_line == "hello"
    assert not bad.run(log, ENVIRONMENT) and bad.outcome == "failed (3)"
    assert not slow.run(log, ENVIRONMENT) and slow.outcome.startswith("stopped after") and slow.seconds < 30
    started = [line for line in log.read_text().splitlines() if sys.executable in line]
    assert [line.split()[1] for line in started] == ["good:", "bad:", "slow:"]


def test_a_stage_without_what_it_needs_says_so(tmp_path):
    stage = python("tests", "print('never')", needs=("json", "no_such_module"))
    assert not stage.run(tmp_path / "log.txt", ENVIRONMENT)
    assert stage.outcome == "not run: no_such_module is not installed" and stage.last_line == ""


def test_a_stage_that_is_stopped_writes_its_report_and_leaves_no_child(tmp_path):
    code = f"""
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
open({str(tmp_path / "child")!r}, "w").write(str(child.pid))
try:
    time.sleep(60)
except KeyboardInterrupt:
    print("the report")
"""
    stage = python("tests", code, 4, grace_s=20)
    hears = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as what a shell runs in the background
    try:
        assert not stage.run(tmp_path / "log.txt", ENVIRONMENT)
    finally:
        signal.signal(signal.SIGINT, hears)
    assert stage.last_line == "the report" and stage.outcome == "stopped after 4 s"
    status = Path("/proc") / (tmp_path / "child").read_text() / "status"
    deadline = time.monotonic() + 10
    while status.exists() and "State:\tZ" not in status.read_text() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert time.monotonic() < deadline


def test_what_hangs_or_loses_the_device_is_gone_on_from(tmp_path):
    code = f"""
import sys, time
from pathlib import Path
rows = Path({str(tmp_path)!r}) / "rows"
row = rows.read_text().count("\\n") if rows.exists() else 0
print("row", row, sys.argv[1:])
rows.write_text("\\n" * (row + 1))
if row == 0: time.sleep(60)
raise SystemExit([None, 3, 1][row])
"""
    stage = python("bench", code, 40, stall_s=3, again=["--resume"])
    assert not stage.run(tmp_path / "log.txt", ENVIRONMENT)
    assert stage.attempts == ["stopped, having said nothing for 3 s", "failed (3)"]
    assert stage.outcome == "failed (1)" and stage.last_line == "row 2 ['--resume']"


def test_the_tests_that_run_on_the_device_exist():
    for path in (*gpu.DEVICE_TESTS, *gpu.TRITON_TESTS):
        assert (ROOT / path).exists(), path
    names = [stage.name for stage in gpu.stages(ROOT, rehearse=False, workers=1)]
    assert names == ["build", "build tests", "backends", "tests cuda", "tests triton", "bench cuda", "bench triton"]
    assert gpu.BUILD_S <= 300 and gpu.CUDA_TESTS_S + gpu.TRITON_TESTS_S + 2 * gpu.BENCH_S <= 540


# --- The whole run ---------------------------------------------------------------------------------------------------


def test_a_run_with_a_limit_leaves_what_does_not_fit(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "MARGIN_S", 1)
    monkeypatch.setattr(gpu, "LEAST_S", 2)
    monkeypatch.setattr(gpu, "why_no_gpu", lambda: None)
    monkeypatch.setattr(gpu, "why_no_build", lambda: None)
    stages = [python("build", "print('built')"), python("tests", "import time; time.sleep(60)"), python("bench", "")]
    (tmp_path / "run").mkdir()
    archives, make_archive = [], gpu.shutil.make_archive
    monkeypatch.setattr(gpu.shutil, "make_archive", lambda *arguments: archives.append(make_archive(*arguments)))
    run = gpu.Run(tmp_path / "run", stages, limit_s=6)
    run.go(rehearse=False)
    assert len(archives) == 2, "one after each stage that ran"
    assert run.write() == run.write() == (tmp_path / "run" / "summary.txt").read_text()[:-1]
    assert len(archives) == 3, "one more names the stage that did not run"
    assert [stage.outcome.split(" after")[0] for stage in stages] == ["ok", "stopped", "not run: no time left"]
    assert stages[1].seconds < 30  # of the 60 that it would take; ending it takes its time on a busy machine
    written = json.loads((tmp_path / "run" / "summary.json").read_text())["stages"]
    assert [stage["name"] for stage in written] == ["build", "tests", "bench"]
    with tarfile.open(tmp_path / "run.tar.gz") as archive:
        assert {"./summary.txt", "./log.txt"} <= set(archive.getnames())


def test_without_cuda_in_torch_the_build_that_is_there_stays(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "why_no_build", lambda: "this torch was built without CUDA")
    stages = [python("build", "print('built')"), python("tests", "print('tested')")]
    run = gpu.Run(tmp_path, stages, None)
    run.go(rehearse=False)
    assert run.reason == "this torch was built without CUDA"
    assert [stage.outcome for stage in stages] == ["not run: this torch was built without CUDA", "not run"]
    assert "--rehearse goes through the same without a GPU" in capsys.readouterr().out


def test_a_run_that_is_ended_writes_what_it_has_and_leaves_no_child(tmp_path):
    code = f"""
import signal, sys
from pathlib import Path
from bench import gpu
from bench.gpu_stages import Stage
gpu.why_no_gpu = gpu.why_no_build = lambda: None
slow = "import os, time; print('started', os.getpid(), flush=True); time.sleep(60)"
stages = [Stage(name, [sys.executable, "-u", "-c", code], 50) for name, code in (("build", "1"), ("tests", slow))]
signal.signal(signal.SIGTERM, gpu.end_in_order)
gpu.Run(Path({str(tmp_path)!r}), stages, None).go(rehearse=False)
"""
    run = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    log, deadline = tmp_path / "log.txt", time.monotonic() + 40
    while not (log.exists() and "started " in log.read_text()) and time.monotonic() < deadline:
        time.sleep(0.1)
    run.terminate()
    assert run.wait(20) != 0
    outcomes = {
        stage["name"]: stage["outcome"] for stage in json.loads((tmp_path / "summary.json").read_text())["stages"]
    }
    assert outcomes == {"build": "ok", "tests": "interrupted"}
    child = int(re.search(r"^started (\d+)", log.read_text(), re.M)[1])
    assert not Path(f"/proc/{child}").exists()


def test_a_rehearsal_compiles_for_the_emulator_alone(monkeypatch):
    monkeypatch.delenv("FASTATTN_CUDA", raising=False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert gpu.environment(rehearse=True)["FASTATTN_CUDA"] == "emulated"
    assert gpu.environment(rehearse=False)["FASTATTN_CUDA"] == "nvcc"


def test_a_run_finds_what_its_caller_finds(monkeypatch, tmp_path):
    """Packages that the caller's PYTHONPATH names, and the compiler that setup.py finds beside PATH."""
    (tmp_path / "carried.py").write_text("where = 'beside the installation'\n")
    compiler = tmp_path / "bin" / "nvcc"
    compiler.parent.mkdir()
    compiler.write_text("")
    compiler.chmod(0o755)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", os.defpath)
    values = gpu.environment(rehearse=False)
    code = "import shutil, carried, bench.gpu; print(carried.where, shutil.which('nvcc'))"
    said = subprocess.check_output([sys.executable, "-c", code], env=values, cwd=tmp_path, text=True)
    assert said == f"beside the installation {compiler}\n"
    monkeypatch.delenv("PYTHONPATH")
    assert gpu.environment(rehearse=False)["PYTHONPATH"] == str(ROOT), "an empty entry would be the current folder"


def test_a_device_that_does_not_answer_is_told(monkeypatch):
    monkeypatch.setattr(gpu, "ASKING_S", 0.01)
    assert gpu.why_no_gpu() == "PyTorch and the device have not answered for 0.01 s"


def test_what_cannot_be_killed_is_left_behind(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_stages, "KILL_S", 0.5)
    kill = gpu_stages.os.killpg
    children = []
    monkeypatch.setattr(gpu_stages.os, "killpg", lambda pid, number: children.append(pid))
    stage = python("tests", "import time; time.sleep(60)", 0.5)
    try:
        assert not stage.run(tmp_path / "log.txt", ENVIRONMENT)
    finally:
        for child in children:
            kill(child, signal.SIGKILL)
    assert stage.outcome == "stopped after 0 s; it cannot be killed" and stage.seconds < 30


# --- The summary -----------------------------------------------------------------------------------------------------

JUNIT = """<testsuites><testsuite>
<testcase classname="tests.test_a" name="test_good"/>
<testcase classname="tests.test_a" name="test_bad[cuda]">
<failure message="AssertionError: off by one&#10;more">x</failure></testcase>
<testcase classname="tests.test_a" name="test_none"><skipped message="head_dim 80 is refused"/></testcase>
<testcase classname="tests.test_b" name="test_none"><skipped message="head_dim 80 is refused"/></testcase>
</testsuite></testsuites>"""


def test_the_summary_is_utf8_whatever_the_locale(tmp_path, monkeypatch):
    monkeypatch.setattr(io, "text_encoding", lambda encoding, stacklevel=2: encoding or "ascii")
    text = gpu_summary.write(tmp_path, [Stage("bench cuda", [], 1, last_line="2.00×")], None)
    assert "2.00×" in text and (tmp_path / "summary.txt").read_bytes().decode() == text + "\n"


def test_the_summary_names_failures_and_counts_reasons(tmp_path):
    (tmp_path / "tests_cuda.xml").write_text(JUNIT)
    first = Stage("build", [], 1, seconds=3.0, outcome="ok")
    gpu_summary.write(tmp_path, [first], None)
    text = gpu_summary.write(tmp_path, [Stage("tests cuda", [], 1, outcome="failed (1)", last_line="1 failed")], None)
    assert "build            ok" in text, "stages of an earlier run in the folder are kept"
    assert "tests cuda: 1 passed, 1 failed, 2 skipped" in text
    assert "FAILED test_a::test_bad[cuda]: AssertionError: off by one" in text and "more" not in text
    assert "skipped 2: head_dim 80 is refused" in text
    assert json.loads((tmp_path / "summary.json").read_text())["tests"]["cuda"]["failed"] == 1
    assert (tmp_path / "summary.txt").read_text() == text + "\n"


def test_the_summary_names_the_machine(tmp_path, monkeypatch):
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 'NVIDIA H100 80GB HBM3, 580.159.04'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    gpu_summary.machine.cache_clear()
    try:
        text = gpu_summary.write(tmp_path, [], None)
    finally:
        gpu_summary.machine.cache_clear()
    assert text.startswith("NVIDIA H100 80GB HBM3, driver 580.159.04; Python 3.") and "; torch 2." in text


def test_half_a_report_costs_no_other(tmp_path):
    """Of a process that is killed as it writes."""
    (tmp_path / "tests_cuda.xml").write_text(JUNIT)
    (tmp_path / "tests_triton.xml").write_text(JUNIT[: len(JUNIT) // 2])
    (tmp_path / "cuda").mkdir()
    (tmp_path / "cuda" / "results.json").write_text('{"rows": [')
    text = gpu_summary.write(tmp_path, [Stage("build", [], 1, seconds=3.0, outcome="ok")], None)
    assert "tests cuda: 1 passed, 1 failed, 2 skipped" in text and "tests triton" not in text
    assert "/tests_triton.xml: " in text and "unreadable: cuda/results.json: Expecting value" in text


def test_the_summary_shows_rows_with_and_without_times():
    row = {"op": "toy", "shape": "256", "dtype": "float32", "status": "FAILED", "note": "it ended here\nmore"}
    assert gpu_summary.bench_line(row).endswith("FAILED: it ended here")
    timed = row | {"time_us": 12.34, "percent_of_peak": 61.2, "peer": "SDPA", "ratio": 1.5}
    assert gpu_summary.bench_line(timed).endswith("12.3 us  61.2% of peak  1.50x SDPA")


# --- A lost device ---------------------------------------------------------------------------------------------------


def test_a_process_whose_device_is_lost_is_replaced(tmp_path):
    pytest.importorskip("xdist", reason="pytest-xdist is not installed")
    (tmp_path / "conftest.py").write_text("from devices import pytest_runtest_makereport\n")
    (tmp_path / "test_lost.py").write_text("""
import devices, pytest
@pytest.mark.parametrize("i", range(6))
def test_access(i, monkeypatch):
    if i == 2:
        devices.device_is_lost = lambda: True  # as from here on in this process
        raise RuntimeError("an illegal memory access")
    assert not devices.device_is_lost()
""")
    environment = {**ENVIRONMENT, "PYTHONPATH": f"{ROOT / 'tests'}:{ROOT}"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        str(tmp_path),
        "-n",
        "1",
        "-p",
        "no:cacheprovider",
        "--rootdir",
        tmp_path,
    ]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert "1 failed, 5 passed" in run.stdout, run.stdout + run.stderr
    assert "test_access[2]" in run.stderr and "an illegal memory access" in run.stderr, run.stderr
