"""The dropout rule in Triton keeps what the rule in PyTorch keeps."""

from __future__ import annotations

import pytest
import torch

from fastattn.ops.philox import dropout_mask

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from fastattn.ops.philox_triton import dropout_keep  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@triton.jit
def keep_kernel(
    rng_state_ptr, out_ptr, batch_head, first_row, first_col, threshold, ROWS: tl.constexpr, COLS: tl.constexpr
):
    row, col = tl.arange(0, ROWS), tl.arange(0, COLS)
    keep = dropout_keep(rng_state_ptr, batch_head, first_row + row, first_col, threshold, COLS)
    tl.store(out_ptr + row[:, None] * COLS + col[None, :], keep)


@pytest.mark.parametrize(("seed", "offset"), [(1, 0), (2**31 - 1, 2**31 - 1), (0x123456789ABCDEF, 3)])
@pytest.mark.parametrize(("rows", "cols"), [(1, 32), (4, 64), (16, 256)])
def test_a_tile_keeps_what_the_rule_keeps(seed, offset, rows, cols):
    rng_state = torch.tensor([seed, offset], device=DEVICE)
    out = torch.empty(rows, cols, dtype=torch.bool, device=DEVICE)
    keep_kernel[(1,)](rng_state, out, 5, 3, 96, int(0.3 * 65536 + 0.5), ROWS=rows, COLS=cols)
    expected = dropout_mask(rng_state, 2, 3, 3 + rows, 96 + cols, 0.3)[1, 2, 3:, 96:]
    assert torch.equal(out, expected)
