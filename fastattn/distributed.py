"""Attention over a sequence that is divided among processes (context parallelism), over torch.distributed.

`ring_attention` passes keys and values from process to process and merges what each part of them gives by its
log-sum-exp; `ulysses_attention` exchanges sequence for heads, attends, and exchanges back. With ``zigzag`` the sequence
is cut into two pieces a process, and process r holds the r-th and the r-th from the end: under a causal mask every
process then has the same work in every step.

Sources: Liu et al. 2023 (arXiv:2310.01889), the ring; Jacobs et al. 2023 (arXiv:2309.14509), the exchange of heads;
Brandon et al. 2023 (arXiv:2311.09431), the balance of causal work.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from fastattn.dispatch import select
from fastattn.ops import attention_checks as checks
from fastattn.ops.attention import attention
from fastattn.ops.attention import prepare as prepare_attention

_NEGATIVE_INFINITY = float("-inf")


def shard_sequence(x: Tensor, dim: int = 2, *, group: Any = None, zigzag: bool = True) -> Tensor:
    """This process' part of ``x`` along ``dim``; of position numbers too, which zigzag reorders. Differentiable.

    Raises: ValueError if the length is no multiple of the number of processes (with ``zigzag``, of twice that), or this
        process is not in ``group``.
    """
    _check_dim("shard_sequence", x, dim)
    rank, size = _place("shard_sequence", group)
    pieces = 2 * size if zigzag else size
    if x.shape[dim] % pieces:
        raise ValueError(
            f"shard_sequence: length {x.shape[dim]} of dim {dim} must be a multiple of {pieces} for {size} processes"
            f"{' and zigzag' if zigzag else ''}; pad it."
        )
    chunks = x.chunk(pieces, dim)
    return torch.cat((chunks[rank], chunks[-1 - rank]), dim) if zigzag else chunks[rank]


def unshard_sequence(x: Tensor, dim: int = 2, *, group: Any = None, zigzag: bool = True) -> Tensor:
    """The whole of which ``x`` is this process' part, in every process: the inverse of ``shard_sequence``.

    Differentiable: the gradient of a part is the sum of the gradients that all processes have for it.

    Raises: ValueError if the part is of odd length with ``zigzag``, which makes it of two pieces of one length.
    """
    _check_dim("unshard_sequence", x, dim)
    _place("unshard_sequence", group)
    if zigzag and x.shape[dim] % 2:
        raise ValueError(
            f"unshard_sequence: with zigzag a part is two pieces of one length, but dim {dim} has {x.shape[dim]}; pass "
            "zigzag as shard_sequence had it."
        )
    _check_parts("unshard_sequence", group, x)
    return cast(Tensor, _Gather.apply(x, dim, group, zigzag))


def ring_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    group: Any = None,
    is_causal: bool = False,
    scale: float | None = None,
    zigzag: bool = True,
    softcap: float = 0.0,
    enable_gqa: bool = False,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """``fastattn.attention`` of sequences whose parts are in the processes of ``group``; every process must call it.

    While a process attends to one part of the keys, the next one is on its way. No process ever holds more than two
    parts; the backward pass goes round once more and computes each part's attention again.

    Args:
        query, key, value: this process' parts, (batch, heads, part of seqlen, head_dim), as ``shard_sequence`` with the
            same ``zigzag`` gives them. All parts are equally long.
        zigzag: which parts; it matters only to ``is_causal``.
        scale, softcap, enable_gqa, return_lse, backend: as in ``fastattn.attention``.

    Returns: this process' part of the output, (batch, heads, part of seqlen, head_dim_v), and if asked of the
        log-sum-exp. Both are differentiable.
    Raises: ValueError, TypeError, NotImplementedError as ``fastattn.attention`` does; on the CPU also ValueError if
        another process has parts of another shape (on a GPU, asking would cost a synchronisation).
    """
    options: dict[str, Any] = {"is_causal": is_causal, "scale": scale, "softcap": softcap, "enable_gqa": enable_gqa}
    _check_attention("ring_attention", query, key, value, backend, **options)
    _place("ring_attention", group)
    # Under autocast in 16 bits from here on: what is sent, and what the backward pass computes again outside of it.
    query, key, value = checks.operands("ring_attention", query, key, value)
    if (
        not query.dim() == key.dim() == value.dim() == 4
        or query.shape[2] != key.shape[2]
        or (zigzag and query.shape[2] % 2)
    ):
        raise ValueError(
            "ring_attention: query and key must be (batch, heads, seqlen, head_dim) with parts of equal"
            f"{', even' if zigzag else ''} length, got {tuple(query.shape)} and {tuple(key.shape)}."
        )
    batch, heads = (max(sizes) for sizes in zip(key.shape[:2], value.shape[:2], strict=True))
    if query.shape[0] < batch or query.shape[1] < heads:
        raise ValueError(
            "ring_attention: query must have the batch and at least the heads of key and value, got "
            f"{tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}; expand it."
        )
    _check_parts("ring_attention", group, query, key, value)
    options = {"scale": scale, "softcap": softcap, "enable_gqa": enable_gqa, "backend": backend}
    out, lse = _Ring.apply(query, key.contiguous(), value.contiguous(), group, is_causal, zigzag, options)
    return (out, lse) if return_lse else out


def ulysses_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    group: Any = None,
    is_causal: bool = False,
    scale: float | None = None,
    window: tuple[int, int] | None = None,
    softcap: float = 0.0,
    enable_gqa: bool = False,
    backend: str = "auto",
) -> Tensor:
    """``fastattn.attention`` of sequences whose parts are in the processes of ``group``; every process must call it.

    Each process attends with its share of the heads to the whole sequence.

    Args:
        query, key, value: this process' parts, (batch, heads, part of seqlen, head_dim), as
            ``shard_sequence(..., zigzag=False)`` gives them. The number of processes must divide the heads.
        is_causal, scale, window, softcap, enable_gqa, backend: as in ``fastattn.attention``.

    Returns: this process' part of the output, (batch, heads, part of seqlen, head_dim_v). Differentiable.
    Raises: ValueError if the processes do not divide the heads; and as ``fastattn.attention`` does.
    """
    _check_attention(
        "ulysses_attention", query, key, value, backend, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa,
        window=window, softcap=softcap,
    )  # fmt: skip
    _, size = _place("ulysses_attention", group)
    advice = "" if window is not None else "; use ring_attention"
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.dim() != 4 or x.shape[1] % size:
            raise ValueError(
                f"ulysses_attention: {name} must be (batch, heads, seqlen, head_dim) with heads a multiple of the "
                f"{size} processes, got {tuple(x.shape)}{advice}."
            )
    _check_parts("ulysses_attention", group, query, key, value)
    q, k, v = (_Exchange.apply(x, 1, 2, group) for x in (query, key, value))
    out = attention(
        q, k, v, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa, window=window, softcap=softcap,
        backend=backend,
    )  # fmt: skip
    return cast(Tensor, _Exchange.apply(out, 2, 1, group))


def _place(op: str, group: Any) -> tuple[int, int]:
    """This process' rank in ``group``, and the number of its processes."""
    if not dist.is_initialized():
        raise ValueError(
            f"{op}: torch.distributed has no processes yet; call torch.distributed.init_process_group first."
        )
    rank = dist.get_rank(group)
    if rank < 0:
        raise ValueError(
            f"{op}: process {dist.get_rank()} is not in group, whose processes alone may call this; leave it out."
        )
    return rank, dist.get_world_size(group)


