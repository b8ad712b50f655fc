"""Kernels as nvcc compiles them, run on the emulator: their PTX in place of what the C++ compiler makes of the same
source (tests/ptx_to_cpp.py). Needs nvcc and no GPU.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import subprocess
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any

from emulated import BUILD, HOST_FLAGS, PTX_TESTS, ROOT, emulated_library, exclusive, host_compiler
from ptx_to_cpp import entry_names, translate
from setup_script import setup_script

COMPILED = BUILD.parent / "compiled"
# Of the generated code: it is large, and run once or twice.
CODE_FLAGS = [*(flag for flag in HOST_FLAGS if flag[:2] not in ("-O", "-g", "-W")), "-O0", "-w", "-shared"]


class CompiledKernel(ctypes.Structure):
    """emu::CompiledKernel of csrc/emulator/launch.h."""

    _fields_ = (("body", ctypes.c_void_p), ("parameter_bytes", ctypes.c_size_t))


_ASKED = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.POINTER(CompiledKernel))
_running: dict[Path, list[Any]] = {}  # those that each library was given, outermost first


def _run(command: Sequence[object]) -> str:
    done = subprocess.run([str(each) for each in command], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


_setup = cache(setup_script)


@cache
def _sources_hash() -> str:
    """Of everything that PTX may come from, and what its translation calls: a change makes all of it again."""
    files = [
        *(ROOT / "csrc").rglob("*.cu*"),
        *(ROOT / "csrc").rglob("*.h"),
        *(ROOT / "tests" / "ptx_to_cpp").glob("*.py"),
    ]
    files = sorted(each for each in files if each.is_file()) + sorted((ROOT / "tests" / "ptx").glob("*.cu"))
    return hashlib.sha256(b"".join(each.read_bytes() for each in files)).hexdigest()[:12]


def ptx_of(source: Path) -> Path:
    """What nvcc makes of a source, for the oldest card that has its instructions."""
    setup = _setup()
    architecture = "90a" if "sm90" in source.name else "80"
    COMPILED.mkdir(parents=True, exist_ok=True)
    target = COMPILED / f"{source.stem}.sm_{architecture}.{_sources_hash()}.ptx"
    with exclusive(target.with_suffix(".lock")):
        if not target.exists():
            made = target.with_suffix(".part")
            _run([setup.find_nvcc(), *setup.NVCC_FLAGS, "-ptx", f"-arch=sm_{architecture}", source, "-o", made])
            made.rename(target)
    return target


def _readable(names: Sequence[str]) -> list[str]:
    """Demangled, and tensor maps as the emulator calls them."""
    done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    return [name.replace("CUtensorMap_st", "fastattn::emu::TensorMap") for name in done.stdout.splitlines()]


def _functions(library: Path) -> dict[str, int]:
    """Where a library has its functions, by mangled name."""
    return {name: int(at, 16) for at, name in re.findall(r"^([0-9a-f]+) [tTwW] (\S+)$", _run(["nm", library]), re.M)}


@cache
def _headers_hash() -> str:
    headers = sorted((ROOT / "csrc" / "emulator").glob("*.h"))
    return hashlib.sha256(b"".join(each.read_bytes() for each in headers)).hexdigest()


def library_of(code: str, ptx_name: str, emulator: Path) -> ctypes.CDLL:
    """What PTX was turned into, compiled for the emulator that the library ``emulator`` holds."""
    version = hashlib.sha256(f"{code}{emulator}{_headers_hash()}".encode()).hexdigest()[:16]
    COMPILED.mkdir(parents=True, exist_ok=True)
    library = COMPILED / f"{ptx_name.removesuffix('.ptx')}.{version}.so"
    with exclusive(library.with_suffix(".lock")):
        if not library.exists():
            source, made = library.with_suffix(".cpp"), library.with_suffix(".part")
            source.write_text(code)
            define = f'-DFASTATTN_COMPILED_FILE="{ptx_name}"'
            _run([host_compiler(), *CODE_FLAGS, define, source, emulator, "-o", made])
            made.rename(library)
    return ctypes.CDLL(str(library))


class NvccKernels:
    """Within ``with``, the emulator in ``library`` (of a test, or the extension) runs kernels of these sources as nvcc
    compiled them. A launch of any other kernel is an error.

    ``launched`` has the mangled names of those that ran. ``edit`` changes the PTX, to see which test notices.
    ``whole_files`` translates all kernels of a file at once, which is faster where they are small.
    """

    def __init__(self, library: Path, sources: Iterable[Path], *, whole_files: bool = False,
                 edit: Callable[[str], str] = str):  # fmt: skip
        self.library = library
        self.launched: set[str] = set()
        self._whole_files, self._edit = whole_files, edit
        self._loaded = ctypes.CDLL(str(library))
        functions = _functions(library)
        anchor = "fastattn_emulator_ask_for_compiled"
        base = ctypes.cast(getattr(self._loaded, anchor), ctypes.c_void_p).value - functions[anchor]
        readable = _readable(list(functions))
        self._names = {base + at: name for at, name in zip(functions.values(), readable, strict=True)}
        self._ptx: dict[str, tuple[Path, str]] = {}  # by readable name
        _setup(), _sources_hash()  # once, not in each thread
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for ptx in pool.map(ptx_of, sources):
                names = entry_names(ptx.read_text())
                self._ptx |= {each: (ptx, name) for each, name in zip(_readable(names), names, strict=True)}
        self._found: dict[str, CompiledKernel] = {}
        self._asked = _ASKED(self._compiled)
        self._error: bytes | None = None

    def _compiled(self, address: int, compiled: ctypes._Pointer[CompiledKernel]) -> int | None:
        """Called at each launch; returns the address of an error text."""
        try:
            compiled[0] = self._find(self._names[address])
            return None
        except Exception as error:
            self._error = f"{type(error).__name__}: {error}".encode()
            return ctypes.cast(self._error, ctypes.c_void_p).value

    def _find(self, readable: str) -> CompiledKernel:
        if readable not in self._ptx:
            raise LookupError(f"{readable} is in none of the sources that nvcc compiled")
        ptx, name = self._ptx[readable]
        if name not in self._found:
            self._found |= self._translate(ptx, [each for file, each in self._ptx.values() if file == ptx]
                                           if self._whole_files else [name])  # fmt: skip
        self.launched.add(name)
        return self._found[name]

    def _translate(self, ptx: Path, names: Sequence[str]) -> dict[str, CompiledKernel]:
        symbols = {name: f"compiled_{i}" for i, name in enumerate(names)}
        code, kernels = translate(self._edit(ptx.read_text()), symbols)
        loaded = library_of(code, ptx.name, self.library)
        bodies = {name: ctypes.cast(getattr(loaded, symbol), ctypes.c_void_p) for name, symbol in symbols.items()}
        return {name: CompiledKernel(body, kernels[name].parameter_bytes) for name, body in bodies.items()}

    def __enter__(self) -> NvccKernels:
        _running.setdefault(self.library, [None]).append(self._asked)
        self._loaded.fastattn_emulator_ask_for_compiled(self._asked)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        _running[self.library].pop()
        self._loaded.fastattn_emulator_ask_for_compiled(_running[self.library][-1])


@cache
def nvcc_kernels(*units: str) -> NvccKernels:
    """Those of the extension, from the sources of ``csrc`` whose names match one of ``units``."""
    from fastattn._extension import extension

    sources = {source for unit in units for source in (ROOT / "csrc").rglob(f"{unit}.cu")}
    return NvccKernels(Path(extension.__file__), sorted(sources))


@cache
def nvcc_test_kernels() -> NvccKernels:
    """Those of tests/ptx: a small one for each wrapper of an instruction."""
    return NvccKernels(emulated_library().path, sorted(PTX_TESTS.glob("ptx_*.cu")), whole_files=True)


def why_no_nvcc_kernels() -> str | None:
    """Why kernels of nvcc cannot be run here, or None."""
    if _setup().find_nvcc() is None:
        return "nvcc was not found"
    if host_compiler() is None:
        return "no C++ compiler on PATH"
    return None
