"""What the tests of ``attention_with_kv_cache`` share: a step of decoding, and its result put together by hand."""

from __future__ import annotations

import torch
from accuracy import assert_as_accurate_as_eager

import fastattn

BATCH, HEADS, CAPACITY = 3, 4, 48
NAN = float("nan")


def rotated(x, position, angles, interleaved):
    """x (..., head_dim) at one position, as a complex rotation of its first 2 * angles.shape[1] elements."""
    half = angles.shape[1]
    pairs = torch.arange(2 * half).view(half, 2) if interleaved else torch.arange(2 * half).view(2, half).T
    turned = torch.view_as_complex(x[..., pairs].double().contiguous()) * torch.polar(
        torch.ones(half).double(), angles[position]
    )
    result = x.double().clone()
    result[..., pairs] = torch.view_as_real(turned)
    return result.to(x.dtype)


class Problem:
    """Caches filled with NaN past each sequence's length, contiguous or paged with shuffled blocks."""

    def __init__(
        self, dtype, lengths=(5, 0, 40), new=3, seqlen_q=3, block_size=None, heads_kv=2, head_dim=16, capacity=CAPACITY
    ):
        torch.manual_seed(4)
        self.lengths, self.new, self.seqlen_q, self.block_size = lengths, new, seqlen_q, block_size
        self.history = [torch.randn(2, length, heads_kv, head_dim).to(dtype) for length in lengths]
        self.query = torch.randn(BATCH, seqlen_q, HEADS, head_dim).to(dtype)
        self.fresh = torch.randn(2, BATCH, new, heads_kv, head_dim).to(dtype)
        rows, self.table = capacity, None
        if block_size:
            self.table = torch.randperm(BATCH * capacity // block_size + 2, dtype=torch.int32)[:-2].view(BATCH, -1)
            rows = block_size
        blocks = self.table.numel() + 2 if block_size else BATCH
        self.caches = torch.full((2, blocks, rows, heads_kv, head_dim), NAN, dtype=dtype)
        for b, history in enumerate(self.history):
            for t in range(lengths[b]):
                self.caches[(slice(None), *self.place(b, t))] = history[:, t]

    def place(self, b, t):
        return (int(self.table[b, t // self.block_size]), t % self.block_size) if self.block_size else (b, t)

    def lengths_as(self, kind):
        return self.lengths[0] if kind is int else torch.tensor(self.lengths, dtype=kind)

    def expected(self, wide, angles=None, interleaved=False, **options):
        """out (batch, seqlen_q, heads, head_dim) and lse, one sequence at a time."""
        to = (lambda x: x.double()) if wide else (lambda x: x)
        outs, lses = [], []
        for b, length in enumerate(self.lengths):
            query, fresh = self.query[b].clone(), self.fresh[:, b].clone()
            if angles is not None:
                for i in range(self.seqlen_q):
                    query[i] = rotated(query[i], length + i, angles, interleaved)
                for i in range(self.new):
                    fresh[0, i] = rotated(fresh[0, i], length + i, angles, interleaved)
            key, value = torch.cat((self.history[b], fresh), dim=1).transpose(1, 2)
            out, lse = fastattn.attention(
                *(to(x)[None] for x in (query.transpose(0, 1), key, value)), enable_gqa=True,
                alignment="bottom_right", return_lse=True, backend="eager", **{"is_causal": True} | options
            )  # fmt: skip
            outs.append(out.transpose(1, 2))
            lses.append(lse)
        return torch.cat(outs), torch.cat(lses)

    def check(self, backend, lengths, angles=None, interleaved=False, **options):
        key, value = self.fresh if self.new else (None, None)
        rotary = {} if angles is None else {"rotary_cos": angles.cos(), "rotary_sin": angles.sin()}
        before = self.caches.clone()
        out, lse = fastattn.attention_with_kv_cache(
            self.query, *self.caches, key, value, cache_seqlens=lengths, block_table=self.table, return_lse=True,
            backend=backend, rotary_interleaved=interleaved, **rotary, **options
        )  # fmt: skip
        eager, exact = (
            self.expected(False, angles, interleaved, **options),
            self.expected(True, angles, interleaved, **options),
        )
        assert_as_accurate_as_eager(out, eager[0], exact[0], "out")
        # Kernels of 16-bit operands keep scores in base 2, and round once on the way there and once on the way back.
        finite = eager[1][eager[1].isfinite()]
        rounding = (
            torch.finfo(torch.float32).eps * float(finite.abs().amax()) if self.query.dtype.itemsize == 2 else 0.0
        )
        assert_as_accurate_as_eager(lse, eager[1], exact[1], "lse", rounding=rounding)
        self.check_caches(before, angles, interleaved)

    def check_caches(self, before, angles, interleaved):
        """Exactly the new tokens were written."""
        for b, length in enumerate(self.lengths):
            for i in range(self.new):
                fresh = self.fresh[:, b, i].clone()
                if angles is not None:
                    fresh[0] = rotated(fresh[0], length + i, angles, interleaved)
                before[(slice(None), *self.place(b, length + i))] = fresh
        torch.testing.assert_close(self.caches, before, equal_nan=True)


def check_empty(backend, dtype):
    """Nothing in the cache, no query, no sequence."""
    cache, lengths = torch.full((2, 2, 32, 2, 16), NAN, dtype=dtype), torch.zeros(2, dtype=torch.int32)
    query, table = torch.randn(2, 1, 4, 16).to(dtype), torch.zeros(2, 3, dtype=torch.int32)

    def call(query=query, cache=cache, **options):
        return fastattn.attention_with_kv_cache(query, *cache, return_lse=True, backend=backend, **options)

    for options in ({}, {"block_table": table}):
        for length in (lengths, 0):
            out, lse = call(cache_seqlens=length, **options)
            assert not out.any() and (lse == -float("inf")).all()
    out, lse = call(cache=cache[:, :0], cache_seqlens=lengths, block_table=table)
    assert not out.any() and (lse == -float("inf")).all()
    angles = torch.zeros(2, 4)
    for rotation in ({}, {"rotary_cos": angles, "rotary_sin": angles}):
        for length in (lengths, 0):
            assert call(query=query[:, :0], cache_seqlens=length, **rotation)[0].shape == (2, 0, 4, 16)
    assert call(query=query[:0], cache=cache[:, :0], cache_seqlens=lengths[:0])[0].shape == (0, 1, 4, 16)
