"""Compiles planned launches of Triton kernels for GPUs that are not there, and reads what came out.

    python -m tests.triton_aot [--quick | --candidates] [--filter TEXT] [--gpus 80,90,gfx942] [--jobs N]

prints registers, spills and shared memory of every kernel of fastattn in every default configuration, and fails if one
spills, asks for more shared memory than its GPU has, was compiled to nothing, or for sm_90 does not use wgmma where it
multiplies matrices of 64 rows or more or touches registers of products in flight (tests/machine_code.py).
Every module of tests named in MODULES has ``aot_cases(capability, quick)``, which yields ``(name, Launch)``, and
``aot_candidates(capability)``, which yields what tuning tries (``fastattn.set_autotune``) instead of the defaults.

Kernels must be compiled by a process in which Triton does not interpret them: tests run this file as a subprocess.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from fastattn.ops.triton_launch import AMD, Launch
from tests import machine_code

MODULES = ("tests.attention_triton_cases", "tests.kv_cache_triton_cases", "tests.norm_int8_triton_cases")
# wgmma multiplies 64 rows at a time: smaller tiles take mma.
WGMMA_ROWS = 64
# Bytes of shared memory that a block may ask for (CUDA C programming guide, compute capabilities).
SHARED_MEMORY = {(8, 0): 163 << 10, (8, 6): 99 << 10, (8, 9): 99 << 10, (9, 0): 227 << 10, (10, 0): 227 << 10,
                 (12, 0): 99 << 10, AMD: 64 << 10}  # fmt: skip
# Tiles are tuned with Triton 3.9, where nothing spills. Of the widest norms' gradients, which take every register that
# 16 warps have, 3.7 spills a few: up to 48 bytes a thread.
TOLERATED_SPILL = 0 if tuple(map(int, version("triton").split(".")[:2])) >= (3, 9) else 64
_POINTERS = {torch.float64: "*fp64", torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16",
             torch.int64: "*i64", torch.int32: "*i32", torch.int8: "*i8", torch.uint8: "*u8",
             torch.bool: "*i1"}  # fmt: skip


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of one launch, for one GPU."""

    name: str
    gpu: str  # "sm_90", "gfx942"
    registers: int
    spilled_bytes: int
    shared_bytes: int
    num_warps: int
    has_wide_dot: bool
    has_wgmma: bool
    stores: bool
    faults: tuple[str, ...]  # of machine code for sm_90
    seconds: float

    def complaints(self) -> list[str]:
        found = []
        if self.spilled_bytes > TOLERATED_SPILL:
            found.append(f"spills {self.spilled_bytes} bytes a thread")
        if not self.stores:
            found.append("compiled to nothing: it writes no result")
        limit = SHARED_MEMORY[capability_of(self.gpu)]
        if self.shared_bytes > limit:
            found.append(f"asks for {self.shared_bytes} bytes of shared memory of {limit}")
        if self.gpu == "sm_90" and self.has_wide_dot and not self.has_wgmma:
            found.append("multiplies matrices without wgmma")
        found += self.faults
        return found

    def __str__(self) -> str:
        return (
            f"{self.gpu:<6} {self.name:<64} {self.num_warps:>2} warps {self.registers:>4} registers "
            f"{self.spilled_bytes:>4} B spilled {self.shared_bytes / 1024:>6.1f} KiB shared {self.seconds:>5.1f} s"
            + "".join(f"   <-- {complaint}" for complaint in self.complaints())
        )


def capability_of(gpu: str) -> tuple[int, int]:
    """Of "sm_90" or, as the command line has it, "90"; AMD for "gfx942" and the like."""
    digits = gpu.removeprefix("sm_")
    return AMD if gpu.startswith("gfx") else (int(digits[:-1]), int(digits[-1]))


def _typed(value: Any, specialized: bool) -> tuple[str, bool]:
    """(type in Triton's signature, whether it counts as divisible by 16), as Triton's launcher has them."""
    if isinstance(value, torch.Tensor):
        return _POINTERS[value.dtype], value.is_meta or value.data_ptr() % 16 == 0
    if hasattr(value, "block_shape"):  # a descriptor for TMA
        return f"tensordesc<{_POINTERS[value.base.dtype].removeprefix('*')}{list(value.block_shape)}>", False
    if isinstance(value, float):
        return "fp32", False
    return ("i32" if -(2**31) <= value < 2**31 else "i64"), specialized and value % 16 == 0


