"""Packed sequences in the CUDA kernels: their tiles, shared work and schedules, in the emulator."""

from __future__ import annotations

import pytest
import torch
from emulated import MODES, Mode
from test_varlen_attention import OPTIONS, check, cu_seqlens, of_head_dim

import fastattn

pytestmark = [
    pytest.mark.skipif(
        fastattn.available_backends()["emulated"] is not None, reason=str(fastattn.available_backends()["emulated"])
    ),
    pytest.mark.usefixtures("plain_mode_afterwards"),
]


@pytest.mark.parametrize("head_dim", [64, 96, 128, 192, 256])
@pytest.mark.parametrize("options", ["plain", "softcap_scale"])
def test_every_tile(options, head_dim):
    # 70 queries take the large tiles where scores are plain, and two of the small ones.
    lengths_q, lengths_k = (70, 3), (20, 66)
    operands = of_head_dim(head_dim, lengths_q, lengths_k, torch.float16)
    check(operands, lengths_q, lengths_k, "emulated", **OPTIONS[options])


def test_rows_behind_one_sequence_on_hopper():
    # Hopper's kernel of the forward sees whole tensors, which do not end with the sequence.
    Mode().apply(compute_capability=90, multiprocessors=2)
    leaves = of_head_dim(64, (200,), (200,), torch.float16)
    for leaf in leaves:
        leaf[130:] = float("nan")
        leaf.requires_grad_()
    cu = cu_seqlens((130,))
    out = fastattn.varlen_attention(*leaves, cu, cu, 200, 200, backend="emulated")
    for result in (out, *torch.autograd.grad(out, leaves, torch.ones_like(out))):
        assert result.isfinite().all() and (result[130:] == 0).all()


@pytest.mark.parametrize("card", [86, 90, 120])
def test_other_cards_take_other_tiles(card):
    Mode().apply(compute_capability=card, multiprocessors=2)
    lengths = (200, 0, 130)
    check(of_head_dim(64, lengths, lengths, torch.float16), lengths, lengths, "emulated", is_causal=True)


@pytest.mark.parametrize("options", ["plain", "window"])
def test_many_queries_for_few_keys(options):
    # Blocks share the queries of a block of keys, and leave sums where each sequence has room for the longest.
    lengths_q, lengths_k = (700, 0, 3, 150), (40, 9, 0, 17)
    operands = of_head_dim(16, lengths_q, lengths_k, torch.bfloat16)
    check(operands, lengths_q, lengths_k, "emulated", **OPTIONS[options])


@pytest.mark.parametrize("mode", MODES[1:], ids=str)
def test_under_harsh_schedules(mode):
    # A block's own arguments are there before anyone reads them.
    mode.apply()
    lengths_q, lengths_k = (70, 0, 9), (30, 5, 140)
    operands = of_head_dim(32, lengths_q, lengths_k, torch.float16)
    check(operands, lengths_q, lengths_k, "emulated", **OPTIONS["sinks"])


# What nobody checked, as on a device, and the lengths that kernels make of it.
CLIPPED = {
    "negative": ([-7, -3, 20, 40], [0, 0, 20, 40]),
    "past_the_end": ([0, 9, 1 << 30, 40], [0, 9, 40, 40]),
    "extremes": ([-(1 << 31), 15, (1 << 31) - 1, -(1 << 31)], [0, 15, 40, 40]),
}


@pytest.mark.parametrize("head_dim", [64, 96, 192])
@pytest.mark.parametrize("name", CLIPPED)
def test_wrong_lengths_are_clipped(name, head_dim):
    """The same bits as right ones, forward and backward; tests/test_kernels_sanitized.py sees every access."""
    Mode().apply(checks_values=False)
    leaves = [x.requires_grad_() for x in of_head_dim(head_dim, (15, 25), (15, 25), torch.float16)]
    results = []
    for cu in CLIPPED[name]:
        cu = torch.tensor(cu, dtype=torch.int32)
        out, lse = fastattn.varlen_attention(*leaves, cu, cu, 40, 40, is_causal=True, return_lse=True,
                                             backend="emulated")  # fmt: skip
        results.append((out, lse, *torch.autograd.grad((out, lse), leaves, (out.detach(), torch.ones_like(lse)))))
    assert all(torch.equal(wrong, right) and wrong.isfinite().all() for wrong, right in zip(*results, strict=True))


def test_lengths_are_checked_where_that_takes_no_synchronisation():
    leaves = of_head_dim(64, (40,), (40,), torch.float16)
    cu = torch.tensor(CLIPPED["past_the_end"][0], dtype=torch.int32)
    with pytest.raises(ValueError, match="cu_seqlens_q must not fall, but sequence 2 has a negative length"):
        fastattn.varlen_attention(*leaves, cu, cu, 40, 40, backend="emulated")
