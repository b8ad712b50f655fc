"""``python -m bench.gpu [--rehearse]`` (``make gpu``): builds for the GPU at hand, tests on it, benchmarks, in one go.

For a machine that has torch with CUDA, nvcc and a GPU, and may have no network: it uses this Python as it is. Every
stage has a time limit, a later stage runs although an earlier one failed (but for the build), and everything is left in
one folder: log.txt, tests.xml, summary.json, and for each backend the benchmarks' results.json, results.csv and page.
``--rehearse`` goes through the same on the emulator and the CPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Those that put their tensors on the device of the backend they test.
DEVICE_TESTS = ("tests/test_ptx.py", "tests/test_layer_norm_cuda.py", "tests/test_int8_matmul_kernels.py",
                "tests/test_attention.py", "tests/test_attention_triton.py", "tests/test_layer_norm_triton.py",
                "tests/test_int8_matmul_triton.py", "tests/test_philox_triton.py",
                "tests/test_triton_bounds.py")  # fmt: skip
BUILD_S, TESTS_S, BENCH_S = 300, 240, 150


@dataclass
class Stage:
    name: str
    command: list[str]
    limit_s: float
    seconds: float = 0.0
    outcome: str = "not run"
    last_line: str = ""

    def run(self, log: Path, environment: dict[str, str]) -> bool:
        """Runs the command, its output in ``log`` and on the terminal; True if it succeeded within its time."""
        print(f"== {self.name}: {' '.join(self.command)}", flush=True)
        start = time.perf_counter()
        with log.open("a") as file:
            file.write(f"== {self.name}: {' '.join(self.command)}\n")
            file.flush()
            at = file.tell()
            try:
                run = subprocess.run(self.command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT,
                                     timeout=self.limit_s)  # fmt: skip
                self.outcome = "ok" if run.returncode == 0 else f"failed ({run.returncode})"
            except subprocess.TimeoutExpired:
                self.outcome = f"stopped after {self.limit_s:.0f} s"
        self.seconds = time.perf_counter() - start
        output = log.read_text(errors="replace")[at:].rstrip()
        self.last_line = output.splitlines()[-1] if output else ""
        print(f"{output[-4000:]}\n== {self.name}: {self.outcome}, {self.seconds:.0f} s\n", flush=True)
        return self.outcome == "ok"


def stages(folder: Path, rehearse: bool, workers: int) -> list[Stage]:
    python = sys.executable
    tests = [path for path in DEVICE_TESTS if (ROOT / path).exists()]
    # Each process holds a context on the GPU.
    parallel = ["-n", str(workers)] if importlib.util.find_spec("xdist") else []
    selection = "(test_matches_eager and none) or integer_intrinsics" if rehearse else "not cpu"
    pytest = [python, "-m", "pytest", *tests, "-p", "no:cacheprovider", "-k", selection, *parallel,
              f"--junit-xml={folder / 'tests.xml'}", "-q"]  # fmt: skip
    bench = [python, "-m", "bench", "--quick", "--out"]
    if rehearse:
        benches = [Stage("bench cpu", [*bench, str(folder / "cpu"), "--match", "128x768"], BENCH_S)]
    else:
        benches = [
            Stage(f"bench {name}", [*bench, str(folder / name), "--device", "cuda", "--backend", name], BENCH_S)
            for name in ("cuda", "triton")
        ]
    return [
        Stage("build", [python, "setup.py", "-q", "build_ext", "--inplace"], BUILD_S),
        Stage("backends", [python, "-m", "fastattn"], 60),
        Stage("tests", pytest, TESTS_S),
        *benches,
    ]


def why_no_gpu() -> str | None:
    """Asks a fresh process, since this one may have loaded the extension before it was built."""
    code = "import fastattn; print(fastattn.available_backends()['cuda'] or '')"
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, capture_output=True, text=True)
    return (run.stdout.strip() or None) if run.returncode == 0 else run.stderr.strip()


def device_name() -> str:
    import torch

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "rehearsal"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="default: bench/out/<GPU>-<time>")
    parser.add_argument("--rehearse", action="store_true", help="the same stages without a GPU, on the emulator")
    parser.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1), help="test processes")
    arguments = parser.parse_args()
    stamp = datetime.now(timezone.utc).strftime("%Y%m%d-%H%M%S")
    folder = (arguments.out or ROOT / "bench" / "out" / f"{device_name()}-{stamp}").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "OMP_WAIT_POLICY": "passive", "PYTHONPATH": str(ROOT)}
    build, *others = stages(folder, arguments.rehearse, arguments.workers)
    built = build.run(folder / "log.txt", environment)
    reason = why_no_gpu() if built else f"the build {build.outcome}"
    if reason is not None and not (arguments.rehearse and built):
        print(f"gpu: no CUDA backend: {reason}")
        (folder / "summary.json").write_text(json.dumps({"reason": reason, "stages": [asdict(build)]}, indent=1) + "\n")
        raise SystemExit(2)
    good = [stage.run(folder / "log.txt", environment) for stage in others]
    summary = {"reason": reason, "stages": [asdict(stage) for stage in (build, *others)]}
    (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    for stage in (build, *others):
        print(f"{stage.name:<11} {stage.outcome:<20} {stage.seconds:5.0f} s  {stage.last_line[:100]}")
    print(f"everything is in {folder}")
    raise SystemExit(0 if all(good) else 1)


if __name__ == "__main__":
    main()
