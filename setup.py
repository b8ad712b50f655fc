"""Builds fastattn._C: the torch-facing sources once, each ``*_cpu.cpp`` once per instruction set, with ninja.

The kernels are torch-free, so the three CPU builds share no inline torch code and cannot leak AVX-512 into each other.
If the extension cannot be built (no compiler, no torch), the package is installed without it and runs on PyTorch alone;
``fastattn.available_backends()`` then gives the reason, which this script leaves in ``fastattn/_build_report.json``.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import ClassVar

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
CSRC = ROOT / "csrc"
REPORT_NAME = "_build_report.json"
FALLBACK_TORCH = "torch==2.13.0"

COMMON_FLAGS = ["-std=c++20", "-O3", "-g1", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math",
                "-ffp-contract=fast", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Wno-psabi"]  # fmt: skip
# Chosen at run time by common/isa.cpp. No -ffast-math anywhere: it would reassociate exp's round-by-magic-constant.
ISA_FLAGS = {
    "portable": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni"],
}
# The stack is left to the compiler's own warnings, and pointers to ASan: checking each of the thousands of inlined
# vector temporaries makes a kernel file compile for minutes instead of seconds.
SANITIZER_FLAGS = ["-fsanitize=address,undefined", "-fno-sanitize=null,alignment,object-size,vptr", "-O1",
                   "--param=asan-stack=0", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"]  # fmt: skip


def find_torch():
    """Imports torch, looking past pip's build isolation: the extension has to match the torch it will run with."""
    try:
        import torch
    except ImportError:
        sys.path.append(sysconfig.get_path("purelib"))
        try:
            import torch
        except ImportError:
            return None
    return torch


class BuildFailure(Exception):
    """The extension cannot be built here; the message says why, in words for the user."""


def host_isas() -> list[str]:
    return list(ISA_FLAGS) if platform.machine().lower() in ("x86_64", "amd64") else ["portable"]


def ninja_escape(text: object) -> str:
    return str(text).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def write_ninja_file(build_dir: Path, output: Path, torch, sanitize: bool) -> None:
    """One rule, one line a source; flags are attached per build line because they differ by instruction set."""
    import pybind11
    from torch.utils import cpp_extension

    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise BuildFailure("no C++ compiler was found on PATH (looked for c++, g++, clang++; set CXX to name one)")

    isas = host_isas()
    python_includes = [sysconfig.get_path("include"), pybind11.get_include()]
    torch_flags = [f"-isystem{path}" for path in [*cpp_extension.include_paths(), *python_includes]]
    torch_flags += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}", "-DTORCH_EXTENSION_NAME=_C"]
    torch_flags += ["-fopenmp", f'-DFASTATTN_TORCH_VERSION=\\"{torch.__version__}\\"']
    common = [*COMMON_FLAGS, f"-I{CSRC}", *(f"-DFASTATTN_BUILD_{isa.upper()}=1" for isa in isas)]
    common += SANITIZER_FLAGS if sanitize else []

    lines = [f"cxx = {compiler}", "rule compile", "  command = $cxx -MMD -MF $out.d $flags -c $in -o $out",
             "  depfile = $out.d", "  deps = gcc", "  description = compile $out", "rule link",
             "  command = $cxx -shared $in -o $out $flags", "  description = link $out", ""]  # fmt: skip
    objects = []

    def compile_line(source: Path, suffix: str, flags: list[str]) -> None:
        target = build_dir / f"{source.relative_to(CSRC).with_suffix('')}{suffix}.o"
        objects.append(target)
        lines.append(f"build {ninja_escape(target)}: compile {ninja_escape(source)}")
        lines.append(f"  flags = {' '.join([*common, *flags]).replace('$', '$$')}")

    for source in sorted(CSRC.rglob("*.cpp")):
        if "emulator" in source.parts:
            continue
        if source.stem.endswith("_cpu") or "_cpu_" in source.stem:
            for isa in isas:
                compile_line(source, f".{isa}", [*ISA_FLAGS[isa], f"-DFASTATTN_ISA=isa_{isa}"])
        else:
            compile_line(source, "", torch_flags)

    # torch's own libgomp is loaded by the time _C is: same soname, so the process has one OpenMP runtime.
    link_flags = [*(f"-L{path}" for path in cpp_extension.library_paths()), "-lc10", "-ltorch", "-ltorch_cpu",
                  "-ltorch_python", "-fopenmp"]  # fmt: skip
    link_flags += SANITIZER_FLAGS if sanitize else []
    lines.append(f"build {ninja_escape(output)}: link {' '.join(ninja_escape(o) for o in objects)}")
    lines.append(f"  flags = {' '.join(link_flags)}")
    build_dir.mkdir(parents=True, exist_ok=True)
    (build_dir / "build.ninja").write_text("\n".join(lines) + "\n")


