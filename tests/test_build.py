"""The build: one OpenMP runtime, no instruction set leaking into another, a package that works without a compiler."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastattn import _extension

ROOT = Path(__file__).resolve().parent.parent
needs_extension = pytest.mark.skipif(_extension.extension is None, reason=str(_extension.missing_reason))


# An editable installation finds fastattn._C for any package called fastattn; the tests mean the package in `cwd` alone.
ONLY_HERE = 'import sys; sys.meta_path = [f for f in sys.meta_path if "editable" not in getattr(f, "__module__", "")]\n'


def run_python(code: str, cwd: Path, stream: str = "stdout") -> str:
    command = [sys.executable, "-c", ONLY_HERE + code]
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    return getattr(result, stream)


def copy_package(target: Path) -> None:
    """The Python files of the package alone, as an installation without a compiler has them."""
    ignored = shutil.ignore_patterns("*.so", "_build*", "__pycache__")
    shutil.copytree(ROOT / "fastattn", target / "fastattn", ignore=ignored)


@needs_extension
def test_process_has_one_openmp_runtime():
    if not Path("/proc/self/maps").exists():
        pytest.skip("/proc/self/maps is Linux's")
    code = """
import torch, fastattn
fastattn.layer_norm(torch.randn(64, 512), (512,))
libraries = {line.split()[-1] for line in open("/proc/self/maps")}
print(sum(any(name in library for name in ("libgomp", "libomp", "libiomp")) for library in libraries))
"""
    assert run_python(code, ROOT).strip() == "1"


@needs_extension
def test_isa_builds_share_no_code():
    """The linker keeps one copy of a weak symbol (an inline function that was not inlined). Outside the build's own
    namespace that copy could be AVX-512 code, serving a machine that has none."""
    objects = sorted((ROOT / "build" / "ninja" / f"torch-{torch.__version__}").rglob("*_cpu.*.o"))
    if not objects or shutil.which("nm") is None:
        pytest.skip("needs the build folder of an in-place build, and nm")
    for path in objects:
        isa = path.suffixes[-2].lstrip(".")
        listing = subprocess.run(
            ["nm", "-C", "--defined-only", path], capture_output=True, text=True, check=True
        ).stdout
        for line in listing.splitlines():
            kind, name = line.split(maxsplit=2)[1:]
            # A pointer to the C++ runtime, not code.
            if name == "DW.ref.__gxx_personality_v0":
                continue
            assert kind not in "WVu" or f"isa_{isa}::" in name, f"{path.name} exports shared inline code: {name}"


def test_package_without_extension_runs_eager_and_says_why(tmp_path):
    copy_package(tmp_path)
    (tmp_path / "fastattn" / "_build_report.json").write_text(json.dumps({"built": False, "reason": "no compiler"}))
    code = """
import torch, fastattn
q = torch.randn(1, 2, 5, 8)
torch.testing.assert_close(fastattn.attention(q, q, q), torch.nn.functional.scaled_dot_product_attention(q, q, q))
torch.testing.assert_close(fastattn.layer_norm(q, (8,)), torch.nn.functional.layer_norm(q, (8,)))
fastattn.int8_linear(q, *fastattn.quantize_int8(torch.randn(3, 8)))
print(fastattn.available_backends()["cpu"])
print(fastattn.explain("attention", q, q, q))
"""
    warning = "fastattn runs on PyTorch alone (backend 'eager'): the compiled extension is missing: no compiler"
    assert warning in run_python("import fastattn", tmp_path, "stderr")
    printed = run_python(code, tmp_path)
    assert "the compiled extension is missing: no compiler" in printed.splitlines()[0]
    assert "eager" in printed


@pytest.mark.parametrize("compiler", ["/bin/false", "/nonexistent/c++"])
def test_failing_compiler_leaves_a_package_that_says_so(tmp_path, compiler):
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    copy_package(tmp_path)
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    environment = {**os.environ, "CXX": compiler}
    subprocess.run(build, cwd=tmp_path, env=environment, capture_output=True, check=True, timeout=240)
    printed = run_python("import fastattn; print(fastattn.available_backends()['cpu'])", tmp_path)
    assert "the C++ compiler failed" in printed


@needs_extension
def test_unknown_instruction_set_is_refused():
    with pytest.raises(ValueError, match="unknown instruction set 'avx1024'"):
        _extension.extension.set_cpu_isa("avx1024")
