"""Packed sequences in Hopper's forward kernel, emulated: whose rows a tile has, and what lies next to a sequence."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from accuracy import assert_as_accurate_as_eager
from attention_cases import dtype_id
from emulated import MODES, Mode, hopper
from test_varlen_attention import OPTIONS, cu_seqlens, one_by_one

import fastattn

pytestmark = [
    pytest.mark.skipif(
        fastattn.available_backends()["emulated"] is not None, reason=str(fastattn.available_backends()["emulated"])
    ),
    pytest.mark.usefixtures("plain_mode_afterwards"),
]
NAN = float("nan")
# Around tiles of 64 rows and of 128 keys; sequences without queries, without keys, and of one token.
LENGTHS_Q, LENGTHS_K = (65, 0, 1, 129, 63, 20), (129, 30, 65, 128, 0, 1)
each_harsh_mode = pytest.mark.parametrize("mode", MODES[1:], ids=str)


def operands_of(lengths_q, lengths_k, head_dim, dtype, heads=4, heads_kv=2, head_dim_v=None):
    torch.manual_seed(1)
    total_q, total_k = sum(lengths_q), sum(lengths_k)
    shapes = (total_q, heads, head_dim), (total_k, heads_kv, head_dim), (total_k, heads_kv, head_dim_v or head_dim)
    return [torch.randn(shape).to(dtype) for shape in shapes]


def operands_in_turn(options, mode):
    """Of LENGTHS_Q and LENGTHS_K; head dims and dtypes take turns with options and modes."""
    turn = list(OPTIONS).index(options) + mode.seed
    head_dim, dtype = (64, 96, 128, 192, 256)[turn % 5], (torch.float16, torch.bfloat16)[turn % 2]
    return operands_of(LENGTHS_Q, LENGTHS_K, head_dim, dtype)


def forward(operands, cu_q, cu_k, longest_q, longest_k, **options):
    return fastattn.varlen_attention(
        *operands, cu_q, cu_k, longest_q, longest_k, return_lse=True, backend="emulated", **options
    )


def check_forward(operands, lengths_q, lengths_k, **options):
    """out and lse against one call of eager attention for each sequence."""
    actual = forward(operands, cu_seqlens(lengths_q), cu_seqlens(lengths_k), max(lengths_q), max(lengths_k), **options)
    eager = one_by_one(operands, lengths_q, lengths_k, **options)
    reference = one_by_one([operand.double() for operand in operands], lengths_q, lengths_k, **options)
    for name, *results in zip(("out", "lse"), actual, eager, reference, strict=False):
        assert_as_accurate_as_eager(*results, name)
    return actual


@each_harsh_mode
@pytest.mark.parametrize("options", OPTIONS)
def test_options_under_harsh_schedules(options, mode):
    hopper(mode)
    operands = operands_in_turn(options, mode)
    check_forward(operands, LENGTHS_Q, LENGTHS_K, **OPTIONS[options])


@pytest.mark.parametrize("dims", [(64, 64), (40, 64), (96, 88), (72, 128), (192, 128), (256, 256)], ids=str)
@pytest.mark.parametrize("options", ["plain", "softcap_scale"])
def test_every_tile(options, dims):
    """Value head dims of their own; the last chunk of a row that threads store may be cut."""
    hopper(MODES[1 + sum(dims) // 8 % 3])
    lengths_q, lengths_k = (70, 3, 200), (300, 66, 20)
    operands = operands_of(lengths_q, lengths_k, dims[0], torch.float16, 2, 1, head_dim_v=dims[1])
    check_forward(operands, lengths_q, lengths_k, **OPTIONS[options])


@each_harsh_mode
@pytest.mark.parametrize("head_dim", [64, 96, 256])
@pytest.mark.parametrize("options", ["plain", "alibi_causal_top_left"])
def test_what_lies_next_to_a_sequence_does_not_reach_it(options, head_dim, mode):
    """NaN in the sequences between, and in the rows behind the last, change no bit, nor are such rows written: of the
    former all results are NaN, of the latter 0."""
    hopper(mode)
    lengths_q, lengths_k = (70, 9, 50, 1, 65), (65, 40, 1, 63, 129)
    operands = operands_of((*lengths_q, 9), (*lengths_k, 9), head_dim, torch.float16)
    lengths = cu_seqlens(lengths_q), cu_seqlens(lengths_k), 70, 129
    clean = forward(operands, *lengths, **OPTIONS[options])
    for operand, starts in zip(operands, (lengths[0], lengths[1], lengths[1]), strict=True):
        for b in (1, 3):
            operand[starts[b] : starts[b + 1]] = NAN
        operand[starts[-1] :] = NAN
    spoilt = forward(operands, *lengths, **OPTIONS[options])
    starts = lengths[0].tolist()
    for name, x, y in zip(("out", "lse"), clean, spoilt, strict=True):
        x, y = (x.T, y.T) if name == "lse" else (x, y)
        for b in range(5):
            rows = slice(starts[b], starts[b + 1])
            assert y[rows].isnan().all() if b in (1, 3) else torch.equal(x[rows], y[rows]), (name, b)
        assert torch.equal(y[starts[-1] :], torch.full_like(y[starts[-1] :], 0.0 if name == "out" else -torch.inf))


@pytest.mark.parametrize("mode", MODES[1:2], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_dropout_is_that_of_each_entry(head_dim, mode):
    hopper(mode)
    lengths_q, lengths_k = (70, 20), (40, 129)
    operands, results = operands_of(lengths_q, lengths_k, head_dim, torch.bfloat16), []
    for backend, wide in (("emulated", False), ("eager", False), ("eager", True)):
        torch.manual_seed(9)
        results.append(fastattn.varlen_attention(
            *(x.double() if wide else x for x in operands), cu_seqlens(lengths_q), cu_seqlens(lengths_k), 70, 129,
            dropout_p=0.3, backend=backend
        ))  # fmt: skip
    assert_as_accurate_as_eager(*results, "out")


@each_harsh_mode
@pytest.mark.parametrize("group", [2, 8, 32])
@pytest.mark.parametrize("options", ["plain", "causal", "sinks"])
def test_packed_heads(options, group, mode):
    """Heads that share k and v become rows of a tile, whose last warp may have some of a query's heads."""
    hopper(mode)
    lengths_q, lengths_k = (33, 0, 5, 3), (20, 66, 0, 129)
    head_dim, dtype = (64, 128)[mode.seed % 2], (torch.float16, torch.bfloat16)[mode.seed % 2]
    options = {name: value.repeat(group) if name == "sinks" else value for name, value in OPTIONS[options].items()}
    operands = operands_of(lengths_q, lengths_k, head_dim, dtype, heads=4 * group, heads_kv=4)
    check_forward(operands, lengths_q, lengths_k, **options)


