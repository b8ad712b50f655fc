"""``python -m bench.gpu [--rehearse] [--only STAGE ...]`` (``make gpu``): builds for the GPU at hand, tests on it,
benchmarks, in one go.

For a machine that has torch with CUDA, nvcc and a GPU, and may have no network: it uses this Python as it is. Nothing
that goes wrong ends it but a failed build: every stage has a time limit, a test process that a kernel hangs or whose
device is lost is replaced, a benchmark goes on after the row that ended it. Everything is left in one folder, and after
each stage in an archive of it beside: summary.txt, summary.json, log.txt, the tests' reports, and for each backend the
benchmarks' results.json, results.csv and page. ``--only`` runs some stages; with the same ``--out`` the summary keeps
those of earlier runs. ``--limit`` is for a machine that ends commands: what does not fit into so many seconds is cut
short or left for the next run. ``--rehearse`` goes through the same on the emulator and the CPU.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import sys
import time
from datetime import datetime, timezone
from pathlib import Path

from bench import gpu_summary
from bench.gpu_stages import ROOT, Stage, answer, missing

# Those that put their tensors on the device of the backend they test, the narrowest first.
DEVICE_TESTS = (
    "tests/test_ptx.py", "tests/test_ptx_cluster.py", "tests/test_layer_norm_cuda.py",
    "tests/test_layer_norm_cluster.py", "tests/test_int8_matmul_kernels.py", "tests/test_cuda_inputs.py",
    "tests/test_attention.py", "tests/test_layer_norm.py", "tests/test_int8_matmul.py",
    "tests/test_varlen_attention.py", "tests/test_varlen_attention_cuda.py",
    "tests/test_attention_with_kv_cache.py", "tests/test_kv_cache_cuda.py", "tests/test_attention_semantics.py",
    "tests/test_layer_norm_interface.py", "tests/test_cuda_graphs.py", "tests/test_gpt.py",
    "tests/test_transformer.py", "tests/test_training.py",
)  # fmt: skip
TRITON_TESTS = (
    "tests/test_philox_triton.py", "tests/test_layer_norm_triton.py", "tests/test_int8_matmul_triton.py",
    "tests/test_attention_triton.py", "tests/test_attention_triton_interface.py",
    "tests/test_attention_triton_masks.py", "tests/test_kv_cache_triton.py", "tests/test_triton_bounds.py",
)  # fmt: skip
# By the names of files and tests: those of kernels' own files, and in the others those of one backend.
SELECTIONS = {
    "cuda": "(cuda or ptx or cluster or int8_matmul_kernels) and not triton and not cpu",
    "triton": "triton and not cpu and not aot",
}
REHEARSED = "(test_matches_eager and none) or integer_intrinsics or names_what_is_wrong"
BUILD_S, CUDA_TESTS_S, TRITON_TESTS_S, BENCH_S = 300, 120, 160, 125
TEST_LIBRARIES_S = 150
# A limit of the whole run keeps so much for writing; a stage is not begun for less.
MARGIN_S, LEAST_S = 5, 10
# One test, compiling included, and one row of a benchmark; a kernel that hangs takes no more.
TEST_S, ROW_S = 60, 50
# Loading torch from a cold disk included.
ASKING_S = 120


def test_stage(folder: Path, name: str, files: tuple[str, ...], selection: str, limit_s: float, workers: int) -> Stage:
    # A line a test: the log says what a run did that was killed before its report.
    command = [sys.executable, "-m", "pytest", "-vv", *files, "-p", "no:cacheprovider", "-k", selection,
               "--continue-on-collection-errors", f"--junit-xml={folder / f'tests_{name}.xml'}"]  # fmt: skip
    if missing("xdist") is None:
        # Each process holds a context on the GPU; one that has lost it leaves, and another takes its place.
        command += ["-n", str(workers), "--dist", "worksteal"]
    if missing("pytest_timeout") is None:
        # A signal would not reach Python while it waits for the device.
        command += [f"--timeout={TEST_S}", "--timeout-method=thread"]
    return Stage(f"tests {name}", command, limit_s, needs=("pytest",), grace_s=15)


def bench_stage(folder: Path, name: str, *arguments: str) -> Stage:
    command = [sys.executable, "-m", "bench", "--quick", "--out", str(folder / name), *arguments]
    return Stage(f"bench {name}", command, BENCH_S, needs=("typer", "rich"), stall_s=ROW_S, again=["--resume"])


def stages(folder: Path, rehearse: bool, workers: int) -> list[Stage]:
    both = (*DEVICE_TESTS, *TRITON_TESTS)
    if rehearse:
        tests = [test_stage(folder, "rehearsal", both, REHEARSED, CUDA_TESTS_S, workers)]
        benches = [bench_stage(folder, "cpu", "--match", "128x768")]
    else:
        tests = [
            test_stage(folder, "cuda", DEVICE_TESTS, SELECTIONS["cuda"], CUDA_TESTS_S, workers),
            test_stage(folder, "triton", both, SELECTIONS["triton"], TRITON_TESTS_S, workers),
        ]
        benches = [bench_stage(folder, name, "--device", "cuda", "--backend", name) for name in ("cuda", "triton")]
    return [
        Stage("build", [sys.executable, "setup.py", "-q", "build_ext", "--inplace"], BUILD_S),
        # No test is to wait for the compiler, whose time would be the test's.
        Stage("build tests", [sys.executable, "tests/emulated.py"], TEST_LIBRARIES_S),
        Stage("backends", [sys.executable, "-W", "ignore", "-m", "fastattn"], 60),
        *tests,
        *benches,
    ]  # fmt: skip


def why_no_gpu() -> str | None:
    """Asks a fresh process, since this one may have loaded the extension before it was built."""
    code = "import fastattn; print(fastattn.available_backends()['cuda'] or '')"
    run = answer([sys.executable, "-W", "ignore", "-c", code], ASKING_S)
    if run is None:
        return f"PyTorch and the device have not answered for {ASKING_S} s"
    return (run.stdout.strip() or None) if run.returncode == 0 else run.stderr.strip()


def why_no_build() -> str | None:
    """Why a build can have no CUDA kernels: it would only take away what was built for the CPU."""
    import torch

    return None if torch.version.cuda is not None else "this torch was built without CUDA"


def device_name() -> str:
    import torch

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "rehearsal"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def environment(rehearse: bool) -> dict[str, str]:
    # Packages may be where the caller's PYTHONPATH says, and nvcc where setup.py looks for it beside PATH.
    cuda = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    values = {**os.environ, "PYTHONUNBUFFERED": "1", "OMP_WAIT_POLICY": "passive",
              "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
              "PATH": os.pathsep.join(filter(None, (os.environ.get("PATH"), f"{cuda}/bin")))}  # fmt: skip
    if not rehearse:
        # Without a GPU's kernels nothing that follows means anything: do not go on to compile them for the emulator.
        return {"FASTATTN_CUDA": "nvcc", **values}
    import torch

    # What cannot run here need not be compiled for every card. Else the build gives the reason itself.
    return values if torch.version.cuda is None else {"FASTATTN_CUDA": "emulated", **values}


class Run:
    """The stages of one run, and what is written of them."""

    def __init__(self, folder: Path, wanted: list[Stage], limit_s: float | None) -> None:
        self.folder, self.wanted, self.reason = folder, wanted, None
        self.end = time.monotonic() + limit_s if limit_s is not None else None
        self.archived = ""  # the summary when the archive was made

    def go(self, rehearse: bool) -> None:
        log, values = self.folder / "log.txt", environment(rehearse)
        for index, stage in enumerate(self.wanted):
            if self.end is not None:
                stage.limit_s = min(stage.limit_s, self.end - time.monotonic() - stage.grace_s - MARGIN_S)
                if stage.limit_s < LEAST_S:
                    stage.outcome = "not run: no time left"
                    continue
            if stage.name == "build" and not rehearse and (reason := why_no_build()) is not None:
                stage.outcome, self.reason = f"not run: {reason}", reason
                print(f"gpu: no CUDA backend: {reason}; --rehearse goes through the same without a GPU")
                break
            try:
                good = stage.run(log, values)
            finally:
                self.write()
            if stage.name == "build" or index == 0:
                self.reason = why_no_gpu() if good or stage.name != "build" else f"the build {stage.outcome}"
                if self.reason is not None and not (rehearse and good):
                    print(f"gpu: no CUDA backend: {self.reason}")
                    break

    def write(self) -> str:
        text = gpu_summary.write(self.folder, self.wanted, self.reason)
        if text != self.archived:
            shutil.make_archive(str(self.folder), "gztar", self.folder)
            self.archived = text
        return text


def end_in_order(number: int, frame: object) -> None:
    """For SIGTERM: the stage that runs is ended, and the summary is written."""
    raise KeyboardInterrupt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, help="default: bench/out/<GPU>-<time>")
    parser.add_argument("--rehearse", action="store_true", help="the same stages without a GPU, on the emulator")
    parser.add_argument("--only", nargs="+", metavar="STAGE", help="build, backends, tests, bench, or whole names")
    parser.add_argument("--limit", type=float, metavar="SECONDS", help="of the whole run")
    parser.add_argument("--workers", type=int, default=min(16, os.cpu_count() or 1), help="test processes")
    arguments = parser.parse_args()
    stamp = datetime.now(timezone.utc).strftime("%Y%m%d-%H%M%S")
    folder = (arguments.out or ROOT / "bench" / "out" / f"{device_name()}-{stamp}").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    wanted = [
        stage
        for stage in stages(folder, arguments.rehearse, arguments.workers)
        if arguments.only is None or {stage.name, stage.name.split()[0]} & set(arguments.only)
    ]
    if not wanted:
        parser.error(f"no stage is called {' or '.join(arguments.only)}")
    run = Run(folder, wanted, arguments.limit)
    signal.signal(signal.SIGTERM, end_in_order)
    try:
        run.go(arguments.rehearse)
    finally:
        print(f"{run.write()}\neverything is in {folder} and {folder.name}.tar.gz")
    good = all(stage.outcome == "ok" for stage in wanted)
    raise SystemExit(0 if good else 2 if run.reason and not arguments.rehearse else 1)


if __name__ == "__main__":
    main()
