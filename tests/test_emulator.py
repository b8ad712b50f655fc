"""The emulator itself: what it reports, how it schedules, and that its runs can be repeated."""

from __future__ import annotations

import re

import pytest
import torch
from emulated import MODES, PTX_TESTS, AsyncMode, KernelError, Mode, Schedule, emulated_library, host_compiler

pytestmark = pytest.mark.skipif(host_compiler() is None, reason="no C++ compiler on PATH")

IN_ORDER = Mode()
LAZY = Mode(async_mode=AsyncMode.LAZY)
SEEDED = [Mode(Schedule.PRIORITY, AsyncMode.LAZY, seed) for seed in range(4)]


def run(name: str, mode: Mode = IN_ORDER) -> torch.Tensor:
    """Runs a kernel of misuse.cu on 64 floats of global memory and returns them."""
    library = emulated_library()
    library.configure(mode)
    data = torch.zeros(64)
    library.call(f"misuse_{name}", data, data.numel())
    return data


def line_of(text: str) -> int:
    """The only line of misuse.cu that has ``text`` in it."""
    lines = [i for i, line in enumerate((PTX_TESTS / "misuse.cu").read_text().splitlines(), 1) if text in line]
    assert len(lines) == 1, f"{text!r} is on lines {lines}"
    return lines[0]


# Rule broken -> what the report must say, in every mode.
ALWAYS_REPORTED = {
    "lanes_at_different_instructions": r"warp 0 diverged: .*__syncwarp at|warp 0 diverged: .*__shfl_xor_sync at",
    "lanes_at_one_barrier_from_different_lines": r"lanes of warp \d reached the same barrier from different lines",
    "shuffle_from_outside_the_mask": r"lane 0 reads lane 16, which is not in mask 0000ffff",
    "lane_outside_its_mask": r"the calling lane \d+ is not in its mask 0000ffff",
    "barrier_with_two_counts": r"barrier 1 is used with \d+ threads here and \d+ elsewhere",
    "barrier_of_half_a_warp": r"48 threads: a barrier counts whole warps",
    "copy_past_the_end_of_shared": r"16 bytes at offset \d+ of dynamic shared memory, which has 256 bytes",
    "copy_from_past_the_end_of_global": r"reads 16 bytes of global memory at .*, outside every tensor",
    "copy_from_a_misaligned_address": r"global address .* is not 16-byte aligned",
    "vector_from_a_misaligned_address": r"thread 1, load_vec at .* is not 16-byte aligned",
    "vector_to_a_misaligned_address": r"thread 1, store_vec at .* is not 8-byte aligned",
    "store_past_the_end_of_dynamic_shared": r"wrote past the end of its dynamic shared memory \(256 bytes\)",
    "store_past_the_end_of_static_shared": r"wrote past the end of a static shared array",
    "exit_with_a_copy_in_flight": r"the thread exits while this copy is in flight",
    "mbarrier_before_init": r"is used before mbarrier.init",
    "mbarrier_initialised_twice": r"the mbarrier is initialised already",
    "mbarrier_overwritten": r"was overwritten",
    "mbarrier_with_too_many_arrivals": r"more arrivals in phase 0 than the 31",
    "load_without_fence_mbarrier_init": r"fence.mbarrier_init is missing",
    "load_over_stores_without_fence_proxy": r"writes over .*which ordinary stores changed without fence.proxy.async",
    "store_without_fence_proxy": r"reads .*which ordinary stores changed without fence.proxy.async",
    "store_before_the_start": r"a box that starts at -4 in dimension 0",
    "rows_shorter_than_the_swizzle": r"rows of 64 bytes in a swizzle of 128",
    "store_async_without_a_cluster": r"in a cluster of one block",
    "turn_passed_while_a_store_writes": r"bulk.* may not be complete yet: cp.async.bulk.wait_group is missing",
    "wgmma_without_fence": r"no wgmma.fence since the last wgmma.commit_group",
    "warps_of_a_warpgroup_disagree": r"warps 0 and 1 of one warpgroup issued different wgmma sequences",
    "warps_of_a_warpgroup_wait_differently": r"warps 0 and 1 of one warpgroup issued different wgmma sequences",
    "descriptor_outside_shared": r"a descriptor reaches shared address \d+, outside the block's memory",
    "more_registers_than_were_given_back": r"deadlock(.*\n)*.*setmaxnreg\.inc",
    "setmaxnreg_by_one_warp": r"warps 0 and 1 of one warpgroup executed different setmaxnreg",
}
# These need an operation that is still in flight.
REPORTED_WHEN_LAZY = {
    "load_nobody_waits_for": r"the block ended before cp.async.bulk \(load\) at .* had completed",
    "source_changed_before_the_store_read_it": r"shared memory was changed before the store had read it",
    "exit_while_a_store_reads": r"the thread exits while this store still reads shared memory",
    "wgmma_not_waited_for": r"the warp exits while this is in flight",
    "accumulator_changed_in_flight": r"accumulator 3 of lane 0 was modified while in flight",
    "tile_changed_in_flight": r"was changed by ordinary stores without fence.proxy.async, or in flight",
}


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("rule", ALWAYS_REPORTED)
def test_reports_a_broken_rule(rule, mode):
    with pytest.raises(KernelError, match=ALWAYS_REPORTED[rule]):
        run(rule, mode)


