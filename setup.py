"""Builds fastattn._C with ninja: the torch-facing sources once, each ``*_cpu.cpp`` once per instruction set, and the
CUDA kernels (``*.cu``) by nvcc or, for the emulator of csrc/emulator, by the C++ compiler.

The kernels are torch-free, so the CPU builds share no inline torch code and cannot leak AVX-512 into each other.
nvcc is used where torch itself is built with CUDA and nvcc is found; where it is not, or fails, the kernels are
compiled for the emulator, and ``fastattn.available_backends()["cuda"]`` gives the reason. If the extension cannot be
built at all (no compiler, no torch), the package is installed without it and runs on PyTorch alone. This script leaves
the reasons in ``fastattn/_build_report.json``.

Environment variables, all optional:
  CXX                   the C++ compiler
  CUDA_HOME, CUDA_PATH  where the CUDA toolkit is, if its nvcc is not the one on PATH
  TORCH_CUDA_ARCH_LIST  what nvcc compiles for, as in "8.0;9.0a;8.0+PTX"; default: the GPUs of this machine, or without
                        one 8.0, 9.0a and PTX. 9.0 means 9.0a, whose instructions the kernels for Hopper use.
  FASTATTN_CUDA         "emulated" leaves nvcc alone, "nvcc" builds nothing without it, "auto" is the default
  MAX_JOBS              how many compilers run at a time, as in PyTorch's own builds; default: by the cores
"""

from __future__ import annotations

import json
import os
import platform
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import ClassVar

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

try:
    import fcntl
except ImportError:  # not on Windows, where nothing but the package without kernels is built
    fcntl = None

ROOT = Path(__file__).parent.resolve()
CSRC = ROOT / "csrc"
REPORT_NAME = "_build_report.json"
FALLBACK_TORCH = "torch==2.13.0"

