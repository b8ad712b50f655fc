"""Triton's kernels as its compiler makes them, run on the emulator: their PTX on CPU tensors (tests/ptx_to_cpp).

``FASTATTN_TEST_TRITON=80 pytest ...`` (or 90) has backend "triton" run this way (tests/conftest.py). Needs no GPU, but
a process of its own, in which Triton does not interpret kernels.
"""

from __future__ import annotations

import ctypes
import inspect
import re
import struct
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any

import torch
from compiled import CompiledKernel, library_of
from emulated import KernelError, Mode, emulator_alone
from ptx_to_cpp import entry_names, translate
from ptx_to_cpp.parser import Kernel
from triton_aot import SHARED_MEMORY, capability_of, specialized

from fastattn import _triton
from fastattn.ops import attention_triton_tiles, triton_launch
from fastattn.ops.triton_launch import Device, Launch

MULTIPROCESSORS = 2  # small inputs, too, give each more than one tile
# Pointers at the end of the parameters, to memory that no kernel here asks for.
SCRATCH_POINTERS = 2
_FORMATS = {"i32": "i", "i64": "q", "fp32": "f"}  # else a pointer
# Where wgmma reads what cp.async has copied, which counts as ordinary stores, PTX asks for a fence between. Triton has
# it from 3.7.1 on (its pull request 10537); before, the emulator would refuse nearly everything for that alone.
_LEAVES_OUT_FENCES = tuple(map(int, version("triton").split(".")[:3])) < (3, 7, 1)


class CompiledTriton:
    """Runs launches of Triton's kernels as compiled for a GPU ("80", "90"), in a mode of the emulator.

    ``edit`` changes the PTX, to see which test notices.
    """

    installed: CompiledTriton | None = None

    def __init__(self, gpu: str, mode: Mode):
        self.gpu, self.mode = gpu, mode
        self.edit: Callable[[str], str] = str
        self._library = emulator_alone()
        self._run = ctypes.CDLL(str(self._library.path)).fastattn_emulator_run_compiled
        self._run.restype = ctypes.c_char_p
        self._kernels: dict[str, tuple[ctypes.c_void_p, Kernel]] = {}

    def install(self) -> None:
        """From now on CPU tensors are on such a GPU for backend "triton"."""
        from triton.runtime.jit import JITFunction

        capability = capability_of(self.gpu)
        _triton._INTERPRETED = True  # so that it takes CPU tensors, by name alone
        attention_triton_tiles.is_interpreted = lambda: False  # the tiles are those of the GPU
        triton_launch._INTERPRETER = Device(MULTIPROCESSORS, capability, SHARED_MEMORY[capability])
        triton_launch._mend_interpreter = lambda: None

        def run(kernel: Any, *arguments: Any, grid: tuple[int, ...], warmup: bool, **named: Any) -> None:
            parameters = {parameter.name for parameter in kernel.params}
            options = {name: value for name, value in named.items() if name not in parameters}
            named = {name: value for name, value in named.items() if name in parameters}
            bound = inspect.signature(kernel.fn).bind(*arguments, **named)
            bound.apply_defaults()
            self.launch(Launch(kernel, grid, bound.arguments, options))

        JITFunction.run = run
        CompiledTriton.installed = self

    def launch(self, launch: Launch) -> None:
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        if 0 in launch.grid:
            return  # as Triton's launcher does
        signature, constants, attributes = specialized(launch)
        source = ASTSource(launch.kernel, signature, constants, attributes)
        made = triton.compile(source, target=GPUTarget("cuda", int(self.gpu), 32), options=dict(launch.options))
        about = made.metadata
        assert (about.num_ctas, about.global_scratch_size, about.profile_scratch_size) == (1, 0, 0)
        ptx = self.edit(made.asm["ptx"])
        if _LEAVES_OUT_FENCES and self.gpu == "90":
            ptx = re.sub(r"cp\.async\.wait_group\s+\d+;", r"\g<0> fence.proxy.async.shared::cta;", ptx)
        body, kernel = self._translated(ptx)
        arguments = [(kind, launch.arguments[name]) for name, kind in signature.items() if kind != "constexpr"]
        parameters = _parameters(kernel, arguments)
        self._library.configure(self.mode)
        grid = (ctypes.c_uint * 3)(*[*launch.grid, 1, 1][:3])
        compiled = CompiledKernel(body, kernel.parameter_bytes)
        threads, shared = ctypes.c_uint(32 * about.num_warps), ctypes.c_uint64(about.shared)
        error = self._run(ctypes.byref(compiled), parameters, grid, threads, shared)
        if error is not None:
            raise KernelError(f"{about.name}: {error.decode()}")

    def _translated(self, ptx: str) -> tuple[ctypes.c_void_p, Kernel]:
        if ptx not in self._kernels:
            (name,) = entry_names(ptx)
            code, kernels = translate(ptx, {name: "compiled"})
            loaded = library_of(code, f"{name}.ptx", self._library.path)
            self._kernels[ptx] = ctypes.cast(loaded.compiled, ctypes.c_void_p), kernels[name]
        return self._kernels[ptx]


def _parameters(kernel: Kernel, arguments: Sequence[tuple[str, Any]]) -> bytes:
    """Arguments, (type in Triton's signature, value), as PTX lays them out."""
    assert len(kernel.parameters) == len(arguments) + SCRATCH_POINTERS
    packed = bytearray(kernel.parameter_bytes)
    for at, (kind, value) in zip(kernel.parameters.values(), arguments, strict=False):
        number = value.data_ptr() if isinstance(value, torch.Tensor) else value
        struct.pack_into(_FORMATS.get(kind, "Q"), packed, at, number)
    return bytes(packed)