@pytest.mark.parametrize("head_dim, dtype", [(64, torch.bfloat16), (64, torch.float16), (128, torch.float16)], ids=str)
def test_blocks_schedules_and_seeds_change_no_bit(head_dim, dtype):
    """Each row tile of each sequence is computed once, by whichever block, also past the first 32 sequences; most take
    less time than handing on a place."""
    lengths = tuple((7 * b) % 75 if b % 5 else 0 for b in range(70))
    operands = operands_of(lengths, lengths, head_dim, dtype, heads=2, heads_kv=2)
    hopper()
    expected = check_forward(operands, lengths, lengths, is_causal=True)
    for seed, multiprocessors in enumerate((2, 5, 140)):
        hopper(dataclasses.replace(MODES[1 + seed % 3], seed=10 + seed), multiprocessors)
        actual = forward(operands, *[cu_seqlens(lengths)] * 2, *[max(lengths)] * 2, is_causal=True)
        assert all(map(torch.equal, actual, expected)), multiprocessors


def test_the_counter_of_places_starts_anew(monkeypatch):
    """Whatever memory holds: of the usual poison, -1, all that came would be a place twice."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    lengths = (130, 70, 0, 200)
    operands = operands_of(lengths, lengths, 64, torch.float16)
    hopper()
    expected = check_forward(operands, lengths, lengths)
    for _ in range(3):
        freed = [torch.full((size,), 100, dtype=torch.uint8) for size in range(16, 1200, 16)]
        del freed
        actual = forward(operands, *[cu_seqlens(lengths)] * 2, *[max(lengths)] * 2)
        assert all(map(torch.equal, actual, expected))


WRONG = {
    "falls": ([0, 100, 40, 160], 150),
    "past the end": ([0, 20, 1 << 30, 160], 160),
    "negative": ([-70, -3, 100, 160], 160),
    "max_seqlen": ([0, 90, 150, 160], 70),
    "does not start with 0": ([30, 90, 95, 900], 100),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_lengths_stay_inside_the_tensors(wrong):
    """A GPU cannot look at them first. What lies before and behind the operands is NaN."""
    Mode().apply(compute_capability=90, multiprocessors=1, checks_values=False)
    cu, longest = torch.tensor(WRONG[wrong][0], dtype=torch.int32), WRONG[wrong][1]
    whole = operands_of((160,), (160,), 64, torch.float16)
    operands = [torch.cat((x[:9] * NAN, x, x[:9] * NAN))[9:-9] for x in whole]
    with fastattn._extension.extension.Emulation():
        out, lse = torch.ops.fastattn.varlen_attention(
            *operands, cu, cu, longest, longest, None, None, None, 0.0, True, 0.125, -1, -1, True, 0.0
        )
    assert out.isfinite().all() and not lse.isnan().any()


def runs_as_on_sm80(operands, lengths, **options) -> bool:
    """Whether the bits are those of another card, whose tiles have fewer keys."""
    results = []
    for compute_capability in (80, 90):
        Mode().apply(compute_capability=compute_capability, multiprocessors=1)
        results.append(forward(operands, *[cu_seqlens(lengths)] * 2, *[max(lengths)] * 2, **options)[0])
    return torch.equal(*results)


def test_which_calls_the_kernel_serves():
    lengths = (65, 200)
    operands = operands_of(lengths, lengths, 64, torch.float16)
    options = OPTIONS["softcap_scale"]
    assert not runs_as_on_sm80(operands, lengths, **options)
    assert not runs_as_on_sm80(operands_of(lengths, lengths, 256, torch.float16), lengths, **options)
    assert not runs_as_on_sm80([x[..., :33] for x in operands[:2]] + operands[2:], lengths, **options), "copied"
    assert runs_as_on_sm80(operands_of((60, 20), (60, 20), 64, torch.float16, 4, 4), (60, 20)), "half a tile is idle"
    assert runs_as_on_sm80([*operands[:2], operands[2][..., :33]], lengths, **options), "TMA cannot write such rows"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=dtype_id)
def test_slices_of_one_packed_tensor(dtype):
    hopper(MODES[1])
    lengths = (70, 1, 129)
    torch.manual_seed(1)
    qkv = torch.randn(200, 3, 2, 64).to(dtype)
    check_forward([*qkv.unbind(1)], lengths, lengths, is_causal=True)
