"""nvcc compiles every CUDA source without a warning, and without spilling registers where the kernels ship."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import cuda_report
import pytest
from emulated import PTX_TESTS, ROOT

KERNELS = sorted((ROOT / "csrc").rglob("*.cu"))
SOURCES = [*KERNELS, *sorted(PTX_TESTS.glob("*.cu"))]
ONLY_HOPPER = ("sm90", "misuse")


def _architectures(source: Path) -> list[str]:
    """One each, to keep the suite short; `make cuda` compiles the kernels for all of them."""
    return ["90a"] if any(mark in source.name for mark in ONLY_HOPPER) else ["80"]


CASES = [(source, architecture) for source in SOURCES for architecture in _architectures(source)]


@pytest.mark.timeout(1200)
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")
@pytest.mark.parametrize("source, architecture", CASES, ids=[f"{s.stem}-sm_{a}" for s, a in CASES])
def test_nvcc_compiles_without_warnings(source, architecture):
    # One folder a source: test processes run at the same time, and a second run compiles what changed.
    ((*_, log),) = cuda_report.compile_all([source], [architecture], cuda_report.REPORT / "tests" / source.stem)
    assert not cuda_report.complaints(log), log
    uses = cuda_report.parse(log, source.stem, architecture)
    assert uses
    if source in KERNELS:
        assert not [use for use in uses if use.spill_bytes], log


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
    assert (good.name, good.registers, good.spill_bytes, good.shared_bytes, good.warps) == ("_Z4goodv", 40, 0, 2048, 51)
    assert (bad.registers, bad.spill_bytes, bad.stack_bytes, bad.shared_bytes, bad.warps) == (128, 12, 16, 0, 16)
    assert not cuda_report.complaints(PTXAS)
    assert cuda_report.complaints("a.cu(3): warning #128-D: loop is not reachable")


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
