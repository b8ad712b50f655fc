"""Long prompts of ``attention_with_kv_cache`` in Hopper's forward kernel, emulated: keys that TMA fetches from blocks
of the cache, and lengths that only the device knows."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from emulated import MODES, Mode, hopper
from kv_cache_cases import NAN, Problem

import fastattn

pytestmark = [
    pytest.mark.skipif(
        fastattn.available_backends()["emulated"] is not None, reason=str(fastattn.available_backends()["emulated"])
    ),
    pytest.mark.usefixtures("plain_mode_afterwards"),
]
OWN, OF_SM80 = "emulated  would run Hopper's own kernel", "emulated  would run the kernels of compute capability 8.0: "
OPTIONS = {
    "causal": {},
    "not_causal": {"is_causal": False},
    "window": {"window": (70, 0)},
    "softcap_scale": {"softcap": 1.5, "scale": -0.5},
    "alibi": {"alibi_slopes": torch.tensor([0.1, 0.2, 0.4, 0.8])},
    "sinks": {"sinks": torch.tensor([0.5, -1.0, 2.0, 0.0])},
}
# Against tiles of 128 and 64 keys: one piece, blocks that divide a tile, that it divides, that do neither, and that are
# a swizzle's pattern.
BLOCK_SIZES = [None, 16, 64, 128, 256, 48, 8]
each_harsh_mode = pytest.mark.parametrize("mode", MODES[1:], ids=str)


def explained(problem, lengths, **options) -> str:
    key, value = problem.fresh if problem.new else (None, None)
    return fastattn.explain(
        fastattn.attention_with_kv_cache, problem.query, *problem.caches, key, value, cache_seqlens=lengths,
        block_table=problem.table, backend="emulated", **options
    )  # fmt: skip


def check(problem, **options):
    """Against eager, one sequence at a time; what the cache holds behind a sequence's end is NaN."""
    lengths = torch.tensor(problem.lengths, dtype=torch.int32)
    assert OWN in explained(problem, lengths, **options)
    problem.check("emulated", lengths, **options)