WARNINGS = ["-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Wno-psabi"]
COMMON_FLAGS = ["-std=c++20", "-g1", "-fPIC", "-fvisibility=hidden", f"-I{CSRC}", *WARNINGS]
CPU_FLAGS = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]
# Chosen at run time by common/isa.cpp. No -ffast-math anywhere: it would reassociate exp's round-by-magic-constant.
AVX2_FLAGS = ["-mavx2", "-mfma", "-mf16c"]
AVX512_FLAGS = [*AVX2_FLAGS, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni"]
ISA_FLAGS = {
    "portable": [],
    "avx2": AVX2_FLAGS,
    "avx512": AVX512_FLAGS,
    "avx512_bf16": [*AVX512_FLAGS, "-mavx512bf16"],
}
# The kernels that multiply bfloat16 where the processor can; for the rest the avx512 build serves.
BF16_SOURCES = {"attention_fwd_cpu.cpp", "attention_bwd_cpu.cpp"}
# Kernels reinterpret 16-bit memory as 32-bit registers; products and sums are rounded one by one, as written.
EMULATED_FLAGS = ["-O2", "-fno-strict-aliasing", "-ffp-contract=off", "-DFASTATTN_EMULATED=1",
                  f"-fmacro-prefix-map={ROOT}/="]  # fmt: skip
NVCC_FLAGS = ["-std=c++20", "-O3", f"-I{CSRC}", "--expt-relaxed-constexpr", "-lineinfo", "-Xcompiler",
              "-fPIC,-fvisibility=hidden"]  # fmt: skip
DEFAULT_ARCHITECTURES = ["80", "90a", "80+PTX"]
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


def host_compiler() -> str:
    """As the shell reads it: CXX may hold arguments."""
    found = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    compiler = os.environ.get("CXX") or (found and shlex.quote(found))
    if compiler is None:
        raise BuildFailure(
            "no C++ compiler was found on PATH (looked for c++, g++, clang++); install one, or name it in CXX, then "
            "install fastattn again"
        )
    return compiler


@cache
def host_isas() -> list[str]:
    """The instruction sets to build for: those of the architecture whose flags the compiler knows."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return ["portable"]
    isas = [isa for isa, flags in ISA_FLAGS.items() if compiles_with(flags)]
    # A compiler that refuses even no flags has its say in the build itself.
    return isas or list(ISA_FLAGS)


def compiles_with(flags: list[str]) -> bool:
    command = [*shlex.split(host_compiler()), *flags, "-x", "c++", "-fsyntax-only", os.devnull]
    try:
        return subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        return False


def failed_commands(log: Path, most_lines: int = 200) -> str:
    """What ninja says of the commands that failed; GCC's warnings about its own headers can fill megabytes."""
    parts = re.findall(r"^FAILED:.*?(?=^\[\d+/\d+\]|\Z)", log.read_text(errors="replace"), re.M | re.S)
    return "\n".join("".join(parts).splitlines()[:most_lines])


def first_error(log: Path) -> str:
    """The line of a build's messages that says most about why it failed."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines()]
    return next((line for line in lines if re.search("error:|not found|No such file", line)), lines[-1])


# --- CUDA ------------------------------------------------------------------------------------------------------------


class NoCuda(Exception):
    """nvcc cannot compile the CUDA kernels for this torch; the message says why."""


@dataclass(frozen=True)
class Cuda:
    """A CUDA toolkit and what it is to compile for."""

    nvcc: str
    include_paths: list[str]
    library_paths: list[str]
    architectures: list[str]  # "80", "90a"; "80+PTX" is code that the driver compiles for newer GPUs


def find_nvcc() -> str | None:
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        home = os.environ.get(variable)
        if home:
            return shutil.which("nvcc", path=Path(home) / "bin")
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def find_cuda(torch) -> Cuda:
    wanted = os.environ.get("FASTATTN_CUDA", "auto")
    if wanted not in ("auto", "emulated", "nvcc"):
        raise BuildFailure(f"FASTATTN_CUDA must be 'auto', 'emulated' or 'nvcc', got {wanted!r}")
    if wanted == "emulated":
        raise NoCuda("FASTATTN_CUDA=emulated was set")
    if torch.version.cuda is None:
        raise NoCuda("this torch was built without CUDA")
    nvcc = find_nvcc()
    if nvcc is None:
        raise NoCuda("nvcc was not found (looked in CUDA_HOME, on PATH and in /usr/local/cuda)")
    return Cuda(nvcc, *nvcc_paths(nvcc, torch), cuda_architectures(torch))


def nvcc_paths(nvcc: str, torch) -> tuple[list[str], list[str]]:
    """Where CUDA's headers and libraries are, as nvcc itself says: toolkits differ in their layout."""
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release (\d+)\.", version)
    if release is None:
        raise NoCuda(f"{nvcc} --version failed")
    if release[1] != torch.version.cuda.split(".")[0]:
        raise NoCuda(f"{nvcc} is of CUDA {release[1]} but torch was built with CUDA {torch.version.cuda}")
    dry_run = [nvcc, "--dryrun", "-c", "-x", "cu", os.devnull, "-o", os.devnull]
    text = subprocess.run(dry_run, capture_output=True, text=True).stderr
    includes, libraries = (re.search(rf"{name}=(.*)", text) for name in ("#\\$ INCLUDES", "#\\$ LIBRARIES"))
    if includes is None or libraries is None:
        raise NoCuda(f"{nvcc} --dryrun does not say where CUDA's headers and libraries are")
    return re.findall(r'"-I(.*?)"', includes[1]), re.findall(r'"-L(.*?)"', libraries[1])


def architecture(text: str) -> str:
    """ "9.0" -> "90a": nvcc's name of a compute capability, for Hopper with the instructions that only it has."""
    match = re.fullmatch(r"(\d+)\.(\d)(a?)(\+PTX)?", text)
    if match is None:
        raise NoCuda(f"TORCH_CUDA_ARCH_LIST has {text!r}; expected numbers such as 8.0, 9.0a or 8.0+PTX")
    number, suffix = match[1] + match[2], match[4] or ""
    return number + ("a" if number == "90" else match[3]) + suffix


def cuda_architectures(torch) -> list[str]:
    listed = re.split(r"[\s;,]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip())
    if listed != [""]:
        return list(dict.fromkeys(map(architecture, listed)))
    if torch.cuda.is_available():
        devices = map(torch.cuda.get_device_capability, range(torch.cuda.device_count()))
        return [architecture(f"{major}.{minor}") for major, minor in sorted(set(devices))]
    print(
        "fastattn: no GPU is visible, so the CUDA kernels are compiled for all of "
        f"{', '.join(DEFAULT_ARCHITECTURES)}; TORCH_CUDA_ARCH_LIST names fewer, as in TORCH_CUDA_ARCH_LIST=9.0",
        file=sys.stderr,
    )
    return DEFAULT_ARCHITECTURES


def gencode_flags(source: Path, architectures: list[str]) -> list[str]:
    """Files named ``*_sm90*`` have instructions of sm_90a alone; other GPUs never reach them."""
    flags = []
    for each in ["90a"] if "_sm90" in source.name else architectures:
        number = each.removesuffix("+PTX")
        flags.append(f"-gencode=arch=compute_{number},code={'compute' if each != number else 'sm'}_{number}")
    return flags


# --- The ninja file --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Unit:
    """One compilation: ``rule`` is "cxx" or "nvcc", ``suffix`` tells the objects of one source apart."""

    source: Path
    suffix: str
    rule: str
    flags: list[str]


def torch_flags(torch) -> list[str]:
    try:
        import pybind11
    except ImportError:
        raise BuildFailure("pybind11 was not found; install it, then fastattn again") from None
    from torch.utils import cpp_extension

    includes = [*cpp_extension.include_paths(), sysconfig.get_path("include"), pybind11.get_include()]
    return [*(f"-isystem{path}" for path in includes), "-DTORCH_EXTENSION_NAME=_C",
            f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
            f'-DFASTATTN_TORCH_VERSION="{torch.__version__}"']  # fmt: skip


def units(torch, cuda: Cuda | None, sanitize: bool) -> Iterator[Unit]:
    """What is compiled, by the names of the sources: ``*_cpu*`` once per instruction set, ``*_cuda.cpp`` and
    ``*_emulated.cpp`` in the builds with and without nvcc."""
    sanitizer = SANITIZER_FLAGS if sanitize else []
    isas = host_isas()
    cpu = [*COMMON_FLAGS, *CPU_FLAGS, *(f"-DFASTATTN_BUILD_{isa.upper()}=1" for isa in isas)]
    emulated = [*COMMON_FLAGS, *EMULATED_FLAGS, *sanitizer]
    glue = [*cpu, *torch_flags(torch), *sanitizer]
    for source in sorted(CSRC.rglob("*.cpp")):
        if source.parent.name == "emulator":
            if cuda is None:
                # Visible: tests/compiled.py has what nvcc made of kernels in libraries of their own, which call it.
                yield Unit(source, ".emulated", "cxx", [*emulated, "-fvisibility=default"])
        elif source.stem.endswith("_cuda"):
            if cuda is not None:
                names = f'-DFASTATTN_CUDA_ARCHITECTURES="{" ".join(cuda.architectures)}"'
                yield Unit(source, "", "cxx", [*glue, *(f"-isystem{path}" for path in cuda.include_paths), names])
        elif source.stem.endswith("_emulated"):
            if cuda is None:
                yield Unit(source, "", "cxx", glue)
        elif source.stem.endswith("_cpu") or "_cpu_" in source.stem:
            for isa in isas if source.name in BF16_SOURCES else [isa for isa in isas if isa != "avx512_bf16"]:
                yield Unit(source, f".{isa}", "cxx", [*cpu, *sanitizer, *ISA_FLAGS[isa], f"-DFASTATTN_ISA=isa_{isa}"])
        else:
            yield Unit(source, "", "cxx", glue)
    for source in sorted(CSRC.rglob("*.cu")):
        if cuda is None:
            yield Unit(source, ".emulated", "cxx", [*emulated, "-x", "c++"])
        else:
            yield Unit(source, ".cuda", "nvcc", [*NVCC_FLAGS, *gencode_flags(source, cuda.architectures)])


def link_flags(cuda: Cuda | None, sanitize: bool) -> list[str]:
    from torch.utils import cpp_extension

    # No -fopenmp: what common/parallel.cpp calls is found in the OpenMP runtime that libtorch_cpu itself is linked to.
    flags = [*(f"-L{path}" for path in cpp_extension.library_paths()), "-lc10", "-ltorch", "-ltorch_cpu",
             "-ltorch_python", "-pthread", *(SANITIZER_FLAGS if sanitize else [])]  # fmt: skip
    if cuda is not None:
        # CUDA's static runtime is what every toolkit with an nvcc has, and shares torch's streams and contexts.
        flags += [*(f"-L{path}" for path in cuda.library_paths), "-lc10_cuda", "-lcudart_static", "-ldl", "-lrt"]
    return flags


def ninja_escape(text: object) -> str:
    return str(text).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def ninja_flags(flags: list[str]) -> str:
    """ninja hands them to a shell, and paths may hold spaces."""
    return shlex.join(flags).replace("$", "$$")


def write_ninja_file(build_dir: Path, output: Path, torch, cuda: Cuda | None, sanitize: bool) -> None:
    """Flags are attached per build line because they differ by source and instruction set."""
    lines = []
    for rule, compiler in (("cxx", host_compiler()), ("nvcc", cuda and shlex.quote(cuda.nvcc))):
        lines += [f"rule {rule}", f"  command = {compiler} -MMD -MF $out.d $flags -c $in -o $out",
                  "  depfile = $out.d", "  deps = gcc", "  description = compile $out"]  # fmt: skip
    lines += ["rule link", f"  command = {host_compiler()} -shared $in -o $out $flags", "  description = link $out"]
    objects = []
    for unit in units(torch, cuda, sanitize):
        target = build_dir / f"{unit.source.relative_to(CSRC).with_suffix('')}{unit.suffix}.o"
        objects.append(target)
        lines += [f"build {ninja_escape(target)}: {unit.rule} {ninja_escape(unit.source)}",
                  f"  flags = {ninja_flags(unit.flags)}"]  # fmt: skip
    lines += [f"build {ninja_escape(output)}: link {' '.join(map(ninja_escape, objects))}",
              f"  flags = {ninja_flags(link_flags(cuda, sanitize))}"]  # fmt: skip
    # Paths as they are, whatever the locale makes of them.
    (build_dir / "build.ninja").write_bytes(os.fsencode("\n".join(lines) + "\n"))


@contextmanager
def locked(build_dir: Path) -> Iterator[None]:
    """ninja itself does not notice another ninja at work in the same folder."""
    with (build_dir / "lock").open("w") as lock:
        if fcntl is not None:
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def ninja_jobs() -> list[str]:
    jobs = os.environ.get("MAX_JOBS", "")
    if jobs and not (jobs.isdecimal() and int(jobs) > 0):
        raise BuildFailure(f"MAX_JOBS must be a number of compilers to run at a time, got {jobs!r}")
    return ["-j", jobs] if jobs else []


# --- setuptools ------------------------------------------------------------------------------------------------------


class FreshPackage(build_py):
    """setuptools' build_py without the modules that an earlier build left behind and the package no longer has."""

    def run(self) -> None:
        if not self.editable_mode:
            shutil.rmtree(Path(self.build_lib) / "fastattn", ignore_errors=True)
        super().run()


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
            # Of the sources as they are now: what changes while they are compiled makes the result stale.
            stamp = runpy.run_path(str(ROOT / "fastattn" / "_interface.py"))["interface_stamp"](CSRC)
            report = {"built": True, "reason": None, "cuda": self.build(output), "interface": stamp}
            report["torch"] = find_torch().__version__
        except BuildFailure as failure:
            output.unlink(missing_ok=True)
            report = {"built": False, "reason": str(failure), "cuda": None}
            print(f"\nfastattn: building without kernels: {failure}\n", file=sys.stderr)
        output.with_name(REPORT_NAME).write_text(json.dumps(report) + "\n")

    def build(self, output: Path) -> str | None:
        """Builds with nvcc, else with the emulator; returns why not with nvcc."""
        if platform.system() != "Linux":
            raise BuildFailure(f"the kernels are built on Linux alone, and this is {platform.system()}")
        torch = find_torch()
        if torch is None:
            raise BuildFailure("torch was not installed when fastattn was built; install torch, then fastattn again")
        reason = None
        try:
            log = self.run_ninja(output, torch, find_cuda(torch))
            if log is not None:
                raise NoCuda(f"the build with nvcc failed ({first_error(log)}); its messages are in {log}")
        except NoCuda as failure:
            reason = str(failure)
            if os.environ.get("FASTATTN_CUDA") == "nvcc":
                raise BuildFailure(reason) from None
            log = self.run_ninja(output, torch, None)
            if log is not None:
                failure = f"the C++ compiler failed ({first_error(log)}); its messages are in {log}"
                raise BuildFailure(failure) from None
        return reason

    def run_ninja(self, output: Path, torch, cuda: Cuda | None) -> Path | None:
        """Returns the log if the build failed."""
        build_dir = ROOT / "build" / ("sanitize" if self.sanitize else "ninja") / f"torch-{torch.__version__}"
        build_dir.mkdir(parents=True, exist_ok=True)
        ninja = shutil.which("ninja") or shutil.which("ninja", path=sysconfig.get_path("scripts"))
        if ninja is None:
            raise BuildFailure("ninja was not found; install it, then fastattn again")
        jobs = ninja_jobs()
        log = build_dir / ("build.log" if cuda is None else "build_cuda.log")
        with locked(build_dir), log.open("w") as file:
            write_ninja_file(build_dir, output, torch, cuda, bool(self.sanitize))
            run = subprocess.run([ninja, "-C", str(build_dir), *jobs], stdout=file, stderr=subprocess.STDOUT)
        if run.returncode == 0:
            return None
        print(failed_commands(log), file=sys.stderr)
        return log

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
    license="BSD-3-Clause",
    ext_modules=[Extension("fastattn._C", sources=[], optional=False)],
    cmdclass={"build_ext": NinjaBuild, "build_py": FreshPackage},
    setup_requires=[] if find_torch() else [FALLBACK_TORCH],
    install_requires=[torch_requirement()],
)
