"""The norms' and INT8 kernels of Triton read and write nothing outside their tensors: each one, outputs and workspace
too, ends at a page that may not be touched. The cases run in Triton's interpreter, in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from devices import triton_compiled_for
from test_attention_bounds import ROOT, guarded

import fastattn
from fastattn import _triton
from fastattn.dispatch import available_backends
from fastattn.ops import int8_matmul_triton_launch, layer_norm_triton_launch


def guarded_or_empty(tensor: torch.Tensor) -> torch.Tensor:
    return guarded(tensor) if tensor.numel() > 0 else tensor


def norm_cases() -> None:
    for cols in (1, 33, 64, 97, 131):
        for op in ("layer_norm", "add_rms_norm"):
            print(op, cols, flush=True)
            # An operand that is a slice of wider rows ends with its last row, not with the row's padding.
            leaves = [guarded(torch.randn(7 * 140)).as_strided((7, cols), (140, 1), 140 - cols).requires_grad_()]
            if op.startswith("add"):
                leaves.append(guarded(torch.randn(7, cols)).requires_grad_())
            weight = guarded(torch.randn(cols)).requires_grad_()
            options = {"dropout_p": 0.2} if op.startswith("add") else {}
            outputs = getattr(fastattn, op)(*leaves, cols, weight, backend="triton", **options)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            torch.autograd.grad(outputs, [*leaves, weight], [guarded(torch.randn(7, cols)) for _ in outputs])


def int8_cases() -> None:
    for rows, columns, depth in ((1, 1, 1), (5, 33, 65), (17, 70, 130), (40, 3, 257)):
        print("int8", rows, columns, depth, flush=True)
        x = guarded(torch.randn(rows, depth).half())
        weight = guarded(torch.randint(-127, 128, (columns, depth), dtype=torch.int8))
        scale, bias = guarded(torch.rand(columns)), guarded(torch.randn(columns))
        fastattn.int8_linear(x, weight, scale, bias, backend="triton")
        q, q_scale = fastattn.quantize_int8(x, backend="triton")
        fastattn.int8_matmul(guarded(q), weight, guarded(q_scale), scale, bias, backend="triton")


def run_cases() -> None:
    layer_norm_triton_launch.FWD_MAX_COLS = layer_norm_triton_launch.BWD_MAX_COLS = 64
    layer_norm_triton_launch.LOOP_COLS = 32
    int8_matmul_triton_launch.QUANTIZE_MAX_DEPTH = 128
    int8_matmul_triton_launch.QUANTIZE_LONG["BLOCK_DEPTH"] = 64
    empty = torch.empty
    torch.empty = lambda *shape, **options: guarded_or_empty(empty(*shape, **options))
    norm_cases()
    int8_cases()


@pytest.mark.skipif(
    available_backends()["triton"] is not None, reason=f"no triton backend: {available_backends()['triton']}"
)
@pytest.mark.skipif(not _triton.is_interpreted(), reason="a GPU's memory has no pages to protect")
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="guard pages are set with Linux's mmap and mprotect")
def test_kernels_stay_inside_their_tensors():
    command = [sys.executable, str(Path(__file__).resolve())]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((ROOT, str(Path(__file__).parent)))}
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    last_case = run.stdout.strip().splitlines()[-1:]
    assert run.returncode == 0, (
        f"exit status {run.returncode} (negative: killed by that signal) at {last_case}\n{run.stderr[-2000:]}"
    )


if __name__ == "__main__":
    if gpu := triton_compiled_for():
        from emulated import Mode
        from triton_compiled import CompiledTriton

        CompiledTriton(gpu, Mode()).install()
    run_cases()
