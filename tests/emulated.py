"""Compiles CUDA sources for the emulator (csrc/emulator), with nvcc where there is a device, and calls them by ctypes.

A kernel library is the C face of some ``.cu`` files: functions that take pointers and numbers, a stream last, and
return NULL or an error text. The emulated and the device build of a file have the same face.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from enum import IntEnum
from functools import cache
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent.resolve()
BUILD = ROOT / "build" / "emulated"
PTX_TESTS = ROOT / "tests" / "ptx"
KERNEL_FACES = ROOT / "tests" / "kernels"

# Kernels reinterpret 16-bit memory as 32-bit registers; products and sums are rounded one by one, as written.
HOST_FLAGS = ["-std=c++20", "-O2", "-g1", "-fPIC", "-fno-strict-aliasing", "-ffp-contract=off", "-Wall", "-Wextra",
              "-Wno-unknown-pragmas", "-Wno-psabi", "-DFASTATTN_EMULATED=1", f"-I{ROOT / 'csrc'}",
              f"-fmacro-prefix-map={ROOT}/="]  # fmt: skip
NVCC_FLAGS = ["-std=c++20", "-O3", f"-I{ROOT / 'csrc'}", "-Xcompiler", "-fPIC", "--expt-relaxed-constexpr"]


# (flags of the runtime, flags of the kernels, link flags), chosen by tests/run_sanitized_emulator.sh. ThreadSanitizer
# instruments the kernels only; the runtime tells it what the kernels' instructions do (csrc/emulator/sanitizers.h).
_ADDRESS = ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"]
_SANITIZERS = {
    "none": ([], [], []),
    "address": (_ADDRESS, _ADDRESS, _ADDRESS),
    "thread": (["-DFASTATTN_EMULATOR_TSAN=1"], ["-O1", "-fsanitize=thread"], ["-fsanitize=thread"]),
}


class Schedule(IntEnum):
    IN_ORDER = 0
    UNIFORM = 1
    PRIORITY = 2


class AsyncMode(IntEnum):
    EAGER = 0
    LAZY = 1
    RANDOM = 2


@dataclass(frozen=True)
class Mode:
    """How the emulator runs the next launches; see csrc/emulator/config.h."""

    schedule: Schedule = Schedule.IN_ORDER
    async_mode: AsyncMode = AsyncMode.EAGER
    seed: int = 0
    os_threads: int = 1
    rough_approximations: bool = False

    def apply(self, **device: int) -> None:
        """Configures the extension's emulator, which tells launchers of ``device``: its ``compute_capability`` and its
        number of ``multiprocessors``. Unless it ``checks_values``, ops do not look at those of lengths and tables."""
        from fastattn._extension import extension  # the rest of this file does without the package

        extension.configure_emulator(**asdict(self), **device)

    def __str__(self) -> str:
        rough = "-rough" * self.rough_approximations
        return f"{self.schedule.name.lower()}-{self.async_mode.name.lower()}-{self.seed}{rough}"


# What a kernel test runs: the plain run first, since its errors are the easiest to read, then the adversarial ones.
MODES = (
    Mode(),
    Mode(Schedule.PRIORITY, AsyncMode.LAZY, seed=1),
    Mode(Schedule.PRIORITY, AsyncMode.LAZY, seed=2),
    Mode(Schedule.UNIFORM, AsyncMode.RANDOM, seed=3),
)


def hopper(mode: Mode = MODES[0], multiprocessors: int = 1) -> None:
    """A card for Hopper's forward. Few multiprocessors: blocks take several row tiles, and no keys are split, which the
    kernel leaves to others."""
    mode.apply(compute_capability=90, multiprocessors=multiprocessors)


class KernelError(RuntimeError):
    """A launch failed, or the emulator found the kernel at fault."""


class KernelLibrary:
    """Calls the functions of a shared library with tensors and numbers."""

    def __init__(self, path: Path, device: str):
        self.device = device
        self._library = ctypes.CDLL(str(path))

    def call(self, name: str, *arguments: object) -> None:
        """Calls ``name(*arguments, stream)``; raises KernelError with the text it returns."""
        function = getattr(self._library, name)
        function.restype = ctypes.c_char_p
        stream = torch.cuda.current_stream().cuda_stream if self.device == "cuda" else None
        with self._declared([a for a in arguments if isinstance(a, torch.Tensor)]):
            error = function(*[_c_argument(a) for a in arguments], ctypes.c_void_p(stream))
        if self.device == "cuda":
            torch.cuda.synchronize()
        if error is not None:
            raise KernelError(error.decode())

    @contextmanager
    def _declared(self, tensors: Sequence[torch.Tensor]):
        yield


class EmulatedLibrary(KernelLibrary):
    """A library with the emulator in it. Asynchronous copies may only touch the tensors of the call."""

    def __init__(self, path: Path):
        super().__init__(path, "cpu")
        self.path = path
        self._library.fastattn_emulator_switches.restype = ctypes.c_uint64

    def configure(self, mode: Mode) -> None:
        self._library.fastattn_emulator_configure(
            int(mode.schedule),
            int(mode.async_mode),
            ctypes.c_uint64(mode.seed),
            mode.os_threads,
            int(mode.rough_approximations),
        )

    @property
    def switches(self) -> int:
        """How often the last launch changed from one emulated thread to another."""
        return self._library.fastattn_emulator_switches()

    @contextmanager
    def _declared(self, tensors: Sequence[torch.Tensor]):
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._library.fastattn_emulator_declare_global(
                ctypes.c_void_p(storage.data_ptr()), ctypes.c_uint64(storage.nbytes())
            )
        yield
        self._library.fastattn_emulator_forget_globals()


def _c_argument(value: object):
    if isinstance(value, torch.Tensor):
        return ctypes.c_void_p(value.data_ptr())
    if isinstance(value, float):
        return ctypes.c_float(value)
    if isinstance(value, ctypes.Structure):
        return ctypes.byref(value)
    return ctypes.c_int(value)


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Keeps other test processes out of what is made under the file ``path``."""
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def ninja(directory: Path, text: str) -> None:
    """Runs ninja in ``directory``; several test processes may ask for the same build at once."""
    directory.mkdir(parents=True, exist_ok=True)
    with exclusive(directory / "lock"):
        file = directory / "build.ninja"
        if not file.exists() or file.read_text() != text:
            file.write_text(text)
        ninja = shutil.which("ninja") or str(Path(sysconfig.get_path("scripts")) / "ninja")
        environment = {
            name: value for name, value in os.environ.items() if name != "LD_PRELOAD"
        }  # a sanitizer's runtime
        run = subprocess.run([ninja, "-C", str(directory)], capture_output=True, text=True, env=environment)
        if run.returncode != 0:
            raise RuntimeError(f"building {directory.relative_to(ROOT)} failed:\n{run.stdout}{run.stderr}")