class NinjaBuild(build_ext):
    """setuptools' build_ext with ninja underneath; ``--sanitize`` adds AddressSanitizer and UBSan."""

    user_options: ClassVar = [*build_ext.user_options, ("sanitize", None, "instrument with ASan and UBSan")]
    boolean_options: ClassVar = [*build_ext.boolean_options, "sanitize"]

    def initialize_options(self) -> None:
        super().initialize_options()
        self.sanitize = False

    def build_extension(self, ext: Extension) -> None:
        output = self.output = Path(self.get_ext_fullpath(ext.name)).resolve()
        output.parent.mkdir(parents=True, exist_ok=True)
        try:
            self.run_ninja(output)
            report = {"built": True, "reason": None}
        except BuildFailure as failure:
            output.unlink(missing_ok=True)
            report = {"built": False, "reason": str(failure)}
            print(f"\nfastattn: building without kernels: {failure}\n", file=sys.stderr)
        output.with_name(REPORT_NAME).write_text(json.dumps(report) + "\n")

    def run_ninja(self, output: Path) -> None:
        torch = find_torch()
        if torch is None:
            raise BuildFailure("torch was not installed when fastattn was built; install torch, then fastattn again")
        build_dir = ROOT / "build" / ("sanitize" if self.sanitize else "ninja") / f"torch-{torch.__version__}"
        write_ninja_file(build_dir, output, torch, bool(self.sanitize))
        ninja = shutil.which("ninja") or str(Path(sysconfig.get_path("scripts")) / "ninja")
        log = build_dir / "build.log"
        with log.open("w") as file:
            run = subprocess.run([ninja, "-C", str(build_dir)], stdout=file, stderr=subprocess.STDOUT)
        if run.returncode != 0:
            print(log.read_text(), file=sys.stderr)
            raise BuildFailure(f"the C++ compiler failed; its messages are in {log.relative_to(ROOT)}")

    def get_outputs(self) -> list[str]:
        return [path for path in super().get_outputs() if Path(path).exists()]

    def copy_extensions_to_source(self) -> None:
        """In-place and editable builds: the package in the source tree gets what build_extension left in build_lib."""
        target = ROOT / "fastattn" / self.output.name
        target.unlink(missing_ok=True)
        if self.output.exists():
            shutil.copy2(self.output, target)
        shutil.copy2(self.output.with_name(REPORT_NAME), target.with_name(REPORT_NAME))


def torch_requirement() -> str:
    """C++ extensions bind to one minor version of torch, so the wheel asks for the one it was built with."""
    torch = find_torch()
    if torch is None:
        return FALLBACK_TORCH
    major, minor = torch.__version__.split(".")[:2]
    return f"torch=={major}.{minor}.*"


setup(
    ext_modules=[Extension("fastattn._C", sources=[], optional=False)],
    cmdclass={"build_ext": NinjaBuild},
    setup_requires=[] if find_torch() else [FALLBACK_TORCH],
    install_requires=[torch_requirement()],
)
