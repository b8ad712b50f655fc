"""Decoding steps against eager attention over each sequence's own keys, put together by hand."""

from __future__ import annotations

import importlib

import pytest
import torch
from attention_cases import DTYPES, KERNEL_BACKENDS, dtype_id
from devices import moved_for
from kv_cache_cases import BATCH, CAPACITY, HEADS, Problem

import fastattn

attention_with_kv_cache = importlib.import_module("fastattn.ops.attention_with_kv_cache")
pytestmark = pytest.mark.usefixtures("tensors_where_the_backend_runs")
BACKENDS = [*KERNEL_BACKENDS, "eager"]


OPTIONS = {
    "causal": {},
    "not_causal": {"is_causal": False},
    "window": {"window": (7, 0)},
    "softcap_scale": {"softcap": 1.5, "scale": 0.5},
    "alibi": {"alibi_slopes": torch.tensor([0.1, 0.2, 0.4, 0.8])},
    "sinks": {"sinks": torch.tensor([0.5, -1.0, 2.0, 0.0])},
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("block_size", [None, 8], ids=["contiguous", "paged"])
@pytest.mark.parametrize("options", OPTIONS)
def test_options(options, block_size, backend):
    options = moved_for(backend, OPTIONS[options])
    Problem(torch.float32, block_size=block_size).check(backend, torch.tensor([5, 0, 40]), **options)
    Problem(torch.float32, lengths=(21,) * 3, block_size=block_size).check(backend, 21, **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("seqlen_q", [1, 3, 9])
def test_dtypes_and_query_lengths(seqlen_q, dtype, backend):
    Problem(dtype, new=seqlen_q, seqlen_q=seqlen_q, lengths=(5, 0, 38)).check(backend, torch.tensor([5, 0, 38]))
    Problem(dtype, new=seqlen_q, seqlen_q=seqlen_q, lengths=(17,) * 3).check(backend, 17)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", [int, torch.int32, torch.int64], ids=["int", "int32", "int64"])
def test_kinds_of_lengths(kind, backend):
    problem = Problem(torch.float32, lengths=(12, 12, 12))
    problem.check(backend, problem.lengths_as(kind))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lengths", ["one", "each"])
def test_nothing_to_append(lengths, backend):
    problem = Problem(torch.float32, lengths=(12, 12, 12) if lengths == "one" else (12, 1, 30), new=0, seqlen_q=1)
    problem.check(backend, 12 if lengths == "one" else torch.tensor([12, 1, 30]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
@pytest.mark.parametrize("rotary_dim", [16, 8, 2])
@pytest.mark.parametrize("block_size", [None, 16], ids=["contiguous", "paged"])
def test_rotation(block_size, rotary_dim, interleaved, backend):
    angles = torch.outer(torch.arange(CAPACITY), torch.rand(rotary_dim // 2)).double()
    Problem(torch.float64, block_size=block_size).check(backend, torch.tensor([5, 0, 40]), angles, interleaved)
    Problem(torch.float64, lengths=(9,) * 3, block_size=block_size).check(backend, 9, angles, interleaved)


@pytest.mark.parametrize("backend", BACKENDS)
def test_slopes_per_batch(backend):
    """(batch, heads) slopes give each sequence its own: the reference takes them one sequence at a time."""
    problem, slopes = Problem(torch.float64), torch.rand(BATCH, HEADS)
    out = fastattn.attention_with_kv_cache(
        problem.query, *problem.caches, *problem.fresh, cache_seqlens=torch.tensor(problem.lengths),
        alibi_slopes=slopes, backend=backend
    )  # fmt: skip
    for b in range(BATCH):
        torch.testing.assert_close(out[b], problem.expected(True, alibi_slopes=slopes[b])[0][b])


# Blocks of one token, that divide a tile of 64 keys, that straddle tiles, and of several tiles.
@pytest.mark.skipif("cpu" not in KERNEL_BACKENDS, reason="the extension was not built")
@pytest.mark.parametrize("block_size", [1, 7, 16, 64, 100, 128])
@pytest.mark.parametrize("seqlen_q, head_dim", [(1, 32), (4, 16), (9, 16), (70, 20)])
def test_blocks_of_any_size_are_read_in_place(seqlen_q, head_dim, block_size, cpu_isa, monkeypatch):
    monkeypatch.setattr(attention_with_kv_cache, "_step", None)
    capacity, lengths = -(-370 // block_size) * block_size, torch.tensor([300, 0, 129])
    sizes = {"new": seqlen_q, "seqlen_q": seqlen_q, "head_dim": head_dim, "capacity": capacity}
    Problem(torch.bfloat16, lengths=(300, 0, 129), block_size=block_size, **sizes).check(
        "cpu", lengths, window=(150, 0)
    )
    Problem(torch.bfloat16, lengths=(200,) * 3, block_size=block_size, heads_kv=1, **sizes).check("cpu", 200)
    # To the bit what the same tokens give one behind the other.
    paged, dense = (Problem(torch.float32, (300, 0, 129), block_size=size, **sizes) for size in (block_size, None))
    outs = [
        fastattn.attention_with_kv_cache(
            dense.query, *each.caches, *dense.fresh, cache_seqlens=lengths, block_table=each.table, return_lse=True,
            backend="cpu"
        )
        for each in (paged, dense)
    ]  # fmt: skip
    assert torch.equal(outs[0][0], outs[1][0]) and torch.equal(outs[0][1], outs[1][1])


def test_writes_are_counted():
    """As every change in place is: by the version that autograd and our own caches look at."""
    problem = Problem(torch.float32, block_size=8)
    caches = [cache.clone() for cache in problem.caches]
    versions = [cache._version for cache in caches]
    fastattn.attention_with_kv_cache(
        problem.query, *caches, *problem.fresh, cache_seqlens=torch.tensor([5, 0, 40]), block_table=problem.table
    )
    assert all(cache._version > version for cache, version in zip(caches, versions, strict=True))


def test_table_entries_past_the_length_are_not_looked_at():
    problem = Problem(torch.float32, lengths=(5, 0, 20), block_size=8)
    problem.table[0, 1:], problem.table[1, 1:], problem.table[2, 3:] = -1, 10**6, -(2**31)
    problem.check("auto", torch.tensor([5, 0, 20]))


@pytest.mark.parametrize("lengths", [7, torch.tensor([5, 0, 40])], ids=["one_length", "lengths"])
@pytest.mark.parametrize("block_size", [None, 8], ids=["contiguous", "paged"])
def test_compiles_without_a_graph_break(block_size, lengths):
    sizes = (7,) * 3 if isinstance(lengths, int) else (5, 0, 40)
    first, second = (Problem(torch.float32, lengths=sizes, block_size=block_size) for _ in range(2))

    def step(query, caches, key, value, table):
        return fastattn.attention_with_kv_cache(query, *caches, key, value, cache_seqlens=lengths, block_table=table)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    expected = step(first.query, first.caches.unbind(), *first.fresh, first.table)
    actual = compiled(second.query, second.caches.unbind(), *second.fresh, second.table)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(second.caches, first.caches, equal_nan=True)


@pytest.mark.skipif("cpu" not in KERNEL_BACKENDS, reason="the extension was not built")
@pytest.mark.parametrize("block_size", [None, 8], ids=["contiguous", "paged"])
def test_the_op_obeys_the_rules_of_custom_ops(block_size):
    problem = Problem(torch.float32, lengths=(5, 0, 20), block_size=block_size)
    caches = problem.caches.nan_to_num().unbind()
    torch.library.opcheck(
        torch.ops.fastattn.attention_with_kv_cache.default,
        (problem.query, *caches, *problem.fresh, torch.tensor([5, 0, 20]), 0, problem.table, None, None, False, None,
         None, True, 0.25, -1, -1, 0.0),
    )  # fmt: skip


def test_opcheck():
    table = torch.tensor([[0, 1], [2, 3]], dtype=torch.int32)
    for block_table in (None, table):
        torch.library.opcheck(
            torch.ops.fastattn.kv_cache_positions, (torch.tensor([3, 5]), block_table, 1, 1, 8, 4, 4, -1)
        )


_ROTARY = torch.zeros(20, 8)
BAD_INPUTS = [
    ({"cache_seqlens": 46}, ValueError, "cache_seqlens 46 and 3 new tokens exceed the cache, which holds 48"),
    ({"cache_seqlens": torch.tensor([0, 46, 1])}, ValueError, "cache_seqlens 46 and 3 new tokens exceed the cache"),
    ({"cache_seqlens": -1}, ValueError, "cache_seqlens must be >= 0, got -1"),
    ({"cache_seqlens": torch.tensor([0, -2, 1])}, ValueError, "cache_seqlens must be >= 0, got -2"),
    ({"cache_seqlens": torch.tensor([1, 2])}, ValueError, r"cache_seqlens must be an int or \(batch,\) = \(3,\), got"),
    ({"cache_seqlens": torch.ones(3)}, TypeError, "cache_seqlens must be an int32 or int64 Tensor, got float32"),
    ({"cache_seqlens": 2**70}, ValueError, "cache_seqlens must be below 2\\^63"),
    ({"cache_seqlens": 1.0}, TypeError, "cache_seqlens must be an int or a Tensor, got float"),
    ({"rotary_cos": _ROTARY, "rotary_sin": _ROTARY, "cache_seqlens": 18}, ValueError,
     "rotary_cos has 20 positions, but 21 are needed"),
    ({"rotary_cos": _ROTARY}, TypeError, "rotary_cos and rotary_sin must be Tensors and be given together"),
    ({"rotary_cos": torch.zeros(20, 9), "rotary_sin": torch.zeros(20, 9)}, ValueError, "rotary_dim <= head_dim 16"),
    ({"key": None}, TypeError, "key and value must be given together, or neither; key is NoneType"),
    ({"key": torch.zeros(3, 3, 2, 16).half()}, TypeError, "key must be float32 on cpu, like its cache, got float16"),
    ({"key": torch.zeros(2, 3, 2, 16)}, ValueError, r"key must be .* = \(3, seqlen_new, 2, 16\), got shape \(2, 3"),
    ({"key": torch.zeros(3, 2, 2, 16)}, ValueError, "key has 2 new tokens but value has 3"),
    ({"query": torch.zeros(2, 3, 4, 16)}, ValueError, "query has batch 2 but key_cache has 3"),
    ({"query": torch.zeros(3, 3, 3, 16)}, ValueError, "query has 3 heads, which is not a multiple of the 2"),
    ({"query": torch.zeros(3, 3, 4, 16, requires_grad=True)}, NotImplementedError, "it has no gradients"),
    ({"sinks": torch.zeros(4, requires_grad=True)}, NotImplementedError, "it has no gradients"),
    ({"alibi_slopes": torch.zeros(4, requires_grad=True)}, NotImplementedError, "it has no gradients"),
    ({"rotary_cos": _ROTARY, "rotary_sin": _ROTARY.clone().requires_grad_()}, NotImplementedError, "has no gradients"),
    ({"value_cache": torch.zeros(3, 40, 2, 16)}, ValueError, "must agree in their first two dims"),
    ({"block_table": torch.zeros(2, 4, dtype=torch.int32)}, ValueError, "block_table must be .* with batch 3"),
    ({"block_table": torch.zeros(3, 4)}, TypeError, "block_table must be an int32 or int64 Tensor"),
    ({"block_table": torch.tensor([[0], [1], [3]])}, ValueError, r"block_table\[2, 0\] is 3, but key_cache has"),
    ({"block_table": torch.tensor([[0], [-1], [2]])}, ValueError, r"block_table\[1, 0\] is -1"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "error", "message"), BAD_INPUTS, ids=[case[2][:40] for case in BAD_INPUTS])
def test_rejects_and_writes_nothing(change, error, message):
    arguments = {
        "query": torch.zeros(3, 3, 4, 16), "key_cache": torch.zeros(3, 48, 2, 16),
        "value_cache": torch.zeros(3, 48, 2, 16), "key": torch.ones(3, 3, 2, 16), "value": torch.ones(3, 3, 2, 16),
        "cache_seqlens": 5,
    } | change  # fmt: skip
    with pytest.raises(error, match=f"attention_with_kv_cache: .*{message}"):
        fastattn.attention_with_kv_cache(**arguments)
    assert not arguments["key_cache"].any() and not arguments["value_cache"].any()


def test_explain_writes_nothing():
    problem = Problem(torch.float32)
    before = problem.caches.clone()
    text = fastattn.explain(
        fastattn.attention_with_kv_cache, problem.query, *problem.caches, *problem.fresh, cache_seqlens=5
    )
    assert text.startswith("attention_with_kv_cache: ")
    torch.testing.assert_close(problem.caches, before, equal_nan=True)


def step_of(heads: int = 4, heads_kv: int = 2, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """A decoding step's query, caches of 12 tokens, key and value, on the CPU."""
    caches = torch.randn(2, 2, 12, heads_kv, 16, device="cpu", dtype=dtype)
    caches[:, :, 7:] = float("nan")
    query, *new = (torch.randn(2, 1, n, 16, device="cpu", dtype=dtype) for n in (heads, heads_kv, heads_kv))
    return [query, *caches, *new]


@pytest.mark.skipif("cpu" not in KERNEL_BACKENDS, reason="the extension was not built")
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("heads_kv", [1, 2, 4])
def test_one_token_s_short_way_is_the_long_way(heads_kv, dtype, monkeypatch):
    short = step_of(heads_kv=heads_kv, dtype=dtype)
    long = [tensor.clone() for tensor in short]
    # A window as wide as the cache changes nothing but the way.
    expected = fastattn.attention_with_kv_cache(*long, cache_seqlens=7, window=(12, 0), scale=0.3)
    monkeypatch.setattr(attention_with_kv_cache, "_prepare", None)
    actual = fastattn.attention_with_kv_cache(*short, cache_seqlens=7, scale=0.3)
    assert actual.shape == (2, 1, 4, 16) and torch.equal(actual, expected)
    for mine, theirs in zip(short, long, strict=True):
        assert torch.equal(mine.nan_to_num(9.0), theirs.nan_to_num(9.0))


@pytest.mark.parametrize("change, error", [
    ({"cache_seqlens": 12}, ValueError), ({"cache_seqlens": -1}, ValueError), ({"scale": "wide"}, TypeError),
    ({0: torch.randn(2, 1, 3, 16)}, ValueError), ({3: torch.randn(2, 1, 2, 8)}, ValueError),
    ({4: torch.randn(2, 1, 2, 16).double()}, TypeError), ({3: torch.randn(3, 1, 2, 16)}, ValueError),
    ({3: torch.randn(2, 1, 2, 16, requires_grad=True)}, NotImplementedError),
])  # fmt: skip
def test_one_token_s_mistakes_write_nothing(change, error):
    arguments, options = step_of(), {"cache_seqlens": 7}
    for key, value in change.items():
        if isinstance(key, int):
            arguments[key] = value.to("cpu")
        else:
            options[key] = value
    before = [tensor.detach().clone() for tensor in arguments]
    with pytest.raises(error):
        fastattn.attention_with_kv_cache(*arguments, **options)
    for mine, theirs in zip(arguments, before, strict=True):
        assert torch.equal(mine.detach().nan_to_num(9.0), theirs.nan_to_num(9.0))


@pytest.mark.parametrize("backend", ["eager", "cpu"])
def test_one_token_goes_where_the_preference_says(backend, monkeypatch):
    if fastattn.available_backends()[backend] is not None:
        pytest.skip(fastattn.available_backends()[backend])
    taken = []
    original = attention_with_kv_cache.one_token_if_plain
    monkeypatch.setattr(attention_with_kv_cache, "one_token_if_plain", lambda *call: taken.append(1) or original(*call))
    with fastattn.use_backend(backend):
        fastattn.attention_with_kv_cache(*step_of(), cache_seqlens=7)
    assert len(taken) == (backend == "cpu")
