"""ThreadSanitizer sees a missing barrier in the emulated kernels even in a schedule in which it does no harm.

Run by ``make sanitize``: the kernels are built with -fsanitize=thread and run in a process that preloads its runtime.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from contextlib import suppress

import pytest
from emulated import ROOT, AsyncMode, KernelError, Mode, Schedule, emulated_library, host_compiler
from test_emulator_bugs import KERNELS

pytestmark = pytest.mark.skipif(
    os.environ.get("FASTATTN_TEST_SANITIZER") != "thread", reason="needs ThreadSanitizer: run by make sanitize"
)

RACES = [
    ("layer_norm", "no_barrier_in_sum"),
    ("layer_norm", "buffer_reused"),
    ("attention", "no_barrier_for_k"),
    ("attention", "no_barrier_for_v"),
    ("matmul", "no_full_wait"),
    ("matmul", "no_barrier_before_store"),
    ("cluster_loads", "no_barrier_before_load"),
    ("cluster_loads", "no_barrier_before_reuse"),
    ("cluster_stores", "no_wait"),
]
CLEAN = [(kernel, "none") for kernel in KERNELS]
# The mildest run and a harsh one: a race must show in both, a right kernel in neither.
MODES = [Mode(), Mode(Schedule.PRIORITY, AsyncMode.LAZY, seed=1)]


RACE_REPORTED = 66  # ThreadSanitizer's exit status


def run_all() -> None:
    """Prints the exit status of each case, run in a process of its own: the first report of a process ends it."""
    emulated_library()
    for kernel, bug in [*CLEAN, *RACES]:
        for mode in MODES:
            child = os.fork()
            if child == 0:
                with suppress(KernelError):
                    KERNELS[kernel][0](mode, bug)
                os._exit(0)
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            print(f"{kernel} {bug} {mode}: {status}", flush=True)


@pytest.fixture(scope="module")
def statuses() -> dict[str, int]:
    """Exit statuses by "kernel bug mode"."""
    command = [*shlex.split(host_compiler()), "-print-file-name=libtsan.so"]
    runtime = subprocess.run(command, capture_output=True, text=True)
    environment = {
        **os.environ,
        "LD_PRELOAD": runtime.stdout.strip(),
        "TSAN_OPTIONS": "ignore_noninstrumented_modules=1:halt_on_error=1:die_after_fork=0",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT / "tests"),
    }
    code = "import test_emulator_races; test_emulator_races.run_all()"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert run.returncode == 0, run.stderr[-4000:]
    lines = [line.rsplit(": ", 1) for line in run.stdout.splitlines()]
    return {case: int(status) for case, status in lines}


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("kernel, bug", RACES)
def test_a_race_is_reported(statuses, kernel, bug, mode):
    assert statuses[f"{kernel} {bug} {mode}"] == RACE_REPORTED


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("kernel, bug", CLEAN)
def test_a_right_kernel_has_no_race(statuses, kernel, bug, mode):
    assert statuses[f"{kernel} {bug} {mode}"] == 0
