"""Attention divided among processes against attention of the whole sequence, in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.distributed as dist
from processes import run_processes

import fastattn
from fastattn.distributed import ring_attention, shard_sequence, ulysses_attention, unshard_sequence

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch.distributed has no gloo here"
)


def whole_and_parts(zigzag: bool, heads_kv: int):
    """(whole operands, this process' parts of them), leaves; every process draws the same."""
    torch.manual_seed(2)
    whole = [torch.randn(2, h, 24, d, dtype=torch.float64) for h, d in ((6, 8), (heads_kv, 8), (heads_kv, 5))]
    parts = [shard_sequence(x, zigzag=zigzag).requires_grad_() for x in whole]
    return [x.requires_grad_() for x in whole], parts


def assert_parts(actual, expected, zigzag):
    for part, whole in zip(actual, expected, strict=True):
        torch.testing.assert_close(part, shard_sequence(whole, zigzag=zigzag), rtol=1e-10, atol=1e-10)


def check(rank: int) -> None:
    for is_causal, zigzag, heads_kv in itertools.product((False, True), (False, True), (6, 3)):
        options = {"is_causal": is_causal, "enable_gqa": True, "scale": 0.4, "softcap": 3.0}
        whole, parts = whole_and_parts(zigzag, heads_kv)
        expected = fastattn.attention(*whole, **options, return_lse=True)
        douts = [torch.randn_like(x) for x in expected]
        expected_gradients = torch.autograd.grad(expected, whole, douts)

        actual = ring_attention(*parts, zigzag=zigzag, return_lse=True, **options)
        assert_parts(actual, expected, zigzag)
        mine = [shard_sequence(dout, zigzag=zigzag) for dout in douts]
        assert_parts(torch.autograd.grad(actual, parts, mine), expected_gradients, zigzag)

        if not zigzag:
            out = ulysses_attention(*parts, **options, window=(7, -1))
            expected_out = fastattn.attention(*whole, **options, window=(7, -1))
            assert_parts([out], [expected_out], False)
            gradients = torch.autograd.grad(out, parts, mine[0])
            assert_parts(gradients, torch.autograd.grad(expected_out, whole, douts[0]), False)

        part = parts[0]
        assert torch.equal(unshard_sequence(part, zigzag=zigzag), whole[0])
        (gradient,) = torch.autograd.grad(unshard_sequence(part, zigzag=zigzag).sum(), part)
        assert torch.equal(gradient, torch.full_like(part, 3.0))  # the losses of three processes

    positions = shard_sequence(torch.arange(12), 0)
    assert positions.tolist() == [[0, 1, 10, 11], [2, 3, 8, 9], [4, 5, 6, 7]][rank]
    with pytest.raises(ValueError, match="multiple of 6"):
        shard_sequence(torch.zeros(1, 1, 9, 1))
    with pytest.raises(ValueError, match=r"multiple of the 3 processes, got .*; use ring_attention\.$"):
        ulysses_attention(*(torch.zeros(1, 4, 2, 8) for _ in range(3)))
    with pytest.raises(ValueError, match=r"multiple of the 3 processes, got \(1, 4, 2, 8\)\.$"):
        ulysses_attention(*(torch.zeros(1, 4, 2, 8) for _ in range(3)), window=(1, 1))  # which the ring has not
    with pytest.raises(ValueError, match="even length"):
        ring_attention(*(torch.zeros(1, 4, 3, 8) for _ in range(3)))
    # One process objects alone: before its part is on its way, or the next exchange would get it.
    if rank == 0:
        with pytest.raises(ValueError, match="value"):
            ring_attention(torch.zeros(1, 4, 2, 8), torch.zeros(1, 4, 2, 8), torch.zeros(1, 4, 4, 8))
    assert unshard_sequence(torch.full((1, 1, 2, 1), rank)).flatten().unique().tolist() == [0, 1, 2]
    check_errors(rank)


def check_errors(rank: int) -> None:
    part = torch.zeros(1, 6, 4, 8)
    for operation in (ring_attention, ulysses_attention):
        name = operation.__name__
        with pytest.raises(TypeError, match=f"^{name}: query must be a Tensor"):
            operation(None, part, part)
        with pytest.raises(TypeError, match=f"^{name}: query is float32 but key float16"):
            operation(part, part.half(), part)
        with pytest.raises(ValueError, match=f"^{name}: query has 12 heads but key and value have 6; pass enable_gqa"):
            operation(torch.zeros(1, 12, 4, 8), part, part)
        with pytest.raises(ValueError, match=f"^{name}: key has seqlen 4 but value has seqlen 6"):
            operation(part, part, torch.zeros(1, 6, 6, 8))
        with pytest.raises(NotImplementedError, match=f"^{name}: backend 'triton' cannot run"):
            operation(part.double(), part.double(), part.double(), backend="triton")
        # Each process has another length: none may send, for what came would not fit.
        with pytest.raises(ValueError, match=f"^{name}: all processes must have parts of one shape"):
            operation(*(torch.zeros(1, 6, 4 + 2 * rank, 8) for _ in range(3)))
    for query, key in ((part[:, :1], part), (part, part.expand(2, -1, -1, -1))):
        with pytest.raises(ValueError, match=r"^ring_attention: query must have the batch and at least the heads of"):
            ring_attention(query, key, key)
    with pytest.raises(ValueError, match=r"^unshard_sequence: all processes must have parts of one shape"):
        unshard_sequence(torch.zeros(1, 1, 2 + 2 * rank, 1))
    with pytest.raises(ValueError, match=r"^unshard_sequence: with zigzag a part is two pieces of one length"):
        unshard_sequence(torch.zeros(1, 1, 3, 1))
    for operation in (shard_sequence, unshard_sequence):
        with pytest.raises(TypeError, match="x must be a Tensor, got list"):
            operation([1, 2])
        with pytest.raises(ValueError, match="dim must be one of x"):
            operation(torch.zeros(6, 6))
        with pytest.raises(TypeError, match=f"^{operation.__name__}: dim must be an int, got 0.5"):
            operation(torch.zeros(6, 6), 0.5)
    others = dist.new_group([1, 2])
    if rank == 0:
        for operation, operands in (
            (ring_attention, (part, part, part)),
            (ulysses_attention, (part, part, part)),
            (shard_sequence, (part,)),
            (unshard_sequence, (part,)),
        ):
            with pytest.raises(ValueError, match=f"^{operation.__name__}: process 0 is not in group"):
                operation(*operands, group=others)


def check_second_derivatives(rank: int) -> None:
    torch.manual_seed(2)
    parts = [torch.randn(1, 3, 4, 8, dtype=torch.float64).requires_grad_() for _ in range(3)]
    gradients = torch.autograd.grad(ring_attention(*parts).square().sum(), parts, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"^ring_attention: .* Use ulysses_attention with backend='eager'"):
        torch.autograd.grad(gradients[0].sum(), parts[0])
    gradients = torch.autograd.grad(ulysses_attention(*parts, backend="eager").square().sum(), parts, create_graph=True)
    assert torch.autograd.grad(gradients[0].sum(), parts[0])[0].abs().sum() > 0

    part = parts[0]
    (gradient,) = torch.autograd.grad(unshard_sequence(part).pow(3).sum(), part, create_graph=True)
    torch.testing.assert_close(gradient, 9 * part**2)  # the losses of three processes
    torch.testing.assert_close(torch.autograd.grad(gradient.sum(), part)[0], 18 * part)


def check_ring_of_one(rank: int) -> None:
    groups = [dist.new_group([each]) for each in range(3)]
    leaves = [torch.randn(1, 2, 16, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    out = ring_attention(*leaves, group=groups[rank], is_causal=True)
    expected = fastattn.attention(*leaves, is_causal=True)
    torch.testing.assert_close(out, expected)
    gradients, expected_gradients = (torch.autograd.grad(each.sum(), leaves) for each in (out, expected))
    torch.testing.assert_close(gradients, expected_gradients)


def check_low_precision_and_subgroup(rank: int) -> None:
    group = dist.new_group([1, 2])
    if rank == 0:
        return
    torch.manual_seed(2)
    whole = [torch.randn(1, 2, 16, 8) for _ in range(3)]
    expected = fastattn.attention(*whole, is_causal=True)
    parts = [shard_sequence(x, group=group).bfloat16() for x in whole]
    out = ring_attention(*parts, group=group, is_causal=True)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), shard_sequence(expected, group=group), rtol=0.02, atol=0.02)


def check_autocast(rank: int) -> None:
    torch.manual_seed(2)
    whole = [torch.randn(1, 3, 12, 8) for _ in range(3)]
    parts = [shard_sequence(x).requires_grad_() for x in whole]
    with torch.autocast("cpu", torch.bfloat16):
        out = ring_attention(*parts, is_causal=True)
        expected = fastattn.attention(*(x.requires_grad_() for x in whole), is_causal=True)
    assert out.dtype == expected.dtype == torch.bfloat16
    actual = (out, *torch.autograd.grad(out.sum(), parts))
    for part, of_whole in zip(actual, (expected, *torch.autograd.grad(expected.sum(), whole)), strict=True):
        torch.testing.assert_close(part, shard_sequence(of_whole), rtol=0.02, atol=0.02)


def check_all(rank: int) -> None:
    check(rank)
    check_low_precision_and_subgroup(rank)
    check_ring_of_one(rank)
    check_second_derivatives(rank)
    check_autocast(rank)


def test_parts_are_those_of_the_whole():
    """Three processes: with two, the next of the ring is the previous."""
    run_processes(check_all, processes=3)


def test_processes_have_to_be_joined_first():
    with pytest.raises(ValueError, match=r"^ring_attention: .* call torch.distributed.init_process_group first"):
        ring_attention(*(torch.zeros(1, 1, 2, 8) for _ in range(3)))
    with pytest.raises(ValueError, match=r"^shard_sequence: .* call torch.distributed.init_process_group first"):
        shard_sequence(torch.zeros(2), 0)
