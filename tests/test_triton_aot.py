"""Triton's kernels compile for GPUs that are not there: no spills, shared memory that fits, wgmma on Hopper.

Every default configuration: ``make triton``; here a few of each kernel.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
ROOT = Path(__file__).parent.parent


def compile_kernels(*arguments: str) -> subprocess.CompletedProcess:
    """In a process of its own, in which Triton compiles instead of interpreting."""
    command = [sys.executable, "-m", "tests.triton_aot", *arguments]
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_norms_and_int8_compile_without_complaints():
    # One process: it takes longer to start than to compile a kernel.
    run = compile_kernels("--quick", "--filter", "row_|loop_|sums|quantize|int8")
    print(run.stdout)
    assert run.returncode == 0, f"{run.stdout[-4000:]}\n{run.stderr[-2000:]}"
    compiled = {tuple(line.split()[:2]) for line in run.stdout.splitlines() if line.startswith("sm_")}
    for kernel in ("row_fwd", "loop_fwd", "row_bwd", "loop_bwd", "partial_sums", "column_sums", "quantize_rows",
                   "int8_matmul", "int8_linear"):  # fmt: skip
        assert compiled >= {(gpu, kernel) for gpu in ("sm_80", "sm_90", "sm_100")}
    assert re.search(r"\d+ kernels compiled, 0 with complaints", run.stdout)


def test_kernels_compile_for_amd():
    """Without what only NVIDIA's compiler knows, in 64 KiB of shared memory."""
    run = compile_kernels("--jobs", "1", "--quick", "--gpus", "gfx942", "--filter", "attention_fwd|row_|int8")
    assert run.returncode == 0, f"{run.stdout[-4000:]}\n{run.stderr[-2000:]}"
    for kernel in (
        "attention_fwd float32 64",
        "attention_fwd float16 64",
        "row_fwd",
        "row_bwd",
        "int8_matmul",
        "int8_linear",
    ):
        assert f"gfx942 {kernel}" in run.stdout
