"""The dropout rule: Philox4x32-10 against published vectors, the mask against a scalar re-implementation."""

from __future__ import annotations

import pytest
import torch

from fastattn.ops.philox import draw_rng_state, dropout_mask, philox_4x32_10


def scalar_philox(counter, key):
    """Philox4x32-10 in Python integers."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & 0xFFFFFFFF, (p0 >> 32) ^ c3 ^ k1, p0 & 0xFFFFFFFF
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


def scalar_keeps(seed, offset, batch_head, row, column, dropout_p):
    """csrc/common/philox.h, line by line."""
    counter = ((column // 32) * 4 + (column // 2) % 4, row, batch_head, offset)
    word = scalar_philox(counter, (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF))[(column // 8) % 4]
    return (word >> 16 if column % 2 else word & 0xFFFF) >= int(dropout_p * 65536 + 0.5)


# Known answers of philox4x32-10, published with Random123 (Salmon et al.).
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0),
     (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
]  # fmt: skip


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS, ids=["zeros", "ones", "pi"])
def test_known_answers(counter, key, expected):
    drawn = philox_4x32_10(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)))
    assert tuple(word.item() for word in drawn) == expected
    assert scalar_philox(counter, key) == expected


@pytest.mark.parametrize("seqlen_k", [1, 2, 31, 32, 33, 97])
@pytest.mark.parametrize(("seed", "offset"), [(1, 0), (2**31 - 1, 2**31 - 1), (-5, 7), (0x123456789ABCDEF, 3)])
def test_mask_matches_the_scalar_rule(seed, offset, seqlen_k):
    mask = dropout_mask(torch.tensor([seed, offset]), 2, 3, 4, seqlen_k, 0.3)
    expected = torch.tensor(
        [[[scalar_keeps(seed, offset, bh, i, j, 0.3) for j in range(seqlen_k)] for i in range(4)] for bh in range(6)]
    )
    assert mask.dtype == torch.bool
    assert torch.equal(mask, expected.view(2, 3, 4, seqlen_k))


def test_a_larger_problem_keeps_the_same_elements():
    state = torch.tensor([11, 13])
    large = dropout_mask(state, 2, 4, 40, 70, 0.5)
    assert torch.equal(dropout_mask(state, 1, 4, 7, 33, 0.5), large[:1, :, :7, :33])


@pytest.mark.parametrize("dropout_p", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_drops_the_fraction_asked_for(dropout_p):
    kept = dropout_mask(draw_rng_state(torch.device("cpu")), 2, 4, 128, 256, dropout_p).double().mean().item()
    # Five standard deviations of a binomial of 2^18 trials.
    assert abs(kept - (1 - dropout_p)) <= 5 * (dropout_p * (1 - dropout_p) / 2**18) ** 0.5


def test_rows_columns_and_heads_are_uncorrelated():
    mask = dropout_mask(torch.tensor([3, 4]), 4, 8, 64, 64, 0.5).double() * 2 - 1
    for shift in [(1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (0, 0, 0, 2), (0, 0, 0, 8), (0, 0, 0, 32)]:
        correlation = (mask * mask.roll(shift, (0, 1, 2, 3))).mean().item()
        assert abs(correlation) < 5 / mask.numel() ** 0.5


def test_empty_shapes():
    assert dropout_mask(torch.tensor([1, 2]), 0, 3, 4, 5, 0.5).shape == (0, 3, 4, 5)
    assert dropout_mask(torch.tensor([1, 2]), 1, 3, 4, 0, 0.5).shape == (1, 3, 4, 0)


def test_state_comes_from_the_generator():
    cpu = torch.device("cpu")
    torch.manual_seed(5)
    first, second = draw_rng_state(cpu), draw_rng_state(cpu)
    torch.manual_seed(5)
    assert torch.equal(draw_rng_state(cpu), first)
    assert not torch.equal(first, second)
    assert first.dtype == torch.int64 and first.shape == (2,) and (first >= 0).all() and (first < 2**31).all()
