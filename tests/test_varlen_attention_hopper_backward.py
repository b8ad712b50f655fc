"""Packed sequences in Hopper's backward kernels, emulated: whose rows a tile has, and what lies next to a sequence."""

from __future__ import annotations

import heapq
import itertools

import pytest
import torch
from accuracy import allowed_error, assert_as_accurate_as_eager, max_error
from emulated import MODES, AsyncMode, Mode, Schedule, emulated_library, hopper
from test_varlen_attention import OPTIONS, check, cu_seqlens, packed
from test_varlen_attention_hopper import LENGTHS_K, LENGTHS_Q, WRONG, each_harsh_mode, operands_in_turn, operands_of

import fastattn
from fastattn._extension import extension

pytestmark = [
    pytest.mark.skipif(
        fastattn.available_backends()["emulated"] is not None, reason=str(fastattn.available_backends()["emulated"])
    ),
    pytest.mark.usefixtures("plain_mode_afterwards"),
]
NAN = float("nan")
NAMES = ("out", "lse", "dq", "dk", "dv")


@pytest.fixture(autouse=True)
def any_order_afterwards():
    yield
    torch.use_deterministic_algorithms(False)


@each_harsh_mode
@pytest.mark.parametrize("options", OPTIONS)
def test_options_under_harsh_schedules(options, mode):
    hopper(mode)
    operands = operands_in_turn(options, mode)
    check(operands, LENGTHS_Q, LENGTHS_K, "emulated", **OPTIONS[options])


