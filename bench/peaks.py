"""The speeds this machine reaches at most, measured in the same run as the kernels: the roofs of the roofline."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

from fastattn.ops.linear import linear

GEMM_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
GPU_GEMM_DTYPES = {**GEMM_DTYPES, "float16": torch.float16}
Best = Callable[[Callable[[], object], float], float]  # (callee, budget_s) -> seconds of its fastest call


def streams(flops: float, bytes_: float) -> bool:
    """Whether a kernel does so little for each byte that only the speed of a copy, and no GEMM's, is its roof."""
    return flops < 5 * bytes_


@dataclass(frozen=True)
class Peaks:
    """Best speeds seen. GEMMs in GFLOP/s (int8: Gop/s), copies in GB/s of bytes read plus bytes written."""

    gemm: dict[str, float]
    copy_cache: float  # operands that stay in the outer cache
    copy_memory: float  # operands four times the outer cache
    cache_bytes: int

    def flops(self, dtype: str) -> float:
        """The roof for a kernel with operands of ``dtype``.

        Half types may be computed as float32, the faster way on processors without arithmetic of their own for them.
        There is no float16 GEMM to compare with: torch multiplies float16 on x86 without vector code.
        """
        return self.gemm["int8"] if dtype == "int8" else max(self.gemm.get(dtype, 0.0), self.gemm["float32"])

    def bandwidth(self, working_set: float) -> float:
        return self.copy_memory if working_set > self.cache_bytes else self.copy_cache

    def percent(self, dtype: str, flops: float, bytes_: float, seconds: float) -> float:
        """How near the roofline a kernel came: 100 = as fast as the slower of arithmetic and memory allows."""
        least = bytes_ / self.bandwidth(bytes_)
        if not streams(flops, bytes_):
            least = max(least, flops / self.flops(dtype))
        return 100 * least * 1e-9 / seconds

    def best_of(self, other: Peaks) -> Peaks:
        """The higher of two measurements, for a machine that others may have slowed during one of them."""
        gemm = {name: max(speed, other.gemm[name]) for name, speed in self.gemm.items()}
        cache, memory = max(self.copy_cache, other.copy_cache), max(self.copy_memory, other.copy_memory)
        return Peaks(gemm, cache, memory, self.cache_bytes)

    def as_dict(self) -> dict:
        return asdict(self)


def best_seconds(callee: Callable[[], object], budget_s: float) -> float:
    """The fastest of the calls that fit in ``budget_s``, at least five."""
    callee()
    best, runs, deadline = float("inf"), 0, time.perf_counter() + budget_s
    while runs < 5 or time.perf_counter() < deadline:
        start = time.perf_counter()
        callee()
        best, runs = min(best, time.perf_counter() - start), runs + 1
    return best


# (M, N, K): BLAS libraries differ in the shapes they like, so the peak is the best of several.
GEMM_SHAPES = ((256, 256, 256), (512, 768, 768), (512, 3072, 768), (1024, 1024, 1024), (512, 4096, 4096))


GPU_GEMM_SHAPES = ((4096, 4096, 4096), (8192, 8192, 8192), (8192, 8192, 4096))


GPU_COPY_BYTES = 512 << 20


def gemm_peak(dtype: torch.dtype, budget_s: float, shapes: tuple = GEMM_SHAPES, best_of: Best = best_seconds) -> float:
    """Gop/s of the best matrix product of ``dtype``; int8 counts torch._int_mm, which multiplies and does not scale.

    In float32 on the CPU ours counts too: where MKL has no AVX-512 kernels, its product is no roof.
    """
    best = 0.0
    for m, n, k in shapes:
        if dtype == torch.int8:
            a, b = (torch.randint(-127, 128, shape, dtype=dtype) for shape in ((m, k), (n, k)))
            seconds = best_of(lambda a=a, b=b: torch._int_mm(a, b.t()), budget_s)
        else:
            a, b, out = (torch.randn(shape).to(dtype) for shape in ((m, k), (k, n), (m, n)))
            seconds = best_of(lambda a=a, b=b, out=out: torch.mm(a, b, out=out), budget_s)
            if dtype == torch.float32 and a.device.type == "cpu":
                b = b.t().contiguous()
                seconds = min(seconds, best_of(lambda a=a, b=b: linear(a, b), budget_s))
        best = max(best, 2e-9 * m * n * k / seconds)
    return best


def copy_peak(bytes_each: int, budget_s: float, best_of: Best = best_seconds) -> float:
    """GB/s of Tensor.copy_, reads and writes both counted, into memory that is already mapped."""
    source = torch.ones(bytes_each // 4)  # zeros nobody wrote are all one page, which stays in the cache
    target = torch.ones_like(source)
    return 2e-9 * bytes_each / best_of(lambda: target.copy_(source), budget_s)


def measure(cache_bytes: int, budget_s: float = 0.15) -> Peaks:
    """Every peak at the current number of threads; about a second and a half at the default budget."""
    return Peaks(
        gemm={name: gemm_peak(dtype, budget_s) for name, dtype in GEMM_DTYPES.items()},
        copy_cache=max(copy_peak(size, budget_s) for size in (1 << 18, 1 << 20, 1 << 21)),
        copy_memory=copy_peak(max(64 << 20, 2 * cache_bytes), budget_s),
        cache_bytes=cache_bytes,
    )


def measure_gpu(cache_bytes: int, best_of: Best, budget_s: float = 0.15) -> Peaks:
    """Every peak of the default device, a GPU, by ``best_of``, which times on it."""
    return Peaks(
        gemm={name: gemm_peak(dtype, budget_s, GPU_GEMM_SHAPES, best_of) for name, dtype in GPU_GEMM_DTYPES.items()},
        copy_cache=max(copy_peak(cache_bytes // part, budget_s, best_of) for part in (8, 4)),
        copy_memory=copy_peak(max(GPU_COPY_BYTES, 8 * cache_bytes), budget_s, best_of),
        cache_bytes=cache_bytes,
    )
