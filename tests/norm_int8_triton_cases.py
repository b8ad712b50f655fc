"""The launches of the norms' and INT8 kernels of Triton, in every default configuration, for tests/triton_aot.py."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch

from fastattn.ops import int8_matmul_triton_launch as int8
from fastattn.ops import layer_norm_triton_launch as norms
from fastattn.ops.triton_launch import AMD, Device, Launch

# Multiprocessors and shared memory of an A100, an RTX 4090, an H100, a B200, an MI300X.
DEVICES = {
    (8, 0): Device(108, (8, 0), 163 << 10),
    (8, 9): Device(128, (8, 9), 99 << 10),
    (9, 0): Device(132, (9, 0), 227 << 10),
    (10, 0): Device(148, (10, 0), 227 << 10),
    AMD: Device(304, AMD, 64 << 10),
}
COMPILER_OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")
# A tile of several rows, one row of 4, 8 and 16 warps, the longest rows of each kernel, a long row.
COLS = (64, 768, 2048, 4096, norms.BWD_MAX_COLS, norms.FWD_MAX_COLS, 100_000)
ROWS = 16384
TUNED = ("row_fwd_kernel", "row_bwd_kernel", "int8_matmul_kernel", "int8_linear_kernel")


def recorded(module: Any, capability: tuple[int, int], call: Callable[[], object]) -> list[Launch]:
    """What ``call`` would launch on a GPU of this capability; its tensors are on the meta device."""
    launches = []

    def record(on: torch.Tensor, kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        # Triton's own default: as many stages as its options say.
        compiler = {"num_stages": 3} | {name: options.pop(name) for name in COMPILER_OPTIONS if name in options}
        names = [parameter.name for parameter in kernel.params]
        launches.append(Launch(kernel, grid, dict(zip(names, arguments, strict=False)) | options, compiler))

    before = module.launch, module.device_of
    module.launch, module.device_of = record, lambda tensor: DEVICES[capability]
    try:
        call()
    finally:
        module.launch, module.device_of = before
    return launches


def tuned(module: Any, chooser: str, tiles: Iterable[Any], plan: Callable[[], list[Launch]]) -> Iterator[Launch]:
    """What ``plan`` gives in each of ``tiles``, which take the place of what the function ``chooser`` chooses."""
    before = getattr(module, chooser)
    for tile in tiles:
        setattr(module, chooser, lambda *_, tile=tile: tile)
        try:
            launches = plan()
        finally:
            setattr(module, chooser, before)
        yield from (launch for launch in launches if launch.kernel.__name__ in TUNED)


def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def norm_launches(
    capability: tuple[int, int], dtype: torch.dtype, cols: int, add: bool, rms: bool, rows: int = ROWS
) -> list[Launch]:
    """Forward and backward; ``add``: with everything that takes registers, a wider residual and dropout."""
    wide, row = torch.float32, empty(cols, dtype=dtype)
    x, statistics = empty(rows, cols, dtype=wide if add else dtype), empty(rows, dtype=torch.float32)
    drop = norms.dropout(empty(2, dtype=torch.int64), 0.1) if add else norms.dropout(None, 0.0)
    bias = None if rms else row

    def call() -> None:
        norms.forward(empty(rows, cols, dtype=dtype), x if add else None, row, bias, drop, 1, 1e-5, rms)
        norms.backward(
            empty(rows, cols, dtype=dtype), x if add else None, x, statistics, statistics, row, drop, 1, rms,
            True, not rms, dtype, need_dinput=add,
        )  # fmt: skip

    return recorded(norms, capability, call)


def int8_launches(capability: tuple[int, int], dtype: torch.dtype, rows: int, columns: int) -> list[Launch]:
    depth = 4096
    scale, bias = empty(columns, dtype=torch.float32), empty(columns, dtype=dtype)
    weight = empty(columns, depth, dtype=torch.int8)
    return recorded(int8, capability, lambda: int8.linear(empty(rows, depth, dtype=dtype), weight, scale, bias, "gelu"))


def aot_cases(capability: tuple[int, int], quick: bool) -> Iterator[tuple[str, Launch]]:
    """Each kernel in each configuration once."""
    return _once(_groups(capability, quick))


def aot_candidates(capability: tuple[int, int]) -> Iterator[tuple[str, Launch]]:
    return _once(_candidate_groups(capability))


def _once(groups: Iterable[tuple[str, Iterable[Launch]]]) -> Iterator[tuple[str, Launch]]:
    seen = set()
    for label, launches in groups:
        for launch in launches:
            blocks = {key: value for key, value in launch.arguments.items() if key.startswith("BLOCK")}
            name = launch.kernel.__name__.removesuffix("_kernel")
            stages, warps = launch.options["num_stages"], launch.options["num_warps"]
            name = f"{name} {label} {'x'.join(map(str, blocks.values()))} s{stages} w{warps}"
            if name not in seen:
                seen.add(name)
                yield name, launch


def _groups(capability: tuple[int, int], quick: bool) -> Iterator[tuple[str, list[Launch]]]:
    for dtype in (torch.bfloat16,) if quick else (torch.float16, torch.bfloat16, torch.float32):
        dtype_name = str(dtype).removeprefix("torch.")
        for cols in (768, 8192, 100_000) if quick else COLS:
            for add, rms in ((True, False),) if quick else ((True, False), (False, False), (False, True)):
                label = f"{dtype_name}{' add' * add}{' rms' * rms} {cols if cols < 100_000 else 'long'}"
                yield label, norm_launches(capability, dtype, cols, add, rms)
        for rows in (1, 4096) if quick else (1, 32, 64, 128, 4096):
            for columns in (8192,) if quick else (512, 2048, 16384):
                yield dtype_name, int8_launches(capability, dtype, rows, columns)
    for depth in () if quick else (4096, 20_000):
        x = empty(ROWS, depth, dtype=torch.bfloat16)
        yield f"bfloat16 {depth}", recorded(int8, capability, lambda x=x: int8.quantize(x))


def _candidate_groups(capability: tuple[int, int]) -> Iterator[tuple[str, Iterable[Launch]]]:
    device, dtype = DEVICES[capability], torch.bfloat16
    for cols in COLS:
        for add, rms in ((True, False), (False, False), (False, True)):
            plan = partial(norm_launches, capability, dtype, cols, add, rms)
            label = f"bfloat16{' add' * add}{' rms' * rms} {cols}"
            if cols <= norms.FWD_MAX_COLS:
                yield label, tuned(norms, "fwd_tile", norms.fwd_candidates(ROWS, cols, device), plan)
            if cols <= norms.BWD_MAX_COLS:
                yield label, tuned(norms, "bwd_tile", norms.bwd_candidates(ROWS, cols, device), plan)
    for rows in (1, 32, 64, 4096):
        itemsize = 2 if rows <= int8.FUSED_MAX_ROWS else 1
        plan = partial(int8_launches, capability, dtype, rows, 8192)
        yield "bfloat16", tuned(int8, "matmul_tile", int8.candidates(rows, device, itemsize), plan)
