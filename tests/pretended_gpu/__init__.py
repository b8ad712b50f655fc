"""A pytest plugin, ``-p pretended_gpu``: this machine has a GPU of compute capability 9.0, as far as anyone can tell.

What runs on a GPU alone, tests above all, is code that has never run where there is none. Here it runs: "cuda" is a
device (device.cpp), backend ``cuda`` is there, and its kernels are emulated. Nothing is captured, timed or counted, and
nothing is compiled for the device. It needs a PyTorch without CUDA, and has to be imported before PyTorch.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

HERE = Path(__file__).parent
BUILD = HERE.parents[1] / "build" / "pretended_gpu"
PROPERTIES = SimpleNamespace(
    name="pretended", major=9, minor=0, multi_processor_count=16, L2_cache_size=50 << 20, total_memory=80 << 30,
    shared_memory_per_block_optin=227 << 10, warp_size=32, max_threads_per_multi_processor=2048,
    regs_per_multiprocessor=65536,
)  # fmt: skip


def build(torch_folder: Path) -> None:
    """Compiles both libraries, if they are older than their sources. Test processes must not do so at once."""
    compiler = shlex.split(os.environ.get("CXX") or shutil.which("c++") or "c++")
    includes = [f"-I{torch_folder / 'include' / part}" for part in ("", "torch/csrc/api/include")]
    BUILD.mkdir(parents=True, exist_ok=True)
    for source in (HERE / "accelerator.cpp", HERE / "device.cpp"):
        library = BUILD / f"lib{source.stem}.so"
        if library.exists() and library.stat().st_mtime > source.stat().st_mtime:
            continue
        flags = ["-std=c++20", "-O1", "-fPIC", "-shared", "-w", *includes, f"-L{torch_folder / 'lib'}"]
        linked = ["-ltorch_cpu", "-lc10"] if source.stem == "device" else []
        subprocess.run([*compiler, *flags, str(source), "-o", str(library), *linked], check=True)


def load() -> Any:
    """Torch, with the device."""
    assert "torch" not in sys.modules, "pretended_gpu has to be imported before torch"
    found = importlib.util.find_spec("torch")
    assert found is not None and found.origin is not None
    libtorch = Path(found.origin).parent / "lib" / "libtorch_cpu.so"
    # PyTorch asks once for what libdevice.so registers, as soon as it is imported.
    for library in (BUILD / "libaccelerator.so", libtorch, BUILD / "libdevice.so"):
        ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
    import torch

    return torch


class Stream:
    """Of which there is one, and everything on it has happened."""

    cuda_stream = 0

    def __init__(self, *arguments: object, **options: object) -> None: ...
    def wait_stream(self, other: object) -> None: ...
    def synchronize(self) -> None: ...
    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *exc_info: object) -> None: ...


@contextmanager
def nothing(*arguments: object, **options: object) -> Iterator[None]:
    yield


def replace_runtime(torch: Any) -> None:
    """Of torch.cuda what asks the driver."""

    class Graph:
        """Of the emulator (csrc/common/graph_emulated.cpp)."""

        def __init__(self) -> None:
            self.emulated = torch.classes.fastattn.EmulatedGraph()
            self.replay = self.emulated.replay

    @contextmanager
    def recording(graph: Graph, **options: object) -> Iterator[None]:
        graph.emulated.begin()
        try:
            yield
        finally:
            graph.emulated.end()

    def set_rng_state(state: Any, *device: object) -> None:
        torch.set_rng_state(state)

    for name, value in {
        "is_available": lambda: True, "is_initialized": lambda: True, "_lazy_init": lambda: None, "init": lambda: None,
        "device_count": lambda: 1, "current_device": lambda: 0, "synchronize": lambda *a: None,
        "get_device_properties": lambda *a: PROPERTIES, "get_device_capability": lambda *a: (9, 0),
        "get_device_name": lambda *a: PROPERTIES.name, "is_bf16_supported": lambda *a, **k: True,
        "memory_allocated": lambda *a: 0, "memory_stats": lambda *a: defaultdict(int), "empty_cache": lambda: None,
        "Stream": Stream, "stream": nothing, "current_stream": lambda *a: Stream(),
        "manual_seed": lambda seed: None, "manual_seed_all": lambda seed: None,
        "get_rng_state": lambda *a: torch.get_rng_state(), "set_rng_state": set_rng_state,
        "CUDAGraph": Graph, "graph": recording,
    }.items():  # fmt: skip
        setattr(torch.cuda, name, value)


def replace_backend() -> None:
    """The emulated build as one for a device: in what it says of itself, and what it refuses."""
    from fastattn import _extension

    extension: Any = _extension.extension
    extension.configure_emulator(
        compute_capability=90, multiprocessors=PROPERTIES.multi_processor_count, os_threads=1, checks_values=False,
        takes_gpu_tensors=True,
    )  # fmt: skip
    extension.emulated_launches = lambda: 0
    _extension.without_cuda_reason = None
    _extension.cuda_architectures = ("80", "90a", "80+PTX")


def pytest_sessionstart(session: object) -> None:
    """Kernels that tests build for the device are emulated, too."""
    import emulated

    def device(name: str, sources: Any) -> Any:
        library = emulated._emulated(name, sources)
        library.device = "cuda"
        return library

    emulated._device = device


os.environ.setdefault("TRITON_INTERPRET", "1")
if importlib.util.find_spec("pytest") is not None and "torch" not in sys.modules:
    replace_runtime(load())
    replace_backend()