def _check_dim(op: str, x: Any, dim: Any) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: x must be a Tensor, got {type(x).__name__}.")
    if not isinstance(dim, int):
        raise TypeError(f"{op}: dim must be an int, got {dim!r}.")
    if not -x.dim() <= dim < x.dim():
        raise ValueError(f"{op}: dim must be one of x, which is {tuple(x.shape)}, got {dim}.")


def _check_attention(op: str, query: Any, key: Any, value: Any, backend: str, **options: Any) -> None:
    """All that attention would object to has to be found before anything is sent: an error once parts are on their way
    leaves the other processes waiting for ever."""
    try:
        call = prepare_attention(query, key, value, **options)
        select("attention", call, backend)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise type(error)(str(error).replace("attention:", f"{op}:", 1)) from None


# How many numbers describe a part: its element size, its number of dims, and the sizes of up to 14 of them.
_DESCRIPTION = 16


def _check_parts(op: str, group: Any, *parts: Tensor) -> None:
    """That every process has parts of one shape and element size, where asking them costs no device synchronisation:
    on the CPU. (Its messages of another length would end the process that receives them.)"""
    if parts[0].device.type != "cpu":
        return
    described = [[x.element_size(), x.dim(), *x.shape, *[0] * _DESCRIPTION][:_DESCRIPTION] for x in parts]
    mine = torch.tensor(described)
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyone, mine, group=group)
    for rank, theirs in enumerate(everyone):
        if not torch.equal(theirs, mine):
            got = ", ".join(str(tuple(sizes[2 : 2 + dims])) for sizes in theirs.tolist() for dims in [sizes[1]])
            raise ValueError(
                f"{op}: all processes must have parts of one shape and dtype, but this one has "
                f"{', '.join(str(tuple(x.shape)) for x in parts)} and process {rank} of the group {got}; pad the whole."
            )