def specialized(launch: Launch) -> tuple[dict[str, str], dict[tuple[int], Any], dict[tuple[int], list]]:
    """(types, constants, known divisors) of what the launcher compiles: launches that agree in them share a kernel."""
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        specialized = not parameter.do_not_specialize
        # The launcher makes constants of absent tensors and of ones, too.
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1 and specialized):
            signature[parameter.name] = "constexpr"
            constants[(index,)] = value
            continue
        signature[parameter.name], divisible = _typed(value, specialized)
        if divisible:
            attributes[(index,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def compile_launch(name: str, launch: Launch, gpu: str) -> Compiled:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    # Triton's default is about to change, and warns.
    assert "enable_fp_fusion" in launch.options, f"{name} leaves open whether a product and a sum are rounded once"
    source = ASTSource(launch.kernel, *specialized(launch))
    options, target = dict(launch.options), GPUTarget("cuda", int(gpu), 32) if gpu.isdigit() else None
    if target is None:
        options.pop("maxnreg", None)  # as ``triton_launch.launch`` does
        target = GPUTarget("hip", gpu, 64 if gpu.startswith("gfx9") else 32)
    start = time.perf_counter()
    compiled = triton.compile(source, target=target, options=options)
    seconds = time.perf_counter() - start
    faults: list[str] = []
    if "amdgcn" in compiled.asm:
        text = compiled.asm["amdgcn"]
        registers, spilled = _amd_usage(text)
        stores = "global_store" in text or "buffer_store" in text
    else:
        gpu, text = f"sm_{gpu}", compiled.asm["ptx"]
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            registers, spilled = _resource_usage(file.name)
            faults = machine_code.report_on(Path(file.name)).faults if gpu == "sm_90" else []
        stores = "st.global" in text
    return Compiled(
        name, gpu, registers, spilled, compiled.metadata.shared, launch.options["num_warps"],
        _has_wide_dot(compiled.asm["ttir"]), "wgmma.mma_async" in text, stores, tuple(faults), seconds,
    )  # fmt: skip


def _has_wide_dot(ttir: str) -> bool:
    """Of operands that tensor cores multiply: of float32, only those rounded to TensorFloat-32."""
    dots = re.findall(r"tt\.dot (.*) : tensor<\w+x(\w+)> \* .*-> tensor<(\d+)x", ttir)
    return any(int(rows) >= WGMMA_ROWS and (dtype != "f32" or "tf32" in options) for options, dtype, rows in dots)


def _resource_usage(cubin: str) -> tuple[int, int]:
    """(registers, bytes of local memory) a thread: a Triton kernel has local memory only for what it spills."""
    command = [machine_code.tool("cuobjdump"), "--dump-resource-usage", cubin]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    usage = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", run.stdout)}
    return usage["REG"], usage["STACK"] + usage["LOCAL"]


def _amd_usage(assembly: str) -> tuple[int, int]:
    """(vector registers, bytes of those spilled) a thread."""
    usage = {key: int(value) for key, value in re.findall(r"\.(vgpr_count|vgpr_spill_count):\s+(\d+)", assembly)}
    return usage["vgpr_count"], 4 * usage["vgpr_spill_count"]


def all_cases(capability: tuple[int, int], which: str) -> Iterator[tuple[str, Launch]]:
    for name in MODULES:
        module = importlib.import_module(name)
        if which == "candidates":
            yield from module.aot_candidates(capability)
        else:
            yield from module.aot_cases(capability, which == "quick")


def compile_share(gpu: str, which: str, pattern: str, share: int, shares: int) -> Iterator[Compiled]:
    """One of every ``shares`` kernels."""
    cases = (case for case in all_cases(capability_of(gpu), which) if re.search(pattern, case[0]))
    for name, launch in itertools.islice(cases, share, None, shares):
        yield compile_launch(name, launch, gpu)


def report_share(arguments: tuple[str, str, str, int, int]) -> tuple[int, int]:
    """(kernels compiled, those with complaints)"""
    count = failed = 0
    for compiled in compile_share(*arguments):
        print(f"{compiled}\n", end="", flush=True)  # one write, which other processes' lines do not split
        count += 1
        failed += bool(compiled.complaints())
    return count, failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--quick", action="store_true", help="a few kernels in a few configurations")
    which.add_argument("--candidates", action="store_true", help="what tuning tries instead of the defaults")
    parser.add_argument("--filter", default="", help="a regular expression that the names must match")
    parser.add_argument("--gpus", default="80,90,100", help="compute capabilities without the dot, AMD's architectures")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes that compile side by side")
    arguments = parser.parse_args()
    cases = "quick" if arguments.quick else "candidates" if arguments.candidates else "defaults"
    shares = [
        (gpu, cases, arguments.filter, share, arguments.jobs)
        for gpu in arguments.gpus.split(",")
        for share in range(arguments.jobs)
    ]
    with multiprocessing.get_context("spawn").Pool(arguments.jobs) as pool:
        counts = pool.map(report_share, shares, chunksize=1)
    count, failed = (sum(numbers) for numbers in zip(*counts, strict=True))
    print(f"{count} kernels compiled, {failed} with complaints")
    return 1 if failed or not count else 0


if __name__ == "__main__":
    sys.exit(main())