@pytest.mark.parametrize("mode", [LAZY, *SEEDED], ids=str)
@pytest.mark.parametrize("rule", REPORTED_WHEN_LAZY)
def test_reports_a_broken_rule_of_asynchrony(rule, mode):
    with pytest.raises(KernelError, match=REPORTED_WHEN_LAZY[rule]):
        run(rule, mode)


def test_errors_name_block_thread_file_and_line():
    with pytest.raises(KernelError) as error:
        run("copy_from_a_misaligned_address")
    line = line_of("data + threadIdx.x);")
    assert re.match(rf"block \(0, 0, 0\) thread 1, cp.async at \S*tests/ptx/misuse.cu:{line}: global", str(error.value))


def test_deadlock_report_names_each_waiting_thread():
    with pytest.raises(KernelError) as error:
        run("barrier_not_reached_by_one_warp")
    line = line_of("if (threadIdx.x / 32 != 1) __syncthreads();")
    first, *waiting = str(error.value).splitlines()
    assert first == "block (0, 0, 0): deadlock. Waiting threads:"
    assert [re.sub(r"\S*/", "", text.strip()) for text in waiting] == [
        f"thread 0-31 in __syncthreads at misuse.cu:{line}",
        f"thread 64-95 in __syncthreads at misuse.cu:{line}",
    ]


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_deadlock_report_describes_the_mbarrier(mode):
    with pytest.raises(KernelError, match=r"is in phase 0 and waits for 32 arrivals and 0 bytes"):
        run("mbarrier_never_completed", mode)


def test_shared_memory_starts_as_nan():
    assert run("uninitialised_shared")[:32].isnan().all()


def test_bulk_additions_flush_denormals():
    assert (run("denormals_added_in_bulk") == 0).all()


def test_accumulators_in_flight_are_nan():
    assert run("accumulator_read_in_flight", LAZY)[:32].isnan().all()
    assert not run("accumulator_read_in_flight").isnan().any()


@pytest.mark.parametrize(
    "threads, blocks_y, smem_bytes, message",
    [
        (0, 1, 0, "a block has 1 to 1024 threads, not 0"),
        (1025, 1, 0, "not 1025"),
        (32, 65536, 0, "the limits are"),
        (32, 1, 227 * 1024 + 1, "the limit is 232448"),
    ],
)
def test_impossible_launches_are_refused(threads, blocks_y, smem_bytes, message):
    with pytest.raises(KernelError, match=re.escape(message)):
        emulated_library().call("misuse_launch", threads, blocks_y, smem_bytes)


def test_static_shared_memory_counts_in_the_limit():
    """With what lies between it and the dynamic part, which starts at a multiple of 1024 bytes."""
    emulated_library().call("misuse_static_shared", 226 * 1024)
    with pytest.raises(KernelError, match="232449 bytes of static and dynamic shared memory"):
        emulated_library().call("misuse_static_shared", 226 * 1024 + 1)


def test_a_kernel_asks_for_one_size_of_shared_memory():
    """Its limit is an attribute of the kernel, which another thread's launch would lower between two calls of ours."""
    for smem_bytes in (1024, 40 * 1024, 60 * 1024, 60 * 1024):
        emulated_library().call("misuse_launch", 32, 1, smem_bytes)
    with pytest.raises(KernelError, match=r"asks for 61441 bytes .* and has asked for 61440 before"):
        emulated_library().call("misuse_launch", 32, 1, 60 * 1024 + 1)


def test_a_launch_after_an_error_is_clean():
    with pytest.raises(KernelError):
        run("wgmma_without_fence")
    emulated_library().call("misuse_launch", 256, 3, 1024)


def named_barriers(mode: Mode) -> tuple[torch.Tensor, int]:
    library = emulated_library()
    library.configure(mode)
    values = torch.arange(7 * 64, dtype=torch.int32)
    out = torch.empty_like(values)
    library.call("ptx_named_barriers", values, out, 7)
    return out, library.switches


@pytest.mark.parametrize("schedule", Schedule)
def test_one_seed_gives_one_execution(schedule):
    mode = Mode(schedule, AsyncMode.RANDOM, seed=5)
    assert named_barriers(mode)[1] == named_barriers(mode)[1]


@pytest.mark.parametrize("schedule", [Schedule.UNIFORM, Schedule.PRIORITY])
def test_seeds_give_different_executions(schedule):
    assert len({named_barriers(Mode(schedule, AsyncMode.LAZY, seed))[1] for seed in range(8)}) > 1


def test_blocks_are_shared_out_between_os_threads():
    values = torch.arange(6 * 256, dtype=torch.int32)
    library = emulated_library()
    for os_threads in (1, 2, 5):
        library.configure(Mode(Schedule.PRIORITY, AsyncMode.LAZY, 1, os_threads))
        out = torch.full_like(values, -1)
        library.call("ptx_syncthreads", values, out)
        assert torch.equal(out, values.view(6, 256).flip(1).flatten())
