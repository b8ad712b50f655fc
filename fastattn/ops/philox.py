"""Which attention probabilities dropout keeps, in PyTorch: the rule of csrc/common/philox.h.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC'11.
"""

from __future__ import annotations

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF


def draw_rng_state(device: torch.device) -> Tensor:
    """(2,) int64, (seed, offset), each in [0, 2^31), drawn from torch's generator of ``device``."""
    return torch.randint(2**31, (2,), dtype=torch.int64, device=device)


def _multiply(words: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of ``words * factor`` (both of 32 bits, held in int64): in halves, as 64 bits overflow."""
    high = ((words >> 16) * factor + ((words & 0xFFFF) * factor >> 16)) >> 16
    return high, (words * factor) & _WORD


def philox_4x32_10(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Four random words per counter. Words are unsigned 32-bit numbers held in int64 tensors that broadcast."""
    word0, word1, word2, word3 = counter
    key0, key1 = key
    for _ in range(10):
        high0, low0 = _multiply(word0, 0xD2511F53)
        high1, low1 = _multiply(word2, 0xCD9E8D57)
        word0, word1, word2, word3 = high1 ^ word1 ^ key0, low1, high0 ^ word3 ^ key1, low0
        key0, key1 = (key0 + 0x9E3779B9) & _WORD, (key1 + 0xBB67AE85) & _WORD
    return word0, word1, word2, word3


def dropout_mask(rng_state: Tensor, batch: int, heads: int, seqlen_q: int, seqlen_k: int, dropout_p: float) -> Tensor:
    """(batch, heads, seqlen_q, seqlen_k) bool, True = kept.

    An element depends only on (seed, offset, batch * heads + head, row, column): 16 bits of one draw, kept if they are
    not below ``dropout_p * 2^16``. A draw of 128 bits serves columns {2t, 2t+1} + {0, 8, 16, 24} of 32, t in 0..3.
    """
    device = rng_state.device
    seed, offset = rng_state[0], rng_state[1] & _WORD
    blocks = (seqlen_k + 31) // 32

    # One counter for each (batch_head, row, 4 * block + t).
    group = torch.arange(4 * blocks, device=device)
    row = torch.arange(seqlen_q, device=device)[:, None]
    batch_head = torch.arange(batch * heads, device=device)[:, None, None]
    words = philox_4x32_10((group, row, batch_head, offset), (seed & _WORD, (seed >> 32) & _WORD))

    # 32 halves of a word for each block, as (t, word, half); columns are in the order 8 * word + 2 * t + half. Columns
    # are looked up, for a dim of blocks or a slice would have torch.export fix the number of blocks.
    draws = torch.stack(words, -1).expand(batch * heads, seqlen_q, 4 * blocks, 4)
    halves = torch.stack((draws & 0xFFFF, draws >> 16), -1).view(batch, heads, seqlen_q, 32 * blocks)
    column = torch.arange(seqlen_k, device=device)
    block, t, word, half = column // 32, column % 8 // 2, column % 32 // 8, column % 2
    bits = halves.index_select(-1, 32 * block + 8 * t + 2 * word + half)
    return bits >= int(dropout_p * 65536.0 + 0.5)
