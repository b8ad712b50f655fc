"""``attention_with_kv_cache`` on Triton's kernels: appended and rotated in one launch, read where the cache has it."""

from __future__ import annotations

import pytest
import torch
from devices import device_for
from kv_cache_cases import BATCH, CAPACITY, NAN, Problem, check_empty
from torch.utils._python_dispatch import TorchDispatchMode

import fastattn
from fastattn import _triton

pytestmark = pytest.mark.skipif(
    fastattn.available_backends()["triton"] is not None, reason=f"no triton: {fastattn.available_backends()['triton']}"
)
DEVICE = device_for("triton")
DTYPE = torch.bfloat16


@pytest.fixture(autouse=True)
def on_the_device():
    with torch.device(DEVICE):
        yield


def parted(monkeypatch, parts: int) -> None:
    from fastattn.ops import attention_with_kv_cache_triton_plan as plan

    monkeypatch.setattr(plan, "_parts", lambda *numbers: parts)


def _column(*numbers: float) -> torch.Tensor:
    """A number for each head, as a column of a table has them."""
    return torch.tensor(numbers)[:, None].repeat(1, 3)[:, 0]


OPTIONS = {
    "causal": dict,
    "not_causal": lambda: {"is_causal": False},
    "window": lambda: {"window": (40, 0)},
    "window_both_sides": lambda: {"window": (9, 1), "is_causal": False},
    "softcap_scale": lambda: {"softcap": 1.5, "scale": -0.5},
    "alibi": lambda: {"alibi_slopes": _column(0.1, 0.2, 0.4, 0.8)},
    "sinks": lambda: {"sinks": _column(0.5, -1.0, 2.0, 0.0)},
}
# What a tile of 32 keys meets: a cache in one piece, blocks that divide it, that it divides, that do neither.
BLOCK_SIZES = [None, 16, 64, 48, 6]


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("options", OPTIONS)
def test_options(options, block_size, monkeypatch):
    """One new token, in parts of the keys of which short sequences leave some empty, and more than a tile of rows."""
    for lengths, new, parts in (((5, 0, 140), 1, 3), ((1, 64, 120), 20, 2)):
        parted(monkeypatch, parts)
        problem = Problem(torch.float32, lengths, new, new, block_size, head_dim=8, capacity=192)
        problem.check("triton", torch.tensor(lengths, dtype=torch.int32), **OPTIONS[options]())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("heads_kv", "head_dim"), [(4, 64), (1, 128), (2, 20), (1, 3)])
def test_heads(heads_kv, head_dim, dtype):
    lengths = (5, 0, 70)
    Problem(dtype, lengths, 2, 2, 12, heads_kv, head_dim, capacity=84).check("triton", torch.tensor(lengths))


@pytest.mark.parametrize("block_size", [None, 16])
def test_one_length(block_size):
    Problem(DTYPE, (70,) * 3, 5, 5, block_size, capacity=96).check("triton", 70)
    Problem(DTYPE, (70,) * 3, 0, 1, block_size, capacity=96).check("triton", 70)
    # A prompt: in one piece, it runs as general attention does.
    Problem(DTYPE, (9,) * 3, 65, 65, block_size, capacity=96).check("triton", 9)


