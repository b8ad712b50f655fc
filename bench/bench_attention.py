"""Attention against F.scaled_dot_product_attention, its eager form, and, for decoding, the strongest trick we know."""

from __future__ import annotations

if __name__ == "__main__":
    import os
    import runpy

    runpy.run_path(os.path.join(os.path.dirname(__file__), "by_path.py"))

import math
from collections.abc import Callable, Iterator
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

import fastattn
from bench.case import Case, Subject, as_accurate_as_eager, gradients, like, seeded_generator, torch_dtype
from bench.sentences import SENTENCES

Shape = tuple[int, int, int, int]  # batch, heads, seqlen, head_dim
GROUP = "attention"


def cases() -> Iterator[Case]:
    """Every row, in the order of the table."""
    for direction in ("forward", "backward"):
        for shape in ((1, 12, 128, 64), (8, 12, 128, 64), (1, 12, 512, 64), (1, 12, 2048, 64), (1, 8, 2048, 128)):
            for causal in (False, True):
                yield dense(direction, shape, "float32", causal)
    for dtype in ("bfloat16", "float16"):
        yield dense("forward", (1, 12, 512, 64), dtype, causal=False)
        yield dense("forward + backward", (1, 12, 512, 64), dtype, causal=False)
    yield half_padded((8, 12, 512, 64))
    for direction in ("forward", "forward + backward"):
        yield packed(direction, tuple(range(16, 513, 16)))
    yield packed("forward", tuple(len(sentence.split()) * 4 // 3 for sentence in SENTENCES[:32]), text="sentences")
    yield windowed((1, 12, 2048, 64), left=255)
    yield bias_gradient((2, 12, 512, 64))
    yield dropout((1, 12, 512, 64))
    for batch in (1, 8):
        yield decode(batch, heads=32, heads_kv=8, seqlen_k=4096, head_dim=128)
    for block_size in (None, 16):
        yield decode_with_cache(block_size, heads=32, heads_kv=8, seqlen_k=4096, head_dim=128)


# --- The forms -------------------------------------------------------------------------------------------------------


def eager(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """softmax(q kᵀ/√d + mask) v with the scores in memory; ``mask`` as in F.scaled_dot_product_attention."""
    scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
    if causal:
        scores = scores.masked_fill(_above_diagonal(*scores.shape[-2:]), -math.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(-1) @ v


@cache
def _above_diagonal(seqlen_q: int, seqlen_k: int) -> Tensor:
    return torch.ones(seqlen_q, seqlen_k, dtype=torch.bool).triu(1)


def make_qkv(shape: Shape, dtype: str, grad: bool = False) -> list[Tensor]:
    generator = seeded_generator(0)
    return [torch.randn(shape, generator=generator).to(torch_dtype(dtype)).requires_grad_(grad) for _ in range(3)]


def forward_work(shape: Shape, dtype: str, visible: float) -> dict[str, float]:
    """Two GEMMs over the visible share of the scores; q, k, v read and out written."""
    batch, heads, seqlen, head_dim = shape
    elements = batch * heads * seqlen * head_dim
    return {"flops": 4 * visible * elements * seqlen, "bytes": 4 * elements * torch_dtype(dtype).itemsize}


def backward_work(shape: Shape, dtype: str, visible: float) -> dict[str, float]:
    """Five GEMMs; q, k, v, out, dout read and dq, dk, dv written."""
    forward = forward_work(shape, dtype, visible)
    return {"flops": 2.5 * forward["flops"], "bytes": 2 * forward["bytes"]}


def causal_share(seqlen: int) -> float:
    return (seqlen + 1) / (2 * seqlen)


# --- Rows ------------------------------------------------------------------------------------------------------------


def dense(direction: str, shape: Shape, dtype: str, causal: bool) -> Case:
    """No mask but the causal one: forward, backward alone, or both."""
    seqlen = shape[2]
    share = causal_share(seqlen) if causal else 1.0
    forward, backward = forward_work(shape, dtype, share), backward_work(shape, dtype, share)
    work = {
        "forward": forward,
        "backward": backward,
        "forward + backward": {name: forward[name] + backward[name] for name in forward},
    }[direction]
    # Eager's backward over 2048 x 2048 scores takes longer than all the rest of the row.
    slow_eager = direction != "forward" and seqlen > 1024
    variant = "causal" if causal else "full"
    on_the_plot = shape[:2] == (1, 12) and dtype == "float32"
    headline = f"attention {direction}{', causal' if causal else ''}" if on_the_plot and seqlen == 512 else ""
    return Case(
        GROUP, f"attention {direction}", f"{_text(shape)} {variant}", dtype,
        partial(_build_dense, direction, shape, dtype, causal, slow_eager), **work,
        seqlen=seqlen if on_the_plot else None, variant=f"{direction}, {variant}",
        quick=on_the_plot or direction == "forward + backward", headline=headline,
    )  # fmt: skip


def _build_dense(direction: str, shape: Shape, dtype: str, causal: bool, slow_eager: bool) -> Subject:
    forms: dict[str, Callable[..., Tensor]] = {
        "fastattn": partial(fastattn.attention, is_causal=causal),
        "SDPA": partial(F.scaled_dot_product_attention, is_causal=causal),
        "eager": partial(eager, causal=causal),
    }
    inputs = make_qkv(shape, dtype, grad=direction != "forward")
    return build_from_forms(forms, forms["eager"], inputs, direction, {"eager"} if slow_eager else set())


def build_from_forms(
    forms: dict[str, Callable[..., Tensor]],
    definition: Callable[..., Tensor],
    inputs: list[Tensor],
    direction: str,
    untimed: set[str] = frozenset(),
    names: tuple[str, ...] = ("dq", "dk", "dv"),
) -> Subject:
    """A subject from functions of the same tensors, ours under "fastattn"; ``definition`` is what ours must match."""
    dout = torch.randn(definition_shape(inputs), generator=seeded_generator(1)).to(inputs[0].dtype)

    def callee(form: Callable[..., Tensor], tensors: list[Tensor], cotangent: Tensor) -> Callable:
        differentiable = [t for t in tensors if t.requires_grad]
        if direction == "forward":
            return partial(form, *tensors)
        if direction == "backward":
            return partial(gradients, form(*tensors), differentiable, cotangent)
        return lambda: gradients(form(*tensors), differentiable, cotangent)

    timed = {name: callee(form, inputs, dout) for name, form in forms.items() if name not in untimed}
    exact_inputs = like(inputs, torch.float64)
    check = as_accurate_as_eager(
        timed["fastattn"],
        lambda: callee(definition, inputs, dout)(),
        lambda: callee(definition, exact_inputs, dout.double())(),
        ("out",) if direction == "forward" else names,
    )
    return Subject(timed.pop("fastattn"), timed, check)


def definition_shape(inputs: list[Tensor]) -> tuple[int, ...]:
    query, _, value, *_ = inputs
    return (*query.shape[:-1], value.shape[-1])


def half_padded(shape: Shape) -> Case:
    """Sequences of different lengths, padded to the longest: on average half of the keys are padding."""
    batch, _, seqlen, _ = shape
    lengths = torch.linspace(seqlen / (2 * batch), seqlen * (1 - 1 / (2 * batch)), batch).long()
    mask = (torch.arange(seqlen) < lengths[:, None])[:, None, None, :]  # (batch, 1, 1, seqlen)

    def build() -> Subject:
        forms = {
            "fastattn": lambda q, k, v: fastattn.attention(q, k, v, attn_mask=mask),
            "SDPA": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask),
            "eager": lambda q, k, v: eager(q, k, v, mask),
        }
        return build_from_forms(forms, forms["eager"], make_qkv(shape, "float32"), "forward")

    share = mask.double().mean().item()
    return Case(
        GROUP, "attention forward", f"{_text(shape)} half pad", "float32", build,
        **forward_work(shape, "float32", share), quick=True,
        headline="attention, half padding",
    )  # fmt: skip


def packed(direction: str, lengths: tuple[int, ...], text: str = "sequences", heads: int = 12) -> Case:
    """Sequences one behind the other. PyTorch's forms: one call each, and a batch that came padded and stays so."""
    head_dim, total, longest = 64, sum(lengths), max(lengths)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()

    def each(form: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        sequences = zip(*(x.transpose(0, 1)[None].split(lengths, dim=2) for x in (q, k, v)), strict=True)
        return torch.cat([form(*sequence)[0].transpose(0, 1) for sequence in sequences])

    def build() -> Subject:
        forms = {
            "fastattn": lambda q, k, v: fastattn.varlen_attention(q, k, v, cu_seqlens, cu_seqlens, longest, longest),
            "SDPA each": partial(each, F.scaled_dot_product_attention),
            "eager": partial(each, eager),
        }
        grad = direction != "forward"
        inputs = [x.squeeze(0).detach().requires_grad_(grad) for x in make_qkv((1, total, heads, head_dim), "float32")]
        subject = build_from_forms(forms, forms["eager"], inputs, direction, untimed={"eager"})

        padded = make_qkv((len(lengths), heads, longest, head_dim), "float32", grad)
        mask = (torch.arange(longest) < torch.tensor(lengths)[:, None])[:, None, None, :]
        attend = partial(F.scaled_dot_product_attention, *padded, attn_mask=mask)
        dout = torch.ones_like(padded[0])
        subject.peers["SDPA padded"] = partial(_with_gradients, attend, padded, dout) if grad else attend
        return subject

    work = sum(length * length for length in lengths) / total  # the mean of what a row sees
    forward, backward = (f((1, heads, total, head_dim), "float32", 1.0) for f in (forward_work, backward_work))
    flops = (forward["flops"] + (backward["flops"] if direction != "forward" else 0)) * work / total
    return Case(
        GROUP, f"attention {direction}", f"{len(lengths)} packed {text} {min(lengths)} to {longest}", "float32", build,
        flops=flops, bytes=forward["bytes"] + (backward["bytes"] if direction != "forward" else 0), quick=True,
        headline=f"packed {text}{', with backward' if direction != 'forward' else ''}",
    )  # fmt: skip


def _with_gradients(attend: Callable[[], Tensor], inputs: list[Tensor], dout: Tensor) -> tuple[Tensor, ...]:
    return gradients(attend(), inputs, dout)


def windowed(shape: Shape, left: int) -> Case:
    """Causal, and no further back than ``left`` keys; PyTorch's form is a dense boolean mask."""
    seqlen = shape[2]
    visible = torch.ones(seqlen, seqlen, dtype=torch.bool).tril().triu(-left)

    def build() -> Subject:
        forms = {
            "fastattn": lambda q, k, v: fastattn.attention(q, k, v, is_causal=True, window=(left, -1)),
            "SDPA": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=visible),
            "eager": lambda q, k, v: eager(q, k, v, visible),
        }
        # Over 2048 x 2048 masked scores eager takes seconds.
        return build_from_forms(forms, forms["eager"], make_qkv(shape, "float32"), "forward", untimed={"eager"})

    return Case(
        GROUP, "attention forward", f"{_text(shape)} window {left + 1}", "float32", build,
        **forward_work(shape, "float32", visible.double().mean().item()),
    )  # fmt: skip


def bias_gradient(shape: Shape) -> Case:
    """A learned additive bias, one for the batch, as in relative position embeddings."""
    _, heads, seqlen, _ = shape

    def build() -> Subject:
        bias = torch.randn(1, heads, seqlen, seqlen, generator=seeded_generator(2), requires_grad=True)
        forms = {"fastattn": fastattn.attention, "SDPA": F.scaled_dot_product_attention, "eager": eager}
        inputs = [*make_qkv(shape, "float32", grad=True), bias]
        return build_from_forms(forms, eager, inputs, "forward + backward", names=("dq", "dk", "dv", "dbias"))

    forward, backward = forward_work(shape, "float32", 1.0), backward_work(shape, "float32", 1.0)
    bias_bytes = 3 * 4 * heads * seqlen * seqlen  # read twice, its gradient written
    return Case(
        GROUP, "attention forward + backward", f"{_text(shape)} bias grad", "float32", build,
        flops=forward["flops"] + backward["flops"], bytes=forward["bytes"] + backward["bytes"] + bias_bytes, quick=True,
        headline="attention, learned bias, with backward",
    )  # fmt: skip


def dropout(shape: Shape, dropout_p: float = 0.1) -> Case:
    """Dropout of the attention weights, in training's forward pass."""

    def build() -> Subject:
        q, k, v = make_qkv(shape, "float32")

        def eager_dropout() -> Tensor:
            return F.dropout((q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1), dropout_p) @ v

        def seeded(tensors: list[Tensor], backend: str) -> Tensor:
            # The same seed keeps the same elements on every backend, so that dropout too can be compared exactly.
            torch.manual_seed(0)
            return fastattn.attention(*tensors, dropout_p=dropout_p, backend=backend)

        check = as_accurate_as_eager(
            partial(seeded, [q, k, v], "auto"),
            partial(seeded, [q, k, v], "eager"),
            partial(seeded, like([q, k, v], torch.float64), "eager"),
        )
        peers = {
            "SDPA": partial(F.scaled_dot_product_attention, q, k, v, dropout_p=dropout_p),
            "eager": eager_dropout,
        }
        return Subject(partial(fastattn.attention, q, k, v, dropout_p=dropout_p), peers, check)

    return Case(
        GROUP, "attention forward", f"{_text(shape)} dropout {dropout_p}", "float32", build,
        **forward_work(shape, "float32", 1.0), quick=True, headline="attention, dropout",
    )  # fmt: skip


def decode(batch: int, heads: int, heads_kv: int, seqlen_k: int, head_dim: int) -> Case:
    """One new token against a long cache, with grouped queries: bound by reading the keys and values."""

    def build() -> Subject:
        generator = seeded_generator(0)
        q = torch.randn(batch, heads, 1, head_dim, generator=generator)
        k, v = (torch.randn(batch, heads_kv, seqlen_k, head_dim, generator=generator) for _ in range(2))

        def grouped(form: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            """The queries that share a key head as one sequence of queries: each key is read once."""
            return form(q.view(batch, heads_kv, heads // heads_kv, head_dim), k, v).view(batch, heads, 1, head_dim)

        sdpa = F.scaled_dot_product_attention
        peers = {
            "SDPA grouped": partial(grouped, sdpa, q, k, v),
            "SDPA enable_gqa": partial(sdpa, q, k, v, enable_gqa=True),
            "eager grouped": partial(grouped, eager, q, k, v),
        }
        ours = partial(fastattn.attention, q, k, v, enable_gqa=True)

        def definition(dtype: torch.dtype) -> Tensor:
            return eager(q.to(dtype), *(t.to(dtype).repeat_interleave(heads // heads_kv, 1) for t in (k, v)))

        check = as_accurate_as_eager(ours, partial(definition, torch.float32), partial(definition, torch.float64))
        return Subject(ours, peers, check)

    cache_elements = 2 * batch * heads_kv * seqlen_k * head_dim
    return Case(
        GROUP, "attention decode", f"{batch}×{heads}/{heads_kv}×{seqlen_k}×{head_dim}", "float32", build,
        flops=4 * batch * heads * seqlen_k * head_dim, bytes=4 * (cache_elements + 2 * batch * heads * head_dim),
        quick=batch == 1, headline=f"decoding, {seqlen_k} keys, grouped heads" if batch == 1 else "",
    )  # fmt: skip


def decode_with_cache(block_size: int | None, heads: int, heads_kv: int, seqlen_k: int, head_dim: int) -> Case:
    """One new token, appended to a cache as it lies: contiguous, or in shuffled blocks, which PyTorch has to gather."""

    def build() -> Subject:
        generator = seeded_generator(0)
        rows = block_size or seqlen_k
        q, new = (torch.randn(1, 1, n, head_dim, generator=generator) for n in (heads, heads_kv))
        caches = [torch.randn(seqlen_k // rows, rows, heads_kv, head_dim, generator=generator) for _ in range(2)]
        table = torch.randperm(seqlen_k // rows, generator=generator).view(1, -1)
        last = seqlen_k - 1

        def ours() -> Tensor:
            lengths = torch.tensor([last])
            paging = {"block_table": table} if block_size else {}
            return fastattn.attention_with_kv_cache(q, *caches, new, new, cache_seqlens=lengths, **paging)

        def grouped(form: Callable[..., Tensor], dtype: torch.dtype = torch.float32) -> Tensor:
            for each in caches:
                each[table[0, last // rows], last % rows] = new[0, 0]
            k, v = (x[table[0]].flatten(0, 1)[None] if block_size else x for x in caches)
            k, v = (x.transpose(1, 2).to(dtype) for x in (k, v))
            out = form(q.view(1, heads_kv, heads // heads_kv, head_dim).to(dtype), k, v)
            return out.view(1, 1, heads, head_dim)

        sdpa = F.scaled_dot_product_attention
        check = as_accurate_as_eager(ours, partial(grouped, eager), partial(grouped, eager, torch.float64))
        return Subject(ours, {"SDPA grouped": partial(grouped, sdpa)}, check)

    return Case(
        GROUP, "attention decode", f"1×{heads}/{heads_kv}×{seqlen_k}×{head_dim} "
        f"{f'blocks of {block_size}' if block_size else 'cache'}", "float32", build,
        flops=4 * heads * seqlen_k * head_dim, bytes=4 * (2 * heads_kv * seqlen_k + 2 * heads) * head_dim,
        quick=block_size is not None, headline="decoding, paged cache" if block_size else "",
    )  # fmt: skip


def _text(shape: Shape) -> str:
    return "×".join(map(str, shape))
