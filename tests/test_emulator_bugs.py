"""Whole kernels, right and with one synchronisation left out: the emulator must tell the two apart.

Each bug is caught by every seed of the adversarial schedule, by an error or by numbers that are far off. The right
kernels pass in every combination of schedule and asynchrony, so that a report means a defect.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from emulated import AsyncMode, KernelError, Mode, Schedule, emulated_library, host_compiler

pytestmark = pytest.mark.skipif(host_compiler() is None, reason="no C++ compiler on PATH")

EVERY_MODE = [Mode(schedule, async_mode, seed=7) for schedule in Schedule for async_mode in AsyncMode]
ADVERSARIAL = [Mode(Schedule.PRIORITY, AsyncMode.LAZY, seed) for seed in range(5)]

# Bugs by name, in the order of enum class Bug; and what the report says, or None where the numbers are wrong.
SM80_BUGS = ("none", "no_wait", "no_barrier_for_k", "no_barrier_for_v", "no_bounds_check", "no_barrier_in_sum",
             "buffer_reused")  # fmt: skip
ATTENTION_BUGS = {
    "no_wait": None,
    "no_barrier_for_k": None,
    "no_barrier_for_v": None,
    "no_bounds_check": "global memory at .*, outside every tensor",
}
LAYER_NORM_BUGS = {"no_barrier_in_sum": None, "buffer_reused": None}
MATMUL_BUGS = {
    "no_full_wait": "",  # "" accepts any report, and numbers too: which one it is depends on the schedule
    "no_empty_wait": "",
    "no_release": "deadlock",
    "early_release": "",
    "wrong_bytes": "deadlock(.|\n)*0 arrivals and 16 bytes",
    "no_init_barrier": "used before mbarrier.init",
    "no_wgmma_wait": "",
    "no_wgmma_fence": "no wgmma.fence since",
    "accumulator_touched": "accumulator 5 of lane 0 was modified while in flight",
    "no_proxy_fence": "without fence.proxy.async",
    "no_barrier_before_store": "",
    "no_store_wait": "the thread exits while this store still reads shared memory",
    "stage_overrun": "",
}
CLUSTER_BUGS = ("none", "no_start_barrier", "no_barrier_before_load", "no_barrier_before_reuse",
                "no_barrier_before_exit", "one_warp_at_the_barrier", "no_init_fence", "no_wait", "one_slot",
                "one_buffer", "too_few_bytes", "too_many_bytes", "own_barrier", "past_the_end", "no_such_rank",
                "unmapped_address")  # fmt: skip
CLUSTER_LOADS_BUGS = {
    "no_start_barrier": "may not have started: no barrier.cluster has completed",
    "no_barrier_before_load": None,
    "no_barrier_before_reuse": None,
    "no_barrier_before_exit": "block \\d of the cluster has exited",
    "one_warp_at_the_barrier": "deadlock(.|\n)*thread 0-31 in barrier.cluster.wait|has exited",
}
CLUSTER_STORES_BUGS = {
    "no_start_barrier": "may not have started: no barrier.cluster has completed",
    "no_init_fence": "not visible to the cluster: fence.mbarrier_init is missing",
    "no_wait": "",
    "one_slot": None,
    "one_buffer": "",
    "too_few_bytes": "",
    "too_many_bytes": "deadlock(.|\n)*0 arrivals and 4 bytes",
    "own_barrier": "the destination and the mbarrier belong to different blocks",
    "past_the_end": "4 bytes at offset \\d+ of dynamic shared memory, which has 0 bytes",
    "no_such_rank": "rank 4 in a cluster of 4 blocks",
    "unmapped_address": "",
}


def attention_error(mode: Mode, bug: str = "none") -> float:
    """The largest error of the attention kernel (about 0.004 if it is right)."""
    library = emulated_library()
    library.configure(mode)
    q, k, v = [torch.randn(2, 200, 64).bfloat16() for _ in range(3)]
    out = torch.full_like(q, torch.nan)
    library.call("bugs_attention", q, k, v, out, 2, 200, SM80_BUGS.index(bug))
    expected = (q.double() @ k.double().mT * 0.125).softmax(-1) @ v.double()
    return (out.double() - expected).abs().max().item()


def layer_norm_error(mode: Mode, bug: str = "none") -> float:
    library = emulated_library()
    library.configure(mode)
    x = torch.randn(12, 1000) + torch.arange(12)[:, None]
    out = torch.full_like(x, torch.nan)
    library.call("bugs_layer_norm", x, out, 12, 1000, SM80_BUGS.index(bug))
    return (out - torch.nn.functional.layer_norm(x, (1000,))).abs().max().item()


def matmul_error(mode: Mode, bug: str = "none") -> float:
    library = emulated_library()
    library.configure(mode)
    m, n, k = 100, 128, 328  # ragged tiles in m and k
    a, b = torch.randn(m, k).bfloat16(), torch.randn(n, k).bfloat16()
    c = torch.full((m, n), torch.nan, dtype=torch.bfloat16)
    library.call("bugs_matmul", a, b, c, m, n, k, ["none", *MATMUL_BUGS].index(bug))
    return ((c.double() - a.double() @ b.double().T) / k**0.5).abs().max().item()


def cluster_error(how: str, mode: Mode, bug: str = "none") -> float:
    library = emulated_library()
    library.configure(mode)
    x = torch.randn(6, 512) + 10 * torch.arange(6)[:, None]
    out = torch.full_like(x, torch.nan)
    library.call(f"bugs_cluster_{how}", x, out, 6, 512, CLUSTER_BUGS.index(bug))
    return (out - (x - x.mean(1, keepdim=True))).abs().max().item()


TOLERANCE = 0.02
KERNELS = {
    "attention": (attention_error, ATTENTION_BUGS),
    "layer_norm": (layer_norm_error, LAYER_NORM_BUGS),
    "matmul": (matmul_error, MATMUL_BUGS),
    "cluster_loads": (partial(cluster_error, "loads"), CLUSTER_LOADS_BUGS),
    "cluster_stores": (partial(cluster_error, "stores"), CLUSTER_STORES_BUGS),
}


@pytest.mark.parametrize("mode", EVERY_MODE, ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
def test_the_right_kernel_passes(kernel, mode):
    assert KERNELS[kernel][0](mode) < TOLERANCE


@pytest.mark.parametrize("mode", ADVERSARIAL, ids=str)
@pytest.mark.parametrize("kernel, bug", [(name, bug) for name, (_, bugs) in KERNELS.items() for bug in bugs])
def test_a_seeded_bug_is_caught(kernel, bug, mode):
    error_of, bugs = KERNELS[kernel]
    report = bugs[bug]
    if report:
        with pytest.raises(KernelError, match=report):
            error_of(mode, bug)
        return
    try:
        error = error_of(mode, bug)
    except KernelError:
        assert report is not None, "this bug was to show in the numbers"
        return
    assert not error < TOLERANCE