@each_harsh_mode
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("options", OPTIONS)
def test_options_under_harsh_schedules(options, block_size, mode):
    """A sequence that ends with a tile, one without history, and one that ends inside a box."""
    hopper(mode)
    turn = list(OPTIONS).index(options) + BLOCK_SIZES.index(block_size) + mode.seed
    head_dim, dtype = (64, 128)[turn % 2], (torch.float16, torch.bfloat16)[turn // 2 % 2]
    problem = Problem(dtype, (186, 0, 131), 70, 70, block_size, head_dim=head_dim, capacity=768)
    check(problem, **OPTIONS[options])


@pytest.mark.parametrize("block_size", [None, 16, 96])
@pytest.mark.parametrize("head_dim", [16, 40, 64, 96, 128, 192, 256])
@pytest.mark.parametrize("options", ["causal", "softcap_scale"])
def test_every_tile(options, head_dim, block_size):
    """Those of 64 have a kernel for up to 128 rows, and one for more."""
    hopper(MODES[1 + head_dim // 8 % 3])
    for new in (70, 130) if head_dim <= 64 else (70,):
        check(Problem(torch.float16, (5, 40, 100), new, new, block_size, 2, head_dim, 288), **OPTIONS[options])


@each_harsh_mode
@pytest.mark.parametrize("block_size", [None, 32])
@pytest.mark.parametrize("options", ["causal", "sinks", "alibi"])
def test_packed_heads(options, block_size, mode):
    hopper(mode)
    check(Problem(torch.bfloat16, (186, 0, 131), 20, 20, block_size, 1, 64, 768), **OPTIONS[options])


@each_harsh_mode
@pytest.mark.parametrize("block_size", [None, 16])
def test_queries_without_keys(block_size, mode):
    """More queries than keys: the first see none."""
    hopper(mode)
    check(Problem(torch.float16, (5, 0, 100), 0, 150, block_size, head_dim=64, capacity=128))


def test_one_length_of_all_sequences():
    hopper(MODES[1])
    problem = Problem(torch.bfloat16, (70,) * 3, 66, 66, 16, head_dim=64, capacity=144)
    assert OWN in explained(problem, 70)
    problem.check("emulated", 70)


def test_value_head_dim_differs():
    hopper(MODES[2])
    problem = Problem(torch.float16, (5, 0, 100), 70, 70, 16, head_dim=128, capacity=192)
    value_cache, lengths = problem.caches[1, ..., :72].contiguous(), torch.tensor(problem.lengths)
    out = fastattn.attention_with_kv_cache(
        problem.query, problem.caches[0], value_cache, problem.fresh[0], problem.fresh[1, ..., :72],
        cache_seqlens=lengths, block_table=problem.table, backend="emulated",
    )  # fmt: skip
    torch.testing.assert_close(out, problem.expected(True)[0][..., :72].half(), atol=2e-3, rtol=2e-3)


def test_blocks_places_schedules_and_seeds_change_no_bit():
    """Each row tile of each sequence is computed once, by whichever block, wherever its keys lie."""
    results = []
    for seed, (multiprocessors, block_size) in enumerate(((1, None), (2, 16), (5, 128), (140, 48))):
        mode = dataclasses.replace(MODES[seed % 4], seed=10 + seed)
        hopper(mode, min(multiprocessors, 12))
        problem = Problem(torch.bfloat16, (186, 0, 131), 70, 70, None, head_dim=64, capacity=384)
        paged = Problem(torch.bfloat16, (186, 0, 131), 70, 70, block_size, head_dim=64, capacity=384)
        paged.query, paged.fresh = problem.query, problem.fresh
        for b, history in enumerate(problem.history):
            for t in range(problem.lengths[b]):
                paged.caches[(slice(None), *paged.place(b, t))] = history[:, t]
        results.append(fastattn.attention_with_kv_cache(
            paged.query, *paged.caches, *paged.fresh, cache_seqlens=torch.tensor(paged.lengths),
            block_table=paged.table, return_lse=True, backend="emulated",
        ))  # fmt: skip
    for out, lse in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(lse, results[0][1])


@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
@pytest.mark.parametrize("mode", MODES[:2], ids=str)
def test_lengths_and_tables_that_nobody_checked_stay_inside_the_cache(mode, kind):
    """As on a device: they are clipped. The table's last column would lie behind its memory, were a tile read whole."""
    mode.apply(compute_capability=90, multiprocessors=1, checks_values=False)
    lengths, table = [10**6, -5, 20], [[1, 2, 3, 4, 5, 6], [-3, 7, 8, 9, 10, 11], [12, 10**6, 13, 14, 15, -1]]
    query, new = torch.randn(3, 70, 4, 64).bfloat16(), torch.randn(2, 3, 70, 2, 64).bfloat16()
    whole = torch.randn(2, 20, 16, 2, 64).bfloat16()
    whole[:, :2] = whole[:, -2:] = NAN
    caches = whole[:, 2:-2]
    expected_caches = caches.clone()
    arguments = {"block_table": torch.tensor(table, dtype=kind), "return_lse": True}
    results = [
        fastattn.attention_with_kv_cache(
            query, *each, *new, cache_seqlens=torch.tensor(lengths, dtype=kind), backend="emulated", **arguments
        )
        for each in (caches, expected_caches)
    ]
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))
    arguments["block_table"] = torch.tensor(table).clamp(0, 15)
    expected = fastattn.attention_with_kv_cache(
        query, *expected_caches, cache_seqlens=torch.tensor([96, 70, 90]), backend="eager", **arguments
    )
    for actual, exact in zip(results[1], expected, strict=True):
        torch.testing.assert_close(actual, exact, atol=2e-2, rtol=2e-2)


# ---- which kernels a call runs


def why_not(problem, lengths=None, multiprocessors=1, **options) -> str:
    """The reason that explain gives for the kernels of 8.0."""
    hopper(multiprocessors=multiprocessors)
    lengths = torch.tensor(problem.lengths) if lengths is None else lengths
    text = explained(problem, lengths, **options)
    assert OF_SM80 in text, text
    return text.split(OF_SM80)[1].splitlines()[0]


def test_explain_says_why_the_kernels_of_80_run():
    prompt = {"lengths": (5, 0, 40), "new": 70, "seqlen_q": 70, "head_dim": 64, "capacity": 144}
    assert "no more than 64 rows" in why_not(Problem(torch.float16, **prompt | {"new": 16, "seqlen_q": 16}))
    assert "block_size is not a multiple of 8" in why_not(Problem(torch.float16, block_size=12, **prompt))
    assert "TMA cannot address" in why_not(Problem(torch.float16, **prompt | {"head_dim": 20}))
    assert "too few to fill the card" in why_not(Problem(torch.float16, **prompt | {"capacity": 768}), None, 132)
    long_prompt = Problem(torch.float16, **prompt)
    assert "no more than 64 rows" in why_not(Problem(torch.float16, (70,) * 3, 5, 5, head_dim=64, capacity=80), 70)
    hopper()
    assert OWN in explained(long_prompt, torch.tensor(long_prompt.lengths))
    assert OWN in explained(Problem(torch.float16, (70,) * 3, 70, 70, head_dim=64, capacity=144), 70)
    Mode().apply(compute_capability=80)
    assert "emulated  would run, but only when asked for by name" in explained(long_prompt, torch.tensor([5, 0, 40]))


def test_explain_writes_nothing():
    hopper()
    problem = Problem(torch.float16, (5, 0, 40), 70, 70, 16, head_dim=64, capacity=144)
    before = problem.caches.clone()
    angles = torch.rand(200, 32)
    assert OWN in explained(problem, torch.tensor(problem.lengths), rotary_cos=angles.cos(), rotary_sin=angles.sin())
    torch.testing.assert_close(problem.caches, before, equal_nan=True, atol=0, rtol=0)
