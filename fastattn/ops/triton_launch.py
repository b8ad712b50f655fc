"""What the launchers of Triton kernels share: the device's properties, operands as rows, the launch itself."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

# What stands for the compute capability of AMD's GPUs, whose own numbers would be taken for NVIDIA's.
AMD = (0, 1)


class Device(NamedTuple):
    """What launch configurations depend on."""

    multiprocessors: int
    capability: tuple[int, int]
    shared_bytes: int  # that one program may use


# Triton's interpreter: few programs, so that small inputs, too, give each more than one tile.
_INTERPRETER = Device(2, (8, 0), 163 * 1024)


@cache
def _gpu(index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    shared_bytes = getattr(properties, "shared_memory_per_block_optin", 64 * 1024)
    capability = AMD if torch.version.hip is not None else (properties.major, properties.minor)
    return Device(properties.multi_processor_count, capability, shared_bytes)


def device_of(tensor: Tensor) -> Device:
    return _INTERPRETER if tensor.device.type == "cpu" else _gpu(tensor.device.index or 0)


@cache
def _mend_interpreter() -> None:
    """Makes Triton's interpreter do with bfloat16 what a GPU does.

    It holds bfloat16 as bits in uint16. By itself it truncates float32 where a GPU rounds to the nearest, ties to even,
    and tl.dot multiplies the bits as integers.
    """
    from triton import language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cast_otherwise, dot_otherwise = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot

    def cast_impl(self: Any, source: Any, dtype: Any) -> Any:
        if source.dtype.scalar != tl.float32 or dtype.scalar != tl.bfloat16:
            return cast_otherwise(self, source, dtype)
        bits = torch.from_numpy(source.data.copy()).bfloat16().view(torch.int16).numpy().view("uint16")
        return TensorHandle(bits, dtype.scalar)

    def widen(operand: Any) -> Any:
        if operand.dtype.scalar != tl.bfloat16:
            return operand
        return TensorHandle((operand.data.astype("uint32") << 16).view("float32"), tl.float32)

    def create_dot(self: Any, a: Any, b: Any, *others: Any) -> Any:
        return dot_otherwise(self, widen(a), widen(b), *others)

    InterpreterBuilder.cast_impl = cast_impl
    InterpreterBuilder.create_dot = create_dot


def launch(on: Tensor, kernel: Any, grid: Any, *arguments: Any, **options: Any) -> None:
    """Runs ``kernel`` on the device and current stream of ``on``; neither waits nor allocates."""
    if on.device.type == "cpu":
        _mend_interpreter()
        kernel[grid](*arguments, **options)
        return
    if torch.version.hip is not None:
        options.pop("maxnreg", None)  # an option of NVIDIA's compiler, which AMD's refuses
    # Triton launches on the current device, whatever device the tensors are on.
    with torch.cuda.device(on.device):
        kernel[grid](*arguments, **options)


@dataclass(frozen=True)
class Launch:
    """A launch that is planned but not run, so that tests can compile it for a GPU that is not there."""

    kernel: Any  # what @triton.jit made
    grid: tuple[int, ...]
    arguments: dict[str, Any]  # by the kernel's parameter names, constexprs included
    options: dict[str, Any]  # num_warps, num_stages, ...

    def run(self, on: Tensor) -> None:
        launch(on, self.kernel, self.grid, **self.arguments, **self.options)


def has_descriptor(operand: Tensor) -> bool:
    """Whether TMA can read ``operand``: the hardware wants rows and starts at multiples of 16 bytes. 16-bit dtypes."""
    *outer, last = operand.stride()
    aligned = operand.is_meta or operand.data_ptr() % 16 == 0
    rows = all(stride > 0 and stride % 8 == 0 for stride in outer)
    return operand.numel() > 0 and operand.itemsize == 2 and last == 1 and aligned and rows


def descriptor(operand: Tensor, tile: tuple[int, ...]) -> Any:
    """Of an operand that has one: what a kernel loads tiles by, with zeros past the ends."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(operand, list(operand.shape), list(operand.stride()), list(tile))


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def neighbours(tensor: Tensor) -> Tensor:
    """``tensor`` with the elements of its last dim next to each other, as kernels read them."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] <= 1 else tensor.contiguous()


def as_rows(tensor: Tensor, rows: int, cols: int) -> tuple[Tensor, int]:
    """``tensor`` as (rows, cols) with neighbouring columns, and its stride in rows; copied only where it has to be."""
    if tensor.is_contiguous():
        return tensor, cols
    matrix = tensor.reshape(rows, cols)
    if cols > 1 and matrix.stride(1) != 1:
        matrix = matrix.contiguous()
    return matrix, matrix.stride(0)
