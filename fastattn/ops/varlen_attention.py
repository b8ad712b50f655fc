"""Attention over sequences of different lengths, packed one behind the other without padding."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn import dispatch
from fastattn.dispatch import Kernel, never_refuses, select
from fastattn.ops import attention_checks as checks
from fastattn.ops import attention_compiled as compiled
from fastattn.ops.attention import run_eager
from fastattn.ops.attention_triton import refuses_triton
from fastattn.ops.calls import AttentionCall, VarlenCall
from fastattn.ops.philox import draw_rng_state
from fastattn.ops.varlen_attention_triton import run_varlen_triton


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    window: tuple[int, int] | None = None,
    alignment: str = "bottom_right",
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """``attention`` within each of several sequences that are packed one behind the other.

    Args:
        query: (total_q, heads, head_dim), float32, float16, bfloat16 or float64.
        key: (total_k, heads_kv, head_dim); heads must be a multiple of heads_kv.
        value: (total_k, heads_kv, head_dim_v).
        cu_seqlens_q: (batch + 1,) int32 or int64, on query's device: sequence b is rows
            ``cu_seqlens_q[b]:cu_seqlens_q[b + 1]`` of ``query``. Starts with 0 and never falls; sequences may be empty.
            Rows past the last entry belong to no sequence: their output is 0 and their lse -inf.
        cu_seqlens_k: the same for key and value. Pass the same tensor twice for self-attention.
        max_seqlen_q, max_seqlen_k: ints, no less than the longest sequence.
        alignment: "bottom_right" (query i stands at key i + seqlen_k - seqlen_q of its own sequence) or "top_left".
        dropout_p, is_causal, scale, window, softcap, alibi_slopes, sinks, return_lse, backend: as in ``attention``.
            The same seed drops the same elements as in a padded batch.

    Returns:
        out: (total_q, heads, head_dim_v), dtype of ``query``.
        lse, if asked for: (heads, total_q), float32 (float64 for float64). Both are differentiable.

    Raises:
        ValueError, TypeError: for arguments that disagree; for lengths, their values are checked on the CPU (on a GPU,
            rows that do not fit are left out, without a synchronisation).
        NotImplementedError: if ``backend`` is named and cannot run this call, with its reason.

    Source: Dao 2023 (arXiv:2307.08691).
    """
    call = _prepare(
        query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=dropout_p,
        is_causal=is_causal, scale=scale, window=window, alignment=alignment, softcap=softcap,
        alibi_slopes=alibi_slopes, sinks=sinks,
    )  # fmt: skip
    kernel = select("varlen_attention", call, backend)
    if call.dropout_p > 0.0:
        call = call._replace(rng_state=draw_rng_state(call.query.device))
    out, lse = kernel.run(call)
    return (out, lse) if return_lse else out


def _prepare(
    query: Any,
    key: Any,
    value: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    window: tuple[int, int] | None = None,
    alignment: str = "bottom_right",
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    sinks: Any = None,
    return_lse: bool = False,
) -> VarlenCall:
    op = "varlen_attention"
    query, key, value = checks.operands(op, query, key, value)
    checks.heads_and_dims(op, query, key, value, "(total, heads, head_dim)", heads_dim=1)
    if key.shape[0] != value.shape[0]:
        raise ValueError(f"{op}: key has {key.shape[0]} rows but value has {value.shape[0]}; they must be equal.")
    for name, cu_seqlens in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        checks.integers_on_device(op, name, cu_seqlens, query)
        if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
            raise ValueError(f"{op}: {name} must be (batch + 1,), got shape {tuple(cu_seqlens.shape)}.")
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        raise ValueError(
            f"{op}: cu_seqlens_q has {cu_seqlens_q.shape[0]} entries but cu_seqlens_k has {cu_seqlens_k.shape[0]}; "
            "both must have one more than there are sequences."
        )
    max_seqlen_q = _checked_longest(op, "max_seqlen_q", max_seqlen_q)
    max_seqlen_k = _checked_longest(op, "max_seqlen_k", max_seqlen_k)
    checks.flag(op, "is_causal", is_causal)
    heads = query.shape[1]
    scale, left, right = checks.options(op, query.shape[2], dropout_p, scale, softcap, window, alignment)
    if alibi_slopes is not None:
        alibi_slopes = checks.alibi_slopes(op, alibi_slopes, query, (cu_seqlens_q.shape[0] - 1, heads))
    if sinks is not None:
        sinks = checks.sinks(op, sinks, query, heads)
    return VarlenCall(
        query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, alibi_slopes, sinks, None,
        float(dropout_p), bool(is_causal), scale, left, right, alignment == "bottom_right", float(softcap),
    )  # fmt: skip


def _checked_longest(op: str, name: str, longest: Any) -> int:
    number = checks.whole_number(longest)
    if number is None:
        raise TypeError(f"{op}: {name} must be an int >= 0, got {longest!r}; call .item() on a tensor.")
    if torch.compiler.is_compiling():
        # What only the run knows, such as .item() of the lengths, cannot be asked: the graph checks it.
        # PyTorch 2.11 compiles no message with variables.
        torch._check(number >= 0, lambda: "varlen_attention: max_seqlen_q and max_seqlen_k must be ints >= 0.")
    elif not 0 <= number < 2**63:
        raise ValueError(f"{op}: {name} must be an int >= 0{' and below 2^63' if number > 0 else ''}, got {number}.")
    return number  # type: ignore[no-any-return]


# --- Packed to padded and back ---------------------------------------------------------------------------------------


@torch.library.custom_op("fastattn::padded_rows", mutates_args=())
def padded_rows(cu_seqlens: Tensor, max_seqlen: int, total: int, name: str) -> tuple[Tensor, Tensor]:
    """Where each packed row goes in a padded (batch * max_seqlen) batch, and the sequences' lengths, both int64.

    A row of no sequence goes to ``batch * max_seqlen``, one past the end. On the CPU the values are checked.
    """
    starts, ends = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
    lengths, batch = ends - starts, len(starts)
    if cu_seqlens.device.type == "cpu":
        checks.sequence_lengths("varlen_attention", name, cu_seqlens, max_seqlen, total)
    lengths = lengths.clamp(0, max_seqlen)
    row = torch.arange(total, device=cu_seqlens.device)
    if batch == 0:
        return torch.zeros_like(row), lengths
    sequence = torch.searchsorted(ends, row, right=True)
    start = starts[sequence.clamp(max=batch - 1)]
    inside = (sequence < batch) & (row >= start) & (row < start + max_seqlen)
    return torch.where(inside, sequence * max_seqlen + row - start, batch * max_seqlen), lengths


@padded_rows.register_fake
def _(cu_seqlens: Tensor, max_seqlen: int, total: int, name: str) -> tuple[Tensor, Tensor]:
    return cu_seqlens.new_empty(total, dtype=torch.int64), cu_seqlens.new_empty(
        cu_seqlens.shape[0] - 1, dtype=torch.int64
    )


def _pad(packed: Tensor, rows: Tensor, batch: int, max_seqlen: int) -> Tensor:
    """(total, heads, head_dim) -> (batch, heads, max_seqlen, head_dim), 0 where there is no row."""
    padded = packed.new_zeros(batch * max_seqlen + 1, *packed.shape[1:]).index_copy(0, rows, packed)
    return padded[:-1].view(batch, max_seqlen, *packed.shape[1:]).transpose(1, 2)


def _unpad(padded: Tensor, rows: Tensor, fill: float) -> Tensor:
    """(batch, max_seqlen, ...) -> (total, ...); ``fill`` for rows of no sequence."""
    slots = padded.shape[0] * padded.shape[1]
    if slots == 0:
        # No row belongs to a sequence; padding, unlike a new tensor, keeps the result differentiable.
        flat = padded.reshape(0, *padded.shape[2:])
        return F.pad(flat, (0, 0) * (flat.dim() - 1) + (0, rows.shape[0]), value=fill)
    packed = padded.reshape(slots, *padded.shape[2:]).index_select(0, rows.clamp(max=slots - 1))
    return packed.masked_fill((rows == slots).view(-1, *(1,) * (packed.dim() - 1)), fill)


def _run_padded(call: VarlenCall) -> tuple[Tensor, Tensor]:
    """Pads, attends with a mask that hides the padding, and packs again."""
    query, key, value = call.query, call.key, call.value
    batch, longest_q, longest_k = call.cu_seqlens_q.shape[0] - 1, call.max_seqlen_q, call.max_seqlen_k
    rows_q, lengths_q = padded_rows(call.cu_seqlens_q, longest_q, query.shape[0], "cu_seqlens_q")
    if call.cu_seqlens_q is call.cu_seqlens_k and longest_q == longest_k and query.shape[0] == key.shape[0]:
        rows_k, lengths_k = rows_q, lengths_q
    else:
        rows_k, lengths_k = padded_rows(call.cu_seqlens_k, longest_k, key.shape[0], "cu_seqlens_k")

    padded = AttentionCall(
        _pad(query, rows_q, batch, longest_q), _pad(key, rows_k, batch, longest_k),
        _pad(value, rows_k, batch, longest_k), None, *call[7:15], False, call.softcap,
    )  # fmt: skip
    column = torch.arange(longest_k, device=query.device)
    visible = (column < lengths_k[:, None])[:, None, None, :]
    if not call.bottom_right or rows_k is rows_q:
        padded = padded._replace(attn_mask=visible)
    else:
        diagonal = lengths_k - lengths_q
        padded = with_diagonals(padded, visible, diagonal)
    out, lse = run_eager(padded)
    return _unpad(out.transpose(1, 2), rows_q, 0.0), _unpad(lse.transpose(1, 2), rows_q, float("-inf")).T


def with_diagonals(call: AttentionCall, visible: Tensor, diagonal: Tensor) -> AttentionCall:
    """``call`` with query i of batch b at key ``i + diagonal[b]``: causality, window and ALiBi become a mask.

    ``visible`` is (batch, 1, 1, seqlen_k): the keys that exist.
    """
    limited = call.is_causal or call.window_left >= 0 or call.window_right >= 0
    if not limited and call.alibi_slopes is None:
        return call._replace(attn_mask=visible)
    seqlen_q, seqlen_k = call.query.shape[2], call.key.shape[2]
    row = torch.arange(seqlen_q, device=diagonal.device)[:, None]
    offset = torch.arange(seqlen_k, device=diagonal.device) - row - diagonal[:, None, None, None]
    if call.is_causal:
        visible = visible & (offset <= 0)
    if call.window_left >= 0:
        visible = visible & (offset >= -call.window_left)
    if call.window_right >= 0:
        visible = visible & (offset <= call.window_right)
    mask = visible
    if call.alibi_slopes is not None:
        distance = offset.abs().to(torch.promote_types(call.query.dtype, torch.float32))
        mask = (-call.alibi_slopes[..., None, None] * distance).masked_fill(~visible, float("-inf"))
    return call._replace(attn_mask=mask, alibi_slopes=None, is_causal=False, window_left=-1, window_right=-1)


# --- The table -------------------------------------------------------------------------------------------------------

_CUDA, _EMULATED = dispatch.cuda_kernels(compiled.refuses_cuda, compiled.run_varlen)
dispatch.register(
    "varlen_attention",
    _CUDA,
    Kernel("triton", refuses_triton, run_varlen_triton),
    Kernel("cpu", compiled.refuses_cpu, compiled.run_varlen),
    Kernel("eager", never_refuses, _run_padded),
    _EMULATED,
    prepare=_prepare,
)