def test_value_head_dim_differs():
    problem = Problem(torch.float32, head_dim=40)
    key_cache, value_cache = problem.caches[0], problem.caches[1, ..., :24].contiguous()
    key, value = problem.fresh[0], problem.fresh[1, ..., :24]
    out = fastattn.attention_with_kv_cache(
        problem.query, key_cache, value_cache, key, value, cache_seqlens=torch.tensor(problem.lengths), backend="triton"
    )
    torch.testing.assert_close(out, problem.expected(True)[0][..., :24].float())
    torch.testing.assert_close(value_cache[0, 5:8], value[0])


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
@pytest.mark.parametrize("rotary_dim", [16, 6, 2])
@pytest.mark.parametrize("angle_dtype", [torch.float32, DTYPE, torch.float64], ids=str)
def test_rotation(angle_dtype, rotary_dim, interleaved):
    """The kernel rotates in float32 by these very angles; so does PyTorch."""
    angles = torch.outer(torch.arange(CAPACITY), torch.rand(rotary_dim // 2))
    cos, sin = angles.cos().to(angle_dtype), angles.sin().to(angle_dtype)
    results = []
    for backend in ("triton", "eager"):
        problem = Problem(DTYPE, block_size=None if rotary_dim == 6 else 16)
        out = fastattn.attention_with_kv_cache(
            problem.query, *problem.caches, *problem.fresh, cache_seqlens=torch.tensor(problem.lengths),
            block_table=problem.table, rotary_cos=cos, rotary_sin=sin, rotary_interleaved=interleaved, backend=backend,
        )  # fmt: skip
        results.append((problem.caches, out))
    torch.testing.assert_close(results[0][0], results[1][0], equal_nan=True, atol=0, rtol=2**-8)
    torch.testing.assert_close(results[0][1], results[1][1], atol=2e-2, rtol=2e-2)


def test_strided_operands():
    """Slices of a projection, a table and lengths with strides, int64, and caches with other strides than their own."""
    problem = Problem(torch.float32, block_size=16)
    lengths = torch.tensor(problem.lengths)
    query, key, value = torch.cat((problem.query, *problem.fresh), dim=2).split((4, 2, 2), dim=2)
    table = torch.full((BATCH, 2 * problem.table.shape[1]), -7)
    table[:, ::2] = problem.table
    plain = [cache.clone() for cache in problem.caches]
    fastattn.attention_with_kv_cache(
        query, *plain, key, value, cache_seqlens=lengths, block_table=problem.table, backend="eager"
    )
    for layout in (lambda x: x.clone(), lambda x: x.transpose(1, 2).clone().transpose(1, 2), lambda x: x.mT.clone().mT):
        caches = [problem.caches[0].clone(), layout(problem.caches[1])]
        out = fastattn.attention_with_kv_cache(
            query, *caches, key, value, cache_seqlens=lengths.repeat_interleave(2)[::2], block_table=table[:, ::2],
            backend="triton",
        )  # fmt: skip
        torch.testing.assert_close(out, problem.expected(True)[0].float())
        torch.testing.assert_close(caches, plain, equal_nan=True)


def test_empty():
    check_empty("triton", DTYPE)


# ---- what a step costs


class _TorchOps(TorchDispatchMode):
    """The bytes of what PyTorch's ops give, but for those that only make views."""

    def __init__(self):
        super().__init__()
        self.bytes: dict[str, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.is_view is False and isinstance(result, torch.Tensor):
            self.bytes[str(func)] = max(self.bytes.get(str(func), 0), result.nbytes)
        return result


@pytest.mark.parametrize("block_size", [None, 16])
def test_a_step_is_three_launches_and_copies_nothing_of_the_cache(block_size, monkeypatch):
    from fastattn.ops import attention_with_kv_cache_triton as face
    from fastattn.ops import triton_launch

    parted(monkeypatch, 2)
    # The interpreter, which copies whatever a kernel reads, is left out.
    launched = []
    monkeypatch.setattr(triton_launch.Launch, "run", lambda self, on: launched.append(self.kernel))
    problem = Problem(torch.float32, (50, 250, 255), 1, 1, block_size, capacity=256)
    angles, lengths = torch.rand(256, 8), torch.tensor(problem.lengths)
    arguments = (
        problem.query, *problem.caches.unbind(), *problem.fresh.unbind(), lengths, 0, problem.table, angles, angles,
        False, None, None, True, 0.25, -1, -1, 0.0,
    )  # fmt: skip
    with _TorchOps() as ops:
        face._attend(*arguments)
    assert len(launched) == 3
    # Partial results: of each part of the keys a row of fp32 a head.
    assert 0 < max(ops.bytes.values()) < problem.caches[0].nbytes / 16, ops.bytes


@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
@pytest.mark.parametrize("parts", [1, 2])
def test_lengths_and_tables_that_nobody_checked_stay_inside_the_cache(parts, kind, monkeypatch):
    """As on a device: they are clipped, positions of the rotation, too."""
    from fastattn.ops import attention_checks as checks

    parted(monkeypatch, parts)
    lengths, table = [10**6, -5, 20], [[1, 2, 3], [-3, 4, 5], [6, 10**6, 7]]
    query, new = torch.randn(3, 3, 4, 16), torch.randn(2, 3, 3, 2, 16)
    # The memory around the caches is there, so that what is read or written outside shows.
    around = torch.full((2, 30, 16, 2, 16), NAN)
    caches = around[:, 10:20]
    caches.copy_(torch.randn(2, 10, 16, 2, 16))
    caches[:, 8] = NAN  # a block that no table names
    expected_caches, angles = caches.clone(), torch.rand(20, 8)

    with monkeypatch.context() as patch:
        patch.setattr(checks, "cache_values", lambda *values: None)
        out = fastattn.attention_with_kv_cache(
            query, *caches, *new, cache_seqlens=torch.tensor(lengths, dtype=kind), backend="triton",
            block_table=torch.tensor(table, dtype=kind), rotary_cos=angles.cos(), rotary_sin=angles.sin(),
        )  # fmt: skip
    angles = torch.cat((angles, angles[-1:].expand(60, -1)))
    expected = fastattn.attention_with_kv_cache(
        query, *expected_caches, *new, cache_seqlens=torch.tensor(lengths).clamp(0, 45), backend="eager",
        block_table=torch.tensor(table).clamp(0, 9), rotary_cos=angles.cos(), rotary_sin=angles.sin(),
    )  # fmt: skip
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(caches, expected_caches, equal_nan=True)
    assert around[:, :10].isnan().all() and around[:, 20:].isnan().all()


def test_values_are_checked_on_the_cpu():
    if not _triton.is_interpreted():
        pytest.skip("on a device, reading them would be a synchronisation")
    for lengths, table, message in (
        ([0, 46, 1], None, "cache_seqlens 46 and 3 new tokens exceed the cache, which holds 48"),
        ([0, -2, 1], None, "cache_seqlens must be >= 0, got -2"),
        ([0, 18, 1], None, "rotary_cos has 20 positions, but 21 are needed"),
        (46, None, "cache_seqlens 46 and 3 new tokens exceed the cache, which holds 48"),
        ([0, 5, 1], [[0], [3], [0]], r"block_table\[1, 0\] is 3, but key_cache has blocks 0 to 2"),
        ([0, 5, 1], [[0], [-1], [0]], r"block_table\[1, 0\] is -1"),
    ):
        caches, rotary = torch.zeros(2, 3, 48, 2, 16, dtype=DTYPE), torch.zeros(20, 8)
        new = torch.ones(3, 3, 2, 16, dtype=DTYPE)
        with pytest.raises(ValueError, match=f"attention_with_kv_cache: {message}"):
            fastattn.attention_with_kv_cache(
                torch.ones(3, 3, 4, 16, dtype=DTYPE), *caches, new, new,
                cache_seqlens=lengths if isinstance(lengths, int) else torch.tensor(lengths),
                block_table=None if table is None else torch.tensor(table), rotary_cos=rotary, rotary_sin=rotary,
                backend="triton",
            )  # fmt: skip
        assert not caches.any()


def test_opcheck_and_compiles():
    problem = Problem(torch.float32, block_size=16)
    angles, lengths = torch.rand(CAPACITY, 8), torch.tensor(problem.lengths)

    def arguments(caches):
        return (problem.query, *caches, *problem.fresh, lengths, 0, problem.table, angles, angles,
                False, None, None, True, 0.25, -1, -1, 0.0)  # fmt: skip

    op = torch.ops.fastattn.attention_with_kv_cache_triton
    torch.library.opcheck(op, arguments(problem.caches.nan_to_num().unbind()))
    first, second = problem.caches.clone(), problem.caches.clone()
    compiled = torch.compile(lambda caches: op(*arguments(caches.unbind())), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(first), op(*arguments(second.unbind())))
    torch.testing.assert_close(first, second, equal_nan=True)
