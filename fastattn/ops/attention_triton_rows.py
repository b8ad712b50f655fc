"""What the Triton backward knows of rows alone: delta and lse, before dq, and what follows from them, behind it.
(Of float32 with few keys, attention_triton_exact_rows.py makes more of them.)

    ds = p (dp - delta)    delta = rowsum(dout out) - dlse    rowsum(ds) = dlse + p_sink delta
    dsink = -sum(p_sink delta)    dmask = sum(dlse + p_sink delta), of a mask that broadcasts over keys

Numbers: ``out`` may have 16 bits, so that delta has no more. That serves dq, dk and dv, which are rounded likewise; the
         gradients of sinks and masks are sums in float32. The sums of the rows of ds, which the kernel of dq makes in
         passing, tell what delta has lost (csrc/attention/README.md).
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastattn.ops.attention_triton_operands import load_tile, rows_of
from fastattn.ops.attention_triton_packed import STATISTICS_ROWS, Packed, packed_sequence, statistics_row
from fastattn.ops.attention_triton_scores import VARYING, load_lse


@triton.jit
def lse_offset(batch_head, head, entry_q, seqlen_q, total_q, PACKED: tl.constexpr):
    """Where the lse of (batch, head) starts: (batch, heads, seqlen_q), packed (heads, total_q)."""
    if PACKED:
        return head * total_q + entry_q
    else:
        return batch_head.to(tl.int64) * seqlen_q


@triton.jit(do_not_specialize=VARYING)
def attention_delta_kernel(
    out_ptr, dout_ptr, dlse_ptr, lse_ptr, row_lse_ptr, delta_ptr, cu_seqlens_q_ptr,
    stride_out_batch, stride_out_head, stride_out_row, stride_dout_batch, stride_dout_head, stride_dout_row,
    heads, seqlen_q, padded_rows, total_q,
    HEAD_DIM_V: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_DV: tl.constexpr, DLSE: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    """delta and lse of each row as the other kernels want them: (batch * heads, padded_rows) float32, with lse +inf, so
    that every probability is 0, where a row sees nothing or does not exist. Grid: (batch * heads * row tiles,).
    """
    row_tiles = padded_rows // BLOCK_Q
    if PACKED:
        row_tiles = tl.cdiv(seqlen_q, STATISTICS_ROWS) * (STATISTICS_ROWS // BLOCK_Q)
    batch_head = tl.program_id(0) // row_tiles
    first_row = tl.program_id(0) % row_tiles * BLOCK_Q
    batch, head = (batch_head // heads).to(tl.int64), (batch_head % heads).to(tl.int64)
    entry_q = batch
    if PACKED:
        entry_q, seqlen_q = packed_sequence(Packed(cu_seqlens_q_ptr, total_q, seqlen_q), batch)
        if first_row >= tl.cdiv(seqlen_q, STATISTICS_ROWS) * STATISTICS_ROWS:
            return
    out = rows_of(out_ptr, entry_q, head, stride_out_batch, stride_out_head, stride_out_row, seqlen_q)
    dout = rows_of(dout_ptr, entry_q, head, stride_dout_batch, stride_dout_head, stride_dout_row, seqlen_q)
    out_tile = load_tile(out, first_row, BLOCK_Q, HEAD_DIM_V, BLOCK_DV, True).to(tl.float32)
    dout_tile = load_tile(dout, first_row, BLOCK_Q, HEAD_DIM_V, BLOCK_DV, True).to(tl.float32)
    delta = tl.sum(out_tile * dout_tile, 1)
    rows = first_row + tl.arange(0, BLOCK_Q)
    offset = lse_offset(batch_head, head, entry_q, seqlen_q, total_q, PACKED)
    if DLSE:
        delta -= tl.load(dlse_ptr + offset + rows, mask=rows < seqlen_q, other=0.0)
    # A row that sees nothing passes nothing on, whatever reaches it.
    lse = load_lse(lse_ptr + offset, rows, seqlen_q)
    delta = tl.where(lse == float("inf"), 0.0, delta)
    statistics = batch_head.to(tl.int64) * padded_rows
    if PACKED:
        statistics = head * padded_rows + statistics_row(entry_q, batch)
    statistics += rows
    tl.store(row_lse_ptr + statistics, lse)
    tl.store(delta_ptr + statistics, delta)


@triton.jit(do_not_specialize=VARYING)
def attention_rows_kernel(
    row_lse_ptr, delta_ptr, row_sums_ptr, dlse_ptr, sinks_ptr, dsinks_ptr, dmask_ptr, cu_seqlens_q_ptr,
    heads, seqlen_q, padded_rows, total_q,
    BLOCK_Q: tl.constexpr, DLSE: tl.constexpr, ROW_SUMS: tl.constexpr, SINKS: tl.constexpr, DSINKS: tl.constexpr,
    DMASK: tl.constexpr, EXACT: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """With ROW_SUMS corrects delta; EXACT, it is exact, but without dlse (attention_triton_exact_rows.py). Then, with
    DSINKS, each program's share of the sinks' gradient, and, with DMASK, each row's of the mask's, (batch, heads,
    seqlen_q). Grid: (batch * heads * row tiles,), as of delta.
    """
    row_tiles = padded_rows // BLOCK_Q
    if PACKED:
        row_tiles = tl.cdiv(seqlen_q, STATISTICS_ROWS) * (STATISTICS_ROWS // BLOCK_Q)
    batch_head = tl.program_id(0) // row_tiles
    first_row = tl.program_id(0) % row_tiles * BLOCK_Q
    batch, head = (batch_head // heads).to(tl.int64), (batch_head % heads).to(tl.int64)
    entry_q = batch
    statistics = batch_head.to(tl.int64) * padded_rows
    if PACKED:
        entry_q, seqlen_q = packed_sequence(Packed(cu_seqlens_q_ptr, total_q, seqlen_q), batch)
        if first_row >= tl.cdiv(seqlen_q, STATISTICS_ROWS) * STATISTICS_ROWS:
            return
        statistics = head * padded_rows + statistics_row(entry_q, batch)
    rows = first_row + tl.arange(0, BLOCK_Q)
    lse = tl.load(row_lse_ptr + statistics + rows)
    delta = tl.load(delta_ptr + statistics + rows)
    sees = lse != float("inf")
    offset = lse_offset(batch_head, head, entry_q, seqlen_q, total_q, PACKED)
    dlse = tl.zeros((BLOCK_Q,), tl.float32)
    if DLSE:
        dlse = tl.load(dlse_ptr + offset + rows, mask=sees & (rows < seqlen_q), other=0.0)
    p_sink = tl.zeros((BLOCK_Q,), tl.float32)
    if SINKS:
        p_sink = tl.exp(tl.load(sinks_ptr + head).to(tl.float32) - lse)
    if ROW_SUMS:
        # Nobody has summed up rows that do not exist.
        row_sums = tl.load(row_sums_ptr + statistics + rows, mask=sees, other=0.0)
        delta += row_sums - dlse - p_sink * delta
        tl.store(delta_ptr + statistics + rows, delta)
    if EXACT:
        delta -= dlse
    if DSINKS:
        tl.store(dsinks_ptr + tl.program_id(0), -tl.sum(p_sink * delta))
    if DMASK:
        tl.store(dmask_ptr + offset + rows, dlse + p_sink * delta, mask=rows < seqlen_q)
