"""Attention's Triton kernels compile for GPUs that are not there; `python -m tests.triton_aot` compiles all of them."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from emulated import ROOT

from fastattn.ops import attention_triton_tiles as tiles
from fastattn.ops.triton_launch import AMD

pytest.importorskip("triton")


@pytest.mark.parametrize(("gpu", "wants"), [("80", 5), ("90", 5), ("100", 2)])
def test_kernels_compile_without_spills(gpu, wants):
    """In a process of its own, in which Triton does not interpret."""
    kernels = "fwd|dq|dkdv|delta|weights" if wants == 5 else "fwd|delta"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.triton_aot", "--gpus", gpu, "--filter", f"({kernels}) float16 64 causal"]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert f"{wants} kernels compiled, 0 with complaints" in run.stdout


def test_what_tuning_tries_compiles_without_spills():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.triton_aot", "--candidates", "--gpus", "90", "--jobs", "1",
               "--filter", "dkdv float16 64 causal|fwd float16 128 packed_causal|row_fwd bfloat16 768"]  # fmt: skip
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.count("attention_dkdv") == 3 and run.stdout.count("row_fwd") > 2
    assert run.stdout.count("packed_causal") == 2


@pytest.mark.parametrize("gpu", ["80", "90"])
def test_kernels_of_a_cache_compile_without_spills(gpu):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.triton_aot", "--gpus", gpu, "--jobs", "1", "--filter",
               r"float16 64 decode_paged_16 |cached float16 64 prompt_paged_256"]  # fmt: skip
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    for kernel in ("kv_append", "attention_cached float16 64 decode", "combine_parts", "prompt_paged_256 64x64"):
        assert kernel in run.stdout


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (11, 0), (12, 1), AMD], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tiles_suit_what_the_kernels_assume(capability, dtype):
    gpu = tiles.Gpu(capability)
    for block_d in (16, 64, 128, 256):
        for features in range(4):
            given = (gpu, dtype, block_d, features)
            for tile in (*tiles.forward(*given), *tiles.dq(*given), *tiles.dkdv(*given)):
                # Dropout draws for 32 keys at once; tl.dot wants 16 rows.
                assert tile.block_k % 32 == 0 and tile.block_q >= 16
                # The CUDA cores' operands, all in registers, do not fit them whole.
                assert dtype != torch.float32 or tile.head_dim_slice > 0
        assert tiles.scores(gpu, dtype, block_d).block_k % 32 == 0


@pytest.mark.parametrize("capability", [(8, 8), (8, 9), (11, 0), (12, 1), (13, 0), AMD], ids=str)
def test_gpus_of_little_or_unknown_shared_memory_get_two_stages(capability):
    def stages(gpu):
        return max(tiles.forward(gpu, torch.float16, block_d, 0)[0].num_stages for block_d in (64, 128, 256))

    assert stages(tiles.Gpu((8, 0))) == 3 and stages(tiles.Gpu(capability)) == 2
