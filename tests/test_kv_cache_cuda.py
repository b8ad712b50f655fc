"""``attention_with_kv_cache`` on its CUDA kernels: appended and rotated in one launch, read where the cache has it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from emulated import MODES, Mode
from kv_cache_cases import BATCH, CAPACITY, NAN, Problem, check_empty
from torch.utils._python_dispatch import TorchDispatchMode

import fastattn
from fastattn._extension import extension

EMULATED = fastattn.available_backends()["emulated"] is None
BACKEND = "emulated" if EMULATED else "cuda"
pytestmark = [
    pytest.mark.skipif(
        not EMULATED and fastattn.available_backends()["cuda"] is not None,
        reason=f"neither CUDA kernels nor their emulator: {fastattn.available_backends()['cuda']}",
    ),
    pytest.mark.usefixtures("device_for_kernels"),
]
DTYPE = torch.bfloat16


@pytest.fixture
def device_for_kernels():
    with torch.device("cpu" if EMULATED else "cuda"):
        yield
    if EMULATED:
        Mode().apply()


def configure(mode: Mode, **device: Any) -> None:
    if EMULATED:
        mode.apply(**device)


OPTIONS = {
    "causal": dict,
    "not_causal": lambda: {"is_causal": False},
    "window": lambda: {"window": (70, 0)},
    "softcap_scale": lambda: {"softcap": 1.5, "scale": -0.5},
    "alibi": lambda: {"alibi_slopes": torch.tensor([0.1, 0.2, 0.4, 0.8])},
    "sinks": lambda: {"sinks": torch.tensor([0.5, -1.0, 2.0, 0.0])},
}
# What a tile of 64 keys meets: a cache in one piece, blocks that divide it, that it divides, that do neither, and that
# are smaller than the 16 rows which a warp's lanes take in a step.
BLOCK_SIZES = [None, 16, 128, 48, 6]


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("options", OPTIONS)
def test_options(options, block_size):
    """With one length a sequence, of which one is past a split of the keys, and one new token, or more than a tile."""
    configure(MODES[(list(OPTIONS).index(options) + BLOCK_SIZES.index(block_size)) % len(MODES)])
    for lengths, new in (((5, 0, 300), 1), ((1, 64, 63), 20)):
        problem = Problem(DTYPE, lengths, new, new, block_size, capacity=384)
        problem.check(BACKEND, torch.tensor(lengths, dtype=torch.int32), **OPTIONS[options]())


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_long_prompts(block_size, head_dim):
    """Rows of queries that fill a card without dividing keys, which Hopper's own kernel waits for; see
    test_kv_cache_hopper.py."""
    configure(MODES[BLOCK_SIZES.index(block_size) % len(MODES)], compute_capability=90, multiprocessors=1)
    lengths, new = (186, 0, 131), 70 if EMULATED else 1200
    problem = Problem(DTYPE, lengths, new, new, block_size, head_dim=head_dim, capacity=1536)
    problem.check(BACKEND, torch.tensor(lengths, dtype=torch.int32))


@pytest.mark.parametrize("block_size", [None, 16])
@pytest.mark.parametrize(("heads_kv", "head_dim"), [(4, 64), (1, 128), (2, 80), (1, 256), (4, 20), (1, 3)])
def test_heads(heads_kv, head_dim, block_size):
    """Rows of 20 and 3 elements are not 16 bytes apart."""
    configure(MODES[1])
    lengths = (5, 0, 130)
    problem = Problem(torch.float16, lengths, 2, 2, block_size, heads_kv, head_dim, capacity=144)
    problem.check(BACKEND, torch.tensor(lengths))


def test_value_head_dim_differs():
    problem = Problem(DTYPE, head_dim=64)
    key_cache, value_cache = problem.caches[0], problem.caches[1, ..., :24].contiguous()
    key, value = problem.fresh[0], problem.fresh[1, ..., :24]
    lengths = torch.tensor(problem.lengths)
    out = fastattn.attention_with_kv_cache(
        problem.query, key_cache, value_cache, key, value, cache_seqlens=lengths, backend=BACKEND
    )
    expected = problem.expected(True)[0][..., :24]
    torch.testing.assert_close(out, expected.to(DTYPE), atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(value_cache[0, 5:8], value[0])


@pytest.mark.parametrize("splits", [1, 3, 8])
def test_splits_of_the_keys(splits):
    """A short sequence leaves parts of the keys empty."""
    configure(MODES[splits % 4], multiprocessors=2 * splits + 1)
    lengths = (5, 0, 1020)
    problem = Problem(DTYPE, lengths, 1, 1, 16, head_dim=64, capacity=1024)
    launched = extension.emulated_launches()
    problem.check(BACKEND, torch.tensor(lengths))
    if EMULATED:
        assert extension.emulated_launches() - launched == (2 if splits == 1 else 3)


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
@pytest.mark.parametrize("rotary_dim", [64, 32, 24, 2])
@pytest.mark.parametrize("angle_dtype", [torch.float32, DTYPE, torch.float64])
@pytest.mark.parametrize("block_size", [None, 16])
def test_rotation(block_size, angle_dtype, rotary_dim, interleaved):
    """24 and 2 are rotated an element at a time, 64 and 32 by vectors of eight."""
    problem = Problem(DTYPE, head_dim=64, block_size=block_size)
    angles = torch.outer(torch.arange(CAPACITY), torch.rand(rotary_dim // 2))
    cos, sin = angles.cos().to(angle_dtype), angles.sin().to(angle_dtype)
    # The kernel rotates in float32 by these very angles; so does PyTorch.
    expected = Problem(DTYPE, head_dim=64, block_size=block_size)
    results = []
    for each, backend in ((problem, BACKEND), (expected, "eager")):
        out = fastattn.attention_with_kv_cache(
            each.query, *each.caches, *each.fresh, cache_seqlens=torch.tensor(each.lengths), block_table=each.table,
            rotary_cos=cos, rotary_sin=sin, rotary_interleaved=interleaved, backend=backend,
        )  # fmt: skip
        results.append(out)
    torch.testing.assert_close(problem.caches, expected.caches, equal_nan=True, atol=0, rtol=2**-8)
    torch.testing.assert_close(*results, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("block_size", [None, 16])
def test_one_length(block_size):
    configure(MODES[2])
    Problem(DTYPE, (70,) * 3, 5, 5, block_size, capacity=96).check(BACKEND, 70)
    Problem(DTYPE, (70,) * 3, 0, 1, block_size, capacity=96).check(BACKEND, 70)


def test_strided_operands():
    """Slices of a projection, a table and lengths with strides, int64, and caches with other strides than their own."""
    problem = Problem(DTYPE, block_size=16)
    lengths = torch.tensor(problem.lengths)
    projected = torch.cat((problem.query, *problem.fresh), dim=2)
    query, key, value = projected.split((4, 2, 2), dim=2)
    table = torch.full((BATCH, 2 * problem.table.shape[1]), -7)
    table[:, ::2] = problem.table
    for layout in (lambda x: x.clone(), lambda x: x.transpose(1, 2).clone().transpose(1, 2), lambda x: x.mT.clone().mT):
        caches = [layout(cache) for cache in problem.caches]
        out = fastattn.attention_with_kv_cache(
            query, *caches, key, value, cache_seqlens=lengths.repeat_interleave(2)[::2], block_table=table[:, ::2],
            backend=BACKEND,
        )  # fmt: skip
        expected, plain = problem.expected(True)[0], [cache.clone() for cache in problem.caches]
        torch.testing.assert_close(out, expected.to(DTYPE), atol=2e-2, rtol=2e-2)
        fastattn.attention_with_kv_cache(
            query, *plain, key, value, cache_seqlens=lengths, block_table=problem.table, backend="eager"
        )
        torch.testing.assert_close(caches, plain, equal_nan=True)


def test_empty():
    check_empty(BACKEND, DTYPE)


# ---- what a step costs


class _TorchOps(TorchDispatchMode):
    """The ops of PyTorch that run, but for those that only make views."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.is_view is False:
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("head_dim", [64, 20])
@pytest.mark.parametrize("block_size", [None, 16])
def test_a_step_is_three_launches_and_copies_nothing_of_the_cache(block_size, head_dim):
    problem = Problem(DTYPE, (250, 1000, 1023), 1, 1, block_size, head_dim=head_dim, capacity=1024)
    lengths = torch.tensor(problem.lengths, dtype=torch.int32)
    angles = torch.rand(1024, head_dim // 2)

    def step():
        return fastattn.attention_with_kv_cache(
            problem.query, *problem.caches, *problem.fresh, cache_seqlens=lengths, block_table=problem.table,
            rotary_cos=angles, rotary_sin=angles, backend=BACKEND,
        )  # fmt: skip

    with _TorchOps() as ops:
        step()
    assert ops.names == ["fastattn.attention_with_kv_cache.default"]
    if not EMULATED:
        before = torch.cuda.memory_stats()["allocated_bytes.all.allocated"]
        step()
        allocated = torch.cuda.memory_stats()["allocated_bytes.all.allocated"] - before
    else:
        launched = extension.emulated_launches()
        with torch.profiler.profile(profile_memory=True) as profile:
            step()
        assert extension.emulated_launches() - launched == 3
        allocated = sum(max(event.self_cpu_memory_usage, 0) for event in profile.events())
    # Partial results: of each part of the keys a row of fp32 a head.
    assert 0 < allocated < problem.caches[0].nbytes / 4


@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
@pytest.mark.parametrize("mode", MODES[:2], ids=str)
def test_lengths_and_tables_that_nobody_checked_stay_inside_the_cache(mode, kind):
    """As on a device: they are clipped, positions of the rotation, too."""
    configure(mode, checks_values=False)
    lengths, table = [10**6, -5, 20], [[1, 2, 3], [-3, 4, 5], [6, 10**6, 7]]
    query, new = torch.randn(3, 3, 4, 16).to(DTYPE), torch.randn(2, 3, 3, 2, 16).to(DTYPE)
    caches, angles = torch.randn(2, 10, 16, 2, 16).to(DTYPE), torch.rand(20, 8)
    caches[:, 8], expected_caches = NAN, caches.clone()
    expected_caches[:, 8] = NAN  # a block that no table names

    out = fastattn.attention_with_kv_cache(
        query, *caches, *new, cache_seqlens=torch.tensor(lengths, dtype=kind), backend=BACKEND,
        block_table=torch.tensor(table, dtype=kind), rotary_cos=angles.cos(), rotary_sin=angles.sin(),
    )  # fmt: skip
    angles = torch.cat((angles, angles[-1:].expand(60, -1)))
    expected = fastattn.attention_with_kv_cache(
        query, *expected_caches, *new, cache_seqlens=torch.tensor(lengths).clamp(0, 45), backend="eager",
        block_table=torch.tensor(table).clamp(0, 9), rotary_cos=angles.cos(), rotary_sin=angles.sin(),
    )  # fmt: skip
    torch.testing.assert_close(out, expected, atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(caches, expected_caches, equal_nan=True, atol=0, rtol=2**-7)


def test_values_are_checked_on_the_cpu():
    if not EMULATED:
        pytest.skip("on a device, reading them would be a synchronisation")
    for lengths, table, message in (
        ([0, 46, 1], None, "cache_seqlens 46 and 3 new tokens exceed the cache, which holds 48"),
        ([0, -2, 1], None, "cache_seqlens must be >= 0, got -2"),
        ([0, 18, 1], None, "rotary_cos has 20 positions, but 21 are needed"),
        ([0, 5, 1], [[0], [3], [0]], r"block_table\[1, 0\] is 3, but key_cache has blocks 0 to 2"),
        ([0, 5, 1], [[0], [-1], [0]], r"block_table\[1, 0\] is -1"),
    ):
        caches, rotary = torch.zeros(2, 3, 48, 2, 16, dtype=DTYPE), torch.zeros(20, 8)
        new = torch.ones(3, 3, 2, 16, dtype=DTYPE)
        with pytest.raises(ValueError, match=f"attention_with_kv_cache: {message}"):
            fastattn.attention_with_kv_cache(
                torch.ones(3, 3, 4, 16, dtype=DTYPE), *caches, new, new, cache_seqlens=torch.tensor(lengths),
                block_table=None if table is None else torch.tensor(table), rotary_cos=rotary, rotary_sin=rotary,
                backend=BACKEND,
            )  # fmt: skip
        assert not caches.any()


def test_opcheck_and_compiles():
    if not EMULATED:
        pytest.skip("test_attention_with_kv_cache compiles the step on the device")
    problem = Problem(DTYPE, block_size=16)
    angles = torch.rand(CAPACITY, 8)

    def arguments(caches):
        return (problem.query, *caches, *problem.fresh, torch.tensor(problem.lengths), 0, problem.table, angles, angles,
                False, None, None, True, 0.25, -1, -1, 0.0)  # fmt: skip

    op = torch.ops.fastattn.attention_with_kv_cache
    with extension.Emulation():
        torch.library.opcheck(op, arguments(problem.caches.nan_to_num().unbind()))
        first, second = problem.caches.clone(), problem.caches.clone()
        compiled = torch.compile(lambda caches: op(*arguments(caches.unbind())), fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(first), op(*arguments(second.unbind())))
        torch.testing.assert_close(first, second, equal_nan=True)