@pytest.mark.parametrize("dims", [(64, 64), (40, 64), (96, 88), (72, 128), (192, 128), (256, 256)], ids=str)
@pytest.mark.parametrize("options", ["plain", "softcap_scale"])
def test_every_tile(options, dims):
    hopper(MODES[1 + sum(dims) // 8 % 3])
    lengths_q, lengths_k = (70, 3, 130), (140, 66, 20)
    operands = operands_of(lengths_q, lengths_k, dims[0], torch.float16, 2, 1, head_dim_v=dims[1])
    check(operands, lengths_q, lengths_k, "emulated", **OPTIONS[options])


def gradients(operands, lengths, spoilt=(), **options):
    """out, lse and gradients; sequences `spoilt` and the rows behind the last are NaN in all that a kernel reads."""
    leaves = [operand.clone() for operand in operands]
    cu = lengths[:2]
    torch.manual_seed(3)
    dout = torch.randn(len(operands[0]), operands[0].shape[1], operands[2].shape[2]).to(operands[0].dtype)
    dlse = torch.randn(dout.shape[1], dout.shape[0])
    for tensor, starts in zip((*leaves, dout, dlse.T), (cu[0], cu[1], cu[1], cu[0], cu[0]), strict=True):
        for b in spoilt:
            tensor[starts[b] : starts[b + 1]] = NAN
        if spoilt:
            tensor[starts[-1] :] = NAN
    leaves = [leaf.requires_grad_() for leaf in leaves]
    out, lse = fastattn.varlen_attention(*leaves, *lengths, return_lse=True, backend="emulated", **options)
    return out.detach(), lse.detach().T, *torch.autograd.grad((out, lse), leaves, (dout, dlse))


@pytest.mark.parametrize("head_dim", [64, 96, 128, 192, 256])
@pytest.mark.parametrize("options", ["plain", "alibi_causal_top_left"])
def test_what_lies_next_to_a_sequence_does_not_reach_it(options, head_dim):
    """NaN in the sequences between, and in the rows behind the last, change no bit, nor are such rows written: of the
    former all gradients are NaN, of the latter 0."""
    hopper(MODES[1 + (head_dim // 32 + len(options)) % 3])
    torch.use_deterministic_algorithms(True)
    lengths_q, lengths_k = (70, 9, 50, 1, 65), (65, 40, 1, 63, 129)
    operands = operands_of((*lengths_q, 9), (*lengths_k, 9), head_dim, torch.float16)
    lengths = cu_seqlens(lengths_q), cu_seqlens(lengths_k), 70, 129
    clean = gradients(operands, lengths, **OPTIONS[options])
    spoilt = gradients(operands, lengths, (1, 3), **OPTIONS[options])
    for name, x, y in zip(NAMES, clean, spoilt, strict=True):
        starts = lengths[name in ("dk", "dv")].tolist()
        for b in range(5):
            rows = slice(starts[b], starts[b + 1])
            if b not in (1, 3):
                assert torch.equal(x[rows], y[rows]), (name, b)
            elif options == "plain":  # all keys are seen
                assert y[rows].isnan().all(), (name, b)
        assert torch.equal(y[starts[-1] :], torch.full_like(y[starts[-1] :], -torch.inf if name == "lse" else 0.0))


@pytest.mark.parametrize("mode", MODES[1:2], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128, 192])
def test_dropout_is_that_of_each_entry(head_dim, mode):
    hopper(mode)
    lengths_q, lengths_k = (70, 20), (40, 129)
    operands, results = operands_of(lengths_q, lengths_k, head_dim, torch.bfloat16), []
    for backend, wide in (("emulated", False), ("eager", False), ("eager", True)):
        leaves = [(x.double() if wide else x).requires_grad_() for x in operands]
        torch.manual_seed(9)
        out = fastattn.varlen_attention(
            *leaves, cu_seqlens(lengths_q), cu_seqlens(lengths_k), 70, 129, dropout_p=0.3, backend=backend
        )
        results.append(torch.autograd.grad(out, leaves, torch.ones_like(out)))
    for name, *each in zip(NAMES[2:], *results, strict=True):
        assert_as_accurate_as_eager(*each, name, terms=1.0)


@pytest.mark.parametrize("is_ordered", [False, True])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 192])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_gradient_of_sinks_in_float32(dropout_p, head_dim, is_ordered):
    """As exact as eager's, though `out` has 11 bits: by the sums of rows that lie beside each sequence's sums of dq."""
    hopper(MODES[1 + (head_dim // 32 + is_ordered) % 3])
    torch.use_deterministic_algorithms(is_ordered)
    lengths_q, lengths_k = (70, 3, 130, 1), (140, 66, 300, 20)
    operands, results = operands_of(lengths_q, lengths_k, head_dim, torch.float16, 2, 1), []
    torch.manual_seed(8)
    sinks, dout = torch.randn(2), torch.randn(sum(lengths_q), 2, head_dim)
    for backend, dtype in (("emulated", torch.float16), ("eager", torch.float16), ("eager", torch.float64)):
        leaf = sinks.to(torch.promote_types(dtype, torch.float32)).requires_grad_()
        torch.manual_seed(9)
        out = fastattn.varlen_attention(
            *(x.to(dtype) for x in operands), cu_seqlens(lengths_q), cu_seqlens(lengths_k), 130, 300,
            is_causal=True, sinks=leaf, dropout_p=dropout_p, backend=backend,
        )  # fmt: skip
        results.extend(torch.autograd.grad(out, leaf, dout.half().to(dtype)))
    actual, eager, reference = results
    # Some sums of few cancelling terms are by chance more exact in eager.
    assert max_error(actual, reference) <= 4 * allowed_error(eager, reference)


# Sequences of one to six blocks of keys, of which the diagonal gives each other queries.
ORDERED = {
    "plain_64": (64, {}),
    "causal_128": (128, {"is_causal": True}),
    "window_96": (96, {"window": (140, 60)}),
    "causal_192": (192, {"is_causal": True, "alignment": "top_left"}),
}


@pytest.mark.parametrize("name", ORDERED)
def test_a_fixed_order_on_request(name):
    """Turns are counted for each sequence's row tiles."""
    head_dim, options = ORDERED[name]
    lengths_q, lengths_k = (150, 0, 70, 9), (400, 30, 0, 200)
    operands = operands_of(lengths_q, lengths_k, head_dim, torch.float16, 2, 1)
    torch.use_deterministic_algorithms(True)
    results = []
    for mode in (
        Mode(),
        Mode(Schedule.PRIORITY, AsyncMode.LAZY, seed=11, os_threads=2),
        Mode(Schedule.UNIFORM, AsyncMode.RANDOM, seed=12, os_threads=3),
    ):
        hopper(mode, 4)
        results.append(packed(operands, lengths_q, lengths_k, "emulated", **options))
    assert all(map(torch.equal, results[0], results[1])) and all(map(torch.equal, results[0], results[2]))


@pytest.mark.parametrize("head_dim", [64, 256])
def test_blocks_that_share_queries(head_dim):
    """Their sums, one more launch, lie where each sequence has room for the longest."""
    lengths_q, lengths_k = (140, 0, 3, 70), (40, 9, 0, 150)
    operands, launches = operands_of(lengths_q, lengths_k, head_dim, torch.bfloat16, 8, 1), []
    for multiprocessors in (1, 40):
        hopper(MODES[1], multiprocessors)
        before = extension.emulated_launches()
        check(operands, lengths_q, lengths_k, "emulated", is_causal=True)
        launches.append(extension.emulated_launches() - before)
    assert launches[1] == launches[0] + 1


def listed_tiles(lengths_q, lengths_k, heads_kv, section):
    """(sequence, key head, first key, keys) in the order in which blocks take them; `section` heads at a time."""
    cu_q, cu_k, most = cu_seqlens(lengths_q), cu_seqlens(lengths_k), 1 << 15
    workspace, places = torch.full((2 + 2 * len(lengths_q),), -1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    keys = torch.zeros(most, 4, dtype=torch.int32)
    emulated_library().call(
        "attention_bwd_order", cu_q, cu_k, len(lengths_q), sum(lengths_q), sum(lengths_k), max(lengths_q),
        max(lengths_k), heads_kv, section, most, workspace, places, keys
    )  # fmt: skip
    assert places <= most
    return [tuple(row) for row in keys[:places].tolist()]


def busiest_against_mean(costs, blocks=132):
    """Each block takes the next tile when it has done with its last."""
    busy = [0] * blocks
    for cost in costs:
        heapq.heapreplace(busy, busy[0] + cost)
    return max(busy) / (sum(busy) / blocks)


DISTRIBUTIONS = {
    "one long, last": [*[64] * 300, 16384],
    "even": [1024] * 16,
    "a few long": [4000, *[100] * 200, 3000, *[500] * 40, 8000],
    "rising": list(range(10, 2000, 23)),
    "with empty ones": [0, 700, 0, 0, 129, 128, 127, 0, 3000, 1],
}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_no_block_is_idle_and_long_sequences_come_first(name, causal):
    """Of 132 multiprocessors and 8 key heads. A grid of the longest sequence's length has up to 300 000 idle blocks,
    and in its order the busiest multiprocessor up to 1.66 times the mean."""
    lengths, heads = DISTRIBUTIONS[name], 8
    hopper(MODES[1])
    tiles = listed_tiles(lengths, lengths, heads, heads)
    wanted = [(b, h, k, min(128, n - k)) for b, n in enumerate(lengths) for h in range(heads) for k in range(0, n, 128)]
    assert sorted(tiles) == wanted, "each tile once, and none without keys"
    assert sorted(listed_tiles(lengths, lengths, heads, 3)) == wanted
    queries = [lengths[b] for b, *_ in tiles]
    assert all(after <= before * 9 / 8 + 1 for before, after in itertools.pairwise(queries)), "by eighths"
    costs = [lengths[b] - first * causal for b, _, first, _ in tiles]
    # Of 132 n + 1 tiles, one block has n + 1.
    longest = sorted(costs, reverse=True)[::132]
    at_best = max(1, *((n + 1) * cost * 132 / sum(costs) for n, cost in enumerate(longest)))
    assert busiest_against_mean(costs) <= 1.1 * at_best
    if name != "even":
        assert len(tiles) < len(lengths) * heads * -(-max(lengths) // 128)


def test_every_block_takes_tiles():
    """Also with more sequences than the list has threads, and whatever the number of blocks; each call starts anew."""
    lengths = [(37 * b) % 150 if b % 3 else 1 for b in range(300)]
    operands, results = operands_of(lengths, lengths, 64, torch.bfloat16, 1, 1), []
    torch.use_deterministic_algorithms(True)
    for mode, multiprocessors in ((Mode(), 1), (MODES[1], 7), (MODES[2], 500)):
        hopper(mode, multiprocessors)
        results.append(packed(operands, lengths, lengths, "emulated", is_causal=True))
    assert all(map(torch.equal, results[0], results[1])) and all(map(torch.equal, results[0], results[2]))
    check(operands, lengths, lengths, "emulated", is_causal=True)


# The second and the last have rows and statistics in common; so do their turns.
OVERLAPPING = {"overlap": ([0, 130, 290, 0, 150], 160)}


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("wrong", [*WRONG, *OVERLAPPING])
def test_wrong_lengths_stay_inside_the_tensors(wrong, deterministic):
    """A GPU cannot look at them first. What lies before and behind the operands is NaN."""
    Mode().apply(compute_capability=90, multiprocessors=1, checks_values=False)
    torch.use_deterministic_algorithms(deterministic)
    cu, longest = (WRONG | OVERLAPPING)[wrong]
    cu = torch.tensor(cu, dtype=torch.int32)
    whole = operands_of((300,), (300,), 64, torch.float16)
    whole = [torch.cat((x[:9] * NAN, x, x[:9] * NAN))[9:-9].requires_grad_() for x in whole]
    out, lse = fastattn.varlen_attention(*whole, cu, cu, longest, longest, return_lse=True, backend="emulated")
    for gradient in torch.autograd.grad((out, lse), whole, (out.detach(), torch.zeros_like(lse))):
        assert gradient.isfinite().all()


def runs_as_on_sm80(head_dim, dout) -> bool:
    """Whether the gradients' bits are those of another card; out, whose short rows stay with 8.0's kernel, has them."""
    cu, leaves, results = cu_seqlens((60, 20)), operands_of((60, 20), (60, 20), head_dim, torch.float16, 4, 4), []
    for compute_capability in (80, 90):
        Mode().apply(compute_capability=compute_capability, multiprocessors=1)
        leaves = [leaf.requires_grad_() for leaf in leaves]
        out = fastattn.varlen_attention(*leaves, cu, cu, 60, 60, backend="emulated")
        results.append((out, *torch.autograd.grad(out, leaves, dout[..., :head_dim])))
    same_out, *same = map(torch.equal, *results)
    assert same_out
    return all(same)


@pytest.mark.parametrize("head_dim", [40, 128, 200])
def test_which_calls_the_kernels_serve(head_dim):
    dout = torch.randn(80, 4, 200, dtype=torch.float16)
    assert not runs_as_on_sm80(head_dim, dout)
    assert runs_as_on_sm80(head_dim, dout[:, :1].expand_as(dout)), "TMA takes no heads that coincide"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_slices_of_one_packed_tensor(dtype):
    hopper(MODES[1])
    lengths = (70, 1, 129)
    torch.manual_seed(1)
    qkv = torch.randn(200, 3, 2, 64).to(dtype)
    check([*qkv.unbind(1)], lengths, lengths, "emulated", is_causal=True)