# --- Ring -------------------------------------------------------------------------------------------------------------


def _visible(rank: int, source: int, length: int, is_causal: bool, zigzag: bool) -> tuple[slice, slice, bool] | None:
    """Which queries of ``rank`` see which keys of ``source``: (queries, keys, causal among themselves), or None."""
    whole, half = slice(0, length), length // 2
    if not is_causal:
        return whole, whole, False
    if rank == source:
        return whole, whole, True
    if source < rank:
        # Zigzag: the source's first piece lies before both of ours, its last piece behind them.
        return whole, slice(0, half) if zigzag else whole, False
    # Zigzag: both of the source's pieces lie between ours.
    return (slice(half, length), whole, False) if zigzag else None


def _start_passing(tensors: list[Tensor], group: Any) -> tuple[list[Tensor], list[Any]]:
    """Sends tensors to the next process of the ring; (what comes from the previous one, requests to wait for)."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    if size == 1:
        return tensors, []
    ranks = [(rank + 1) % size, (rank - 1) % size]
    if group is not None:
        ranks = [dist.get_global_rank(group, each) for each in ranks]
    received = [torch.empty_like(x) for x in tensors]
    operations = [dist.P2POp(dist.isend, x, ranks[0], group) for x in tensors]
    operations += [dist.P2POp(dist.irecv, x, ranks[1], group) for x in received]
    return received, dist.batch_isend_irecv(operations)


def _share(part: Tensor, whole: Tensor) -> Tensor:
    """exp(part - whole) of log-sum-exps, 0 where there is nothing."""
    return torch.exp(part - whole.masked_fill(whole == _NEGATIVE_INFINITY, 0.0))


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, group, is_causal, zigzag, options):
        rank, size, length = dist.get_rank(group), dist.get_world_size(group), query.shape[2]
        dtype = torch.promote_types(query.dtype, torch.float32)
        out = query.new_zeros(*query.shape[:3], value.shape[3], dtype=dtype)
        lse = query.new_full(query.shape[:3], _NEGATIVE_INFINITY, dtype=dtype)
        parts = [key, value]
        for step in range(size):
            coming, requests = _start_passing(parts, group) if step + 1 < size else (parts, [])
            visible = _visible(rank, (rank - step) % size, length, is_causal, zigzag)
            if visible is not None:
                rows, columns, causal = visible
                k, v = (x[:, :, columns] for x in parts)
                partial, partial_lse = attention(query[:, :, rows], k, v, is_causal=causal, return_lse=True, **options)
                before = lse[:, :, rows]
                merged = torch.logaddexp(before, partial_lse)
                out[:, :, rows] *= _share(before, merged)[..., None]
                out[:, :, rows] += _share(partial_lse, merged)[..., None] * partial
                lse[:, :, rows] = merged
            for request in requests:
                request.wait()
            parts = coming
        out = out.to(query.dtype)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.setting = group, is_causal, zigzag, options
        return out, lse

    @staticmethod
    def backward(ctx, dout, dlse):
        return *_RingBackward.apply(dout, dlse, *ctx.saved_tensors, ctx.setting), None, None, None, None


class _RingBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, dout, dlse, query, key, value, out, lse, setting):
        group, is_causal, zigzag, options = setting
        rank, size, length = dist.get_rank(group), dist.get_world_size(group), query.shape[2]
        dout = dout.to(lse.dtype)
        # Of lse as it depends on a part's lse: its share of the whole times this.
        dlse = dlse - (dout * out).sum(-1)
        dq = torch.zeros_like(query, dtype=lse.dtype)
        # The gradients of keys and values travel with them and are at home after a whole turn.
        parts, gradients = [key, value], [torch.zeros_like(x, dtype=lse.dtype) for x in (key, value)]
        for step in range(size):
            coming, requests = _start_passing(parts, group) if step + 1 < size else (parts, [])
            visible = _visible(rank, (rank - step) % size, length, is_causal, zigzag)
            if visible is not None:
                rows, columns, causal = visible
                leaves = [x.detach().requires_grad_() for x in (query[:, :, rows], *(x[:, :, columns] for x in parts))]
                with torch.enable_grad():
                    partial, partial_lse = attention(*leaves, is_causal=causal, return_lse=True, **options)
                share = _share(partial_lse.detach(), lse[:, :, rows])
                dpartial = share[..., None] * dout[:, :, rows]
                dpartial_lse = share * (dlse[:, :, rows] + (dout[:, :, rows] * partial.detach()).sum(-1))
                each = torch.autograd.grad(
                    (partial, partial_lse), leaves, (dpartial.to(partial.dtype), dpartial_lse.to(partial_lse.dtype))
                )
                dq[:, :, rows] += each[0]
                for gradient, addend in zip(gradients, each[1:], strict=True):
                    gradient[:, :, columns] += addend
            for request in requests:
                request.wait()
            parts = coming
            gradients, requests = _start_passing(gradients, group)
            for request in requests:
                request.wait()
        dk, dv = gradients
        return dq.to(query.dtype), dk.to(key.dtype), dv.to(value.dtype)

    @staticmethod
    def backward(ctx, *gradients):
        raise NotImplementedError(
            "ring_attention: its backward cannot be differentiated again. Use ulysses_attention with backend='eager' "
            "for second derivatives."
        )


# --- Exchanges --------------------------------------------------------------------------------------------------------


class _Exchange(torch.autograd.Function):
    """Cuts ``x`` along ``split_dim``, sends each process its piece, and joins what comes along ``join_dim``."""

    @staticmethod
    def forward(ctx, x, split_dim, join_dim, group):
        ctx.setting = split_dim, join_dim, group
        pieces = torch.stack(x.chunk(dist.get_world_size(group), split_dim))
        received = torch.empty_like(pieces)
        dist.all_to_all_single(received, pieces, group=group)
        return torch.cat(received.unbind(0), join_dim)

    @staticmethod
    def backward(ctx, gradient):
        split_dim, join_dim, group = ctx.setting
        return _Exchange.apply(gradient, join_dim, split_dim, group), None, None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dim, group, zigzag):
        ctx.setting = dim, group, zigzag
        size = dist.get_world_size(group)
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(size)]
        dist.all_gather(parts, x.contiguous(), group=group)
        if zigzag:
            halves = [part.chunk(2, dim) for part in parts]
            parts = [first for first, _ in halves] + [last for _, last in reversed(halves)]
        return torch.cat(parts, dim)

    @staticmethod
    def backward(ctx, gradient):
        return _SumAndShard.apply(gradient, *ctx.setting), None, None, None


class _SumAndShard(torch.autograd.Function):
    """This process' part of the sum of all processes' ``x``. It and ``_Gather`` are each other's derivative."""

    @staticmethod
    def forward(ctx, x, dim, group, zigzag):
        ctx.setting = dim, group, zigzag
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return shard_sequence(total, dim, group=group, zigzag=zigzag)

    @staticmethod
    def backward(ctx, gradient):
        return _Gather.apply(gradient, *ctx.setting), None, None, None
