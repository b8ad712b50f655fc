"""Which elements dropout keeps, in Triton: the rule of csrc/common/philox.h, a tile at a time."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def dropout_keep(rng_state_ptr, batch_head, row, first_col, threshold, BLOCK_COLS: tl.constexpr):
    """(rows, BLOCK_COLS) bool, True = kept, for the given rows and columns first_col + (0 .. BLOCK_COLS).

    rng_state_ptr: (seed, offset) int64. batch_head: scalar or (rows,). row: (rows,). first_col: a multiple of 32.
    threshold: an element is kept if its 16 bits are not below it. BLOCK_COLS: a power of two, at least 32.
    """
    seed, offset = tl.load(rng_state_ptr), tl.load(rng_state_ptr + 1)
    # One draw of four words serves eight columns, {2t, 2t+1} + {0, 8, 16, 24} of 32: drawn once, not once a column.
    ROWS: tl.constexpr = row.shape[0]
    group = first_col // 8 + tl.arange(0, BLOCK_COLS // 8)
    counter = tl.zeros((ROWS, BLOCK_COLS // 8), tl.uint32)
    word0, word1, word2, word3 = tl.philox(
        seed,
        counter + group.to(tl.uint32)[None, :],
        counter + row.to(tl.uint32)[:, None],
        counter + (tl.zeros((ROWS,), tl.uint32) + tl.cast(batch_head, tl.uint32))[:, None],
        counter + offset.to(tl.uint32),
    )
    # (row, group, word // 2, word % 2) -> (row, block of 32, word, t, half): column 8 * word + 2 * t + half of a block.
    words = tl.join(tl.join(word0, word2), tl.join(word1, word3))
    words = tl.permute(tl.reshape(words, (ROWS, BLOCK_COLS // 32, 4, 4)), (0, 1, 3, 2))
    bits = tl.join(words & 0xFFFF, words >> 16)
    return tl.reshape(bits, (ROWS, BLOCK_COLS)) >= threshold
