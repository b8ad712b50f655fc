"""nvcc compiles the CUDA sources without a warning, and without spilling registers where the kernels ship."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import cuda_occupancy
import cuda_report
import machine_code
import pytest
from emulated import PTX_TESTS, ROOT, host_compiler

KERNELS = sorted((ROOT / "csrc").rglob("*.cu"))
SOURCES = [*KERNELS, *sorted(PTX_TESTS.glob("*.cu"))]
ONLY_HOPPER = ("sm90", "misuse")
# Of the sources that differ in nothing but the 16-bit type: the forward in bf16, the backward in fp16.
TWINS = re.compile("fwd.*_fp16|bwd.*_bf16")


def _architectures(source: Path) -> list[str]:
    """One each, to keep the suite short; `make cuda` compiles every source for all of them."""
    return ["90a"] if any(mark in source.name for mark in ONLY_HOPPER) else ["80"]


CASES = [
    (source, architecture)
    for source in SOURCES
    if not TWINS.search(source.name)
    for architecture in _architectures(source)
]


@pytest.mark.timeout(1200)
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")
@pytest.mark.parametrize("source, architecture", CASES, ids=[f"{s.stem}-sm_{a}" for s, a in CASES])
def test_nvcc_compiles_without_warnings(source, architecture):
    # One folder a source: test processes run at the same time, and a second run compiles what changed.
    folder = cuda_report.REPORT / "tests" / source.stem
    (compilation,) = cuda_report.compile_all([(source, architecture)], folder)
    log = compilation.log
    assert not cuda_report.complaints(log), log
    uses = cuda_report.parse(log, source.stem, architecture)
    assert uses
    if source in KERNELS:
        assert not [use for use in uses if use.spill_bytes], log
    if source in KERNELS and architecture == "90a":
        if machine_code.tool("nvdisasm") is None:
            pytest.skip("its machine code was not read: no nvdisasm, which Triton's package has")
        report = machine_code.report_on(compilation.object)
        assert not report.faults, report.faults
        assert report.products > 0 or "layer_norm" in source.name


def test_a_source_that_is_left_out_has_a_twin():
    names = {source.name for source in SOURCES}
    for name in filter(TWINS.search, names):
        other = name.replace("fp16", "bf16") if "fp16" in name else name.replace("bf16", "fp16")
        assert other in names and not TWINS.search(other)


PTXAS = """
ptxas info    : Compiling entry function '_Z4goodv' for 'sm_80'
ptxas info    : Function properties for _Z4goodv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 2048 bytes smem, 540 bytes cmem[0]
ptxas info    : Compiling entry function '_Z3badv' for 'sm_80'
ptxas info    : Function properties for _Z3badv
    16 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 128 registers, 380 bytes cmem[0]
"""


def test_the_report_reads_what_ptxas_says():
    good, bad = cuda_report.parse(PTXAS, "kernel", "80")
    assert (good.name, good.registers, good.spill_bytes, good.shared_bytes) == ("_Z4goodv", 40, 0, 2048)
    assert (bad.registers, bad.spill_bytes, bad.stack_bytes, bad.shared_bytes) == (128, 12, 16, 0)
    assert not cuda_report.complaints(PTXAS)
    assert cuda_report.complaints("a.cu(3): warning #128-D: loop is not reachable")


KIB = 1024
# (architecture, registers, threads, shared bytes) -> warps
OCCUPANCY = {
    ("80", 40, 0, 0): 48,  # 12 warps of 1280 registers in each quarter of the register file
    ("80", 255, 128, 48 * KIB): 8,  # registers: two blocks
    ("80", 128, 128, 40 * KIB): 16,  # registers and shared memory: four blocks
    ("86", 128, 128, 40 * KIB): 8,  # shared memory: two blocks of 41 KiB
    ("86", 128, 128, 49 * KIB): 8,  # 100 KiB to the byte
    ("86", 128, 128, 50 * KIB): 4,
    ("90a", 168, 128, 24 * KIB): 12,
    ("90a", 168, 384, 226 * KIB): 12,
    ("120", 32, 32, 0): 24,  # no more blocks
    ("120", 4, 256, 129 * KIB): 0,
}


@pytest.mark.parametrize("use", OCCUPANCY, ids=str)
def test_occupancy(use):
    assert cuda_occupancy.resident_warps(*use) == OCCUPANCY[use]


FWD_KERNEL = (
    "void fastattn::attention_fwd_kernel<fastattn::AttentionFwdTraits<__half, 128, 2, 4, 64, (fastattn::ScoreKind)0>, "
    "fastattn::Below<90> >(fastattn::AttentionFwdArgs)"
)


def test_kernels_names_are_taken_apart():
    traits = "fastattn::AttentionFwdTraits<__half, 128, 2, 4, 64, (fastattn::ScoreKind)0>"
    assert cuda_occupancy.split_name(FWD_KERNEL) == ("attention_fwd_kernel", traits)
    assert cuda_occupancy.split_name("void fastattn::reduce_splits_kernel<256>(float*)") == (
        "reduce_splits_kernel", None)  # fmt: skip
    assert cuda_occupancy.split_name("fastattn::int8_align_rows_kernel(signed char const*, long)") == (
        "int8_align_rows_kernel", None)  # fmt: skip
    assert (
        cuda_report.readable(FWD_KERNEL)
        == "attention_fwd_kernel<AttentionFwdTraits<fp16, 128, 2, 4, 64, 0>, Below<90>>"
    )


def test_kernels_without_code_are_told_by_their_name():
    on = {
        arch: cuda_report.KernelUse("", "", arch, 4, 0, 0, 0).is_left_out(FWD_KERNEL) for arch in ("89", "90a", "120")
    }
    assert on == {"89": False, "90a": True, "120": True}


@pytest.mark.skipif(host_compiler() is None, reason="no C++ compiler on PATH")
def test_launch_sizes_are_those_of_the_traits():
    """128 rows of q, 64 of k and of v, 256 bytes each; four warps."""
    dmask = "void fastattn::attention_bwd_dmask_kernel<__half>(fastattn::DmaskArgs)"
    folder = ROOT / "csrc" / "attention"
    sizes = cuda_occupancy.launch_sizes([FWD_KERNEL, dmask], [folder / "attention_fwd_cuda.cu",
                                                              folder / "attention_bwd_cuda.cu"])  # fmt: skip
    assert sizes[FWD_KERNEL] == cuda_occupancy.LaunchSize(128, 64 * KIB)
    assert sizes[dmask] == cuda_occupancy.LaunchSize(128, 48 * KIB)


# What must go through a wrapper, so that it runs emulated. -> the files that may have it
RESERVED = {
    r"\basm\b": ("common/ptx.cuh", "common/ptx_sm90.cuh", "common/ptx_cluster.cuh", "common/ptx_wgmma.cuh"),
    r"<<<": (),
    r"__shared__": ("common/cuda.cuh",),
    r"__CUDA_ARCH__": ("common/cuda.cuh",),
    r"#include [<\"](cuda|cooperative|mma\.h|cute|cutlass)": ("common/cuda.cuh", "common/tensor_map.cuh"),
}


@pytest.mark.parametrize("pattern", RESERVED)
def test_kernels_use_the_wrappers(pattern):
    sources = [path for suffix in ("*.cu", "*.cuh") for path in (ROOT / "csrc").rglob(suffix)]
    assert sources
    found = []
    for path in sources:
        code = re.sub(r"//.*", "", path.read_text())
        if re.search(pattern, code) and str(path.relative_to(ROOT / "csrc")) not in RESERVED[pattern]:
            found.append(str(path))
    assert not found, f"{pattern} appears in {found}"
