"""Attention reads nothing outside its operands: each one lies between two pages that may not be touched.

The cases run in a process of their own, so that a stray read is a failed test and not a dead test run.
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastattn._extension import extension, missing_reason

ROOT = str(Path(__file__).resolve().parents[1])
PAGE = mmap.PAGESIZE
SEQLENS_Q = (1, 5, 65, 130)  # decode, one register tile, a remainder, two blocks of unequal height
SEQLENS_K = (1, 63, 130, 300)
HEAD_DIMS = ((64, 64), (3, 17), (80, 24))  # whole vectors, less than one, between
MASKS = (None, "bool", "padding", "float32", "float16")


def guarded(tensor: torch.Tensor) -> torch.Tensor:
    """A copy that ends where its last page ends; the pages around it are not readable. Never freed."""
    libc = ctypes.CDLL(None)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    size = -(-tensor.nbytes // PAGE) * PAGE
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    begin = libc.mmap(None, size + 2 * PAGE, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
    assert libc.mprotect(begin, PAGE, 0) == 0 and libc.mprotect(begin + PAGE + size, PAGE, 0) == 0
    memory = (ctypes.c_char * tensor.nbytes).from_address(begin + PAGE + size - tensor.nbytes)
    return torch.frombuffer(memory, dtype=tensor.dtype).view(tensor.shape).copy_(tensor)


def make_mask(kind: str | None, seqlen_q: int, seqlen_k: int) -> torch.Tensor | None:
    if kind is None:
        return None
    if kind in ("bool", "padding"):
        return guarded(torch.rand(1, 1, seqlen_q if kind == "bool" else 1, seqlen_k) < 0.5)
    return guarded(torch.randn(1, 1, seqlen_q, seqlen_k).to(getattr(torch, kind)))


def run_cases(dtype: torch.dtype) -> None:
    for isa, seqlen_q, seqlen_k, (head_dim, head_dim_v), mask in itertools.product(
        extension.usable_cpu_isas(), SEQLENS_Q, SEQLENS_K, HEAD_DIMS, MASKS
    ):
        extension.set_cpu_isa(isa)
        print(isa, dtype, seqlen_q, seqlen_k, head_dim, head_dim_v, mask, flush=True)
        query = guarded(torch.randn(1, 2, seqlen_q, head_dim).to(dtype))
        key = guarded(torch.randn(1, 1, seqlen_k, head_dim).to(dtype))
        value = guarded(torch.randn(1, 1, seqlen_k, head_dim_v).to(dtype))
        attn_mask = make_mask(mask, seqlen_q, seqlen_k)
        out, _ = torch.ops.fastattn.attention(
            query, key, value, attn_mask, None, None, None, 0.0, True, 1.0, -1, -1, True, 0.0
        )
        assert not out.isnan().any()


@pytest.mark.skipif(extension is None, reason=f"the extension is not built: {missing_reason}")
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="guard pages are set with Linux's mmap and mprotect")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_forward_stays_inside_its_operands(dtype):
    command = [sys.executable, str(Path(__file__).resolve()), dtype]
    run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ROOT})
    last_case = run.stdout.strip().splitlines()[-1:]
    assert run.returncode == 0, (
        f"exit status {run.returncode} (negative: killed by that signal) at {last_case}\n{run.stderr[-2000:]}"
    )


if __name__ == "__main__":
    run_cases(getattr(torch, sys.argv[1]))
