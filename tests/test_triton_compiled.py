"""What Triton's compiler makes of the kernels, run on the emulator under a harsh schedule: a few of each family.

``FASTATTN_TEST_TRITON=80`` (or 90) in front of pytest runs any tests of backend "triton" this way (tests/conftest.py).
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from attention_cases import FEATURES, Case, check
from devices import triton_compiled_for
from emulated import ROOT, KernelError, host_compiler

# By GPU: run in a process in which Triton compiles instead of interpreting, with those of this file.
TESTS = {
    "80": [
        "test_attention_triton.py::test_feature_matches_eager[causal]",
        "test_kv_cache_triton.py::test_options[window-16]",
        "test_layer_norm_triton.py::test_half_precision[add_rms_norm-bfloat16]",
    ],
    "90": [
        "test_attention_triton.py::test_half_precision[everything-bfloat16]",
        "test_int8_matmul_triton.py::test_quantising_inside_the_product_changes_no_bit[torch.bfloat16-1]",
    ],
}
HERE = triton_compiled_for() is not None
in_that_process = pytest.mark.skipif(not HERE, reason="test_kernels_compiled_for runs it")


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.skipif(host_compiler() is None, reason="no C++ compiler on PATH")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run on the GPU")
@pytest.mark.skipif(HERE, reason="this is the process that it starts")
@pytest.mark.parametrize("gpu", TESTS)
def test_kernels_compiled_for(gpu):
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-v", f"tests/{Path(__file__).name}"]
    environment = {**os.environ, "TRITON_INTERPRET": "0", "FASTATTN_TEST_TRITON": gpu}
    run = subprocess.run([*command, *(f"tests/{each}" for each in TESTS[gpu])], cwd=ROOT, env=environment,
                         capture_output=True, text=True)  # fmt: skip
    assert run.returncode == 0, f"{run.stdout[-6000:]}\n{run.stderr[-2000:]}"
    assert f" {len(TESTS[gpu]) + len(SHAPES) + len(WRONG)} passed" in run.stdout, run.stdout[-6000:]


# Several tiles of queries and keys; the whole product of 64 rows that wgmma takes.
SHAPES = {
    "causal": Case(batch=1, heads=2, seqlen_q=200, seqlen_k=300, head_dim=64, options={"is_causal": True}),
    "mask": dataclasses.replace(FEATURES["float_mask"], batch=1, heads=2, seqlen_q=200, seqlen_k=150),
}


@in_that_process
@pytest.mark.parametrize("shape", SHAPES)
def test_attention_in_several_tiles(shape):
    check(SHAPES[shape], torch.float16, "triton")


WRONG = {
    "does not wait for copies": (r"cp\.async\.wait_group\s+\d+;", ""),
    "adds other lanes": (r"(shfl\.sync\.bfly\.b32\s+%\w+, %\w+), 2,", r"\1, 1,"),
    "does not wait for other threads": (r"bar\.sync\s+0;", ""),
}


@in_that_process
@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_instruction_is_noticed(wrong, monkeypatch):
    from triton_compiled import CompiledTriton

    monkeypatch.setattr(CompiledTriton.installed, "edit", lambda ptx: re.sub(*WRONG[wrong], ptx))
    with pytest.raises((AssertionError, KernelError)):
        check(SHAPES["causal"], torch.float16, "triton")
