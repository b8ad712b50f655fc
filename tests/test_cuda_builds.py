"""nvcc compiles every CUDA source without a warning, and without spilling registers where the kernels ship."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from emulated import NVCC_FLAGS, PTX_TESTS, ROOT

KERNELS = sorted((ROOT / "csrc").rglob("*.cu"))
SOURCES = [*KERNELS, *sorted(PTX_TESTS.glob("*.cu"))]
ONLY_HOPPER = ("sm90", "misuse")


def _architectures(source: Path) -> list[str]:
    """One each, to keep the suite short; `make cuda` compiles the kernels for all of them."""
    return ["90a"] if any(mark in source.name for mark in ONLY_HOPPER) else ["80"]


CASES = [(source, architecture) for source in SOURCES for architecture in _architectures(source)]


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")
@pytest.mark.parametrize("source, architecture", CASES, ids=[f"{s.stem}-sm_{a}" for s, a in CASES])
def test_nvcc_compiles_without_warnings(source, architecture, tmp_path):
    command = ["nvcc", *NVCC_FLAGS, "-gencode", f"arch=compute_{architecture},code=sm_{architecture}",
               "-Xcompiler", "-Wall", "-Xptxas", "-v", "-c", str(source), "-o", str(tmp_path / "out.o")]  # fmt: skip
    run = subprocess.run(command, capture_output=True, text=True)
    output = run.stdout + run.stderr
    assert run.returncode == 0, output
    # nvcc notices some of the bugs that bugs_*.cu have on purpose: enum value 0 is the right kernel.
    complaint = re.compile(r"warning|Potential Performance Loss(?!.*L3Bug[1-9])", re.I)
    warnings = [line for line in output.splitlines() if complaint.search(line)]
    assert not warnings, "\n".join(warnings)
    if source in KERNELS:
        spills = [line for line in output.splitlines() if re.search(r"[1-9]\d* bytes spill", line)]
        assert not spills, output


# What must go through a wrapper, so that it runs emulated. -> the files that may have it
RESERVED = {
    r"\basm\b": ("common/ptx.cuh", "common/ptx_sm90.cuh", "common/ptx_wgmma.cuh"),
    r"<<<": (),
    r"__shared__": ("common/cuda.cuh",),
    r"__CUDA_ARCH__": (),
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