def _ninja_text(
    compiler: str, units: Sequence[tuple[Path, Sequence[str]]], link_flags: Sequence[str], output: str
) -> str:
    """A ninja file that compiles each (source, flags) and links them into a shared library."""
    lines = [
        "rule compile",
        f"  command = {compiler} $flags -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {compiler} -shared $in -o $out {' '.join(link_flags)}",
    ]
    objects = []
    for source, flags in units:
        objects.append(f"{source.parent.name}_{source.name}.o")
        lines += [f"build {objects[-1]}: compile {source}", f"  flags = {' '.join(flags)}"]
    lines.append(f"build {output}: link {' '.join(objects)}")
    return "\n".join(lines) + "\n"


def host_compiler() -> str | None:
    return os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")


def _emulated(name: str, kernels: Sequence[Path]) -> EmulatedLibrary:
    """The emulator and these kernels, built by the C++ compiler."""
    compiler = host_compiler()
    if compiler is None:
        raise RuntimeError("no C++ compiler on PATH")
    variant = os.environ.get("FASTATTN_TEST_SANITIZER", "none")
    runtime_flags, kernel_flags, link_flags = _SANITIZERS[variant]
    runtime = sorted((ROOT / "csrc" / "emulator").glob("*.cpp"))
    units = [(source, [*HOST_FLAGS, *runtime_flags]) for source in runtime]
    units += [(source, [*HOST_FLAGS, *kernel_flags, "-x", "c++"]) for source in kernels]
    directory = BUILD / f"{name}-{variant}"
    library = f"lib{name}_emulated.so"
    ninja(directory, _ninja_text(compiler, units, ["-pthread", *link_flags], library))
    return EmulatedLibrary(directory / library)


@cache
def emulator_alone() -> EmulatedLibrary:
    """For kernels that come from elsewhere."""
    return _emulated("emulator", [])


@cache
def emulated_library() -> EmulatedLibrary:
    """The emulator with every kernel of tests/ptx, and what asks for the orders of attention's tiles and for tiles."""
    faces = [*sorted(KERNEL_FACES.glob("attention_*order.cu")), KERNEL_FACES / "attention_tiles.cu"]
    return _emulated("ptx", [*sorted(PTX_TESTS.glob("*.cu")), *faces])


def _device(name: str, sources: Sequence[Path]) -> KernelLibrary:
    """These kernels, built by nvcc for the device at hand; those of Hopper alone compile for no other."""
    major, minor = torch.cuda.get_device_capability()
    at_hand = "90a" if (major, minor) == (9, 0) else f"{major}{minor}"

    def unit(source: Path) -> tuple[Path, list[str]]:
        architecture = "90a" if "_sm90" in source.name else at_hand
        return source, [*NVCC_FLAGS, "-gencode", f"arch=compute_{architecture},code=sm_{architecture}"]

    library = f"lib{name}.so"
    directory = BUILD / f"device_{name}"
    ninja(directory, _ninja_text("nvcc", [unit(source) for source in sources], [], library))
    return KernelLibrary(directory / library, "cuda")


@cache
def device_library(source: Path) -> KernelLibrary:
    """One ``.cu`` file for the device at hand."""
    return _device(source.stem, [source])


def _kernel_sources(op: str, units: Sequence[str] = ("*",)) -> list[Path]:
    kernels = {source for unit in units for source in (ROOT / "csrc" / op).glob(f"{unit}.cu")}
    return [KERNEL_FACES / f"{op}.cu", *sorted(kernels)]


@cache
def emulated_kernels(op: str, units: tuple[str, ...] = ("*",)) -> EmulatedLibrary:
    """The emulator with the CUDA kernels of csrc/<op>, or of those of its files that match ``units``, and their C face
    tests/kernels/<op>.cu."""
    return _emulated(op, _kernel_sources(op, units))


@cache
def device_kernels(op: str) -> KernelLibrary:
    """The CUDA kernels of csrc/<op> and their C face for the device at hand."""
    return _device(op, _kernel_sources(op))


def main() -> None:
    """Builds what tests on the device at hand, or in a rehearsal on the emulator, would build as they run."""
    emulated_library()
    if torch.cuda.is_available() and shutil.which("nvcc") is not None:
        hopper = torch.cuda.get_device_capability() == (9, 0)
        for source in ("ptx_sm80.cu", *(("ptx_sm90.cu", "ptx_cluster_sm90.cu") if hopper else ())):
            device_library(PTX_TESTS / source)
        device_kernels("int8_matmul")
    else:
        emulated_kernels("int8_matmul")


if __name__ == "__main__":
    main()
