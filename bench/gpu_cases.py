"""The rows of the table on a GPU: 16-bit, at the sizes of training and serving, beside every peer found here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

import fastattn
from bench import bench_attention, bench_int8_matmul, bench_layer_norm, gpu_models, gpu_peers
from bench.case import Case, Subject, Verdict, as_accurate_as_eager, gradients, like, seeded_generator, torch_dtype

Shape = bench_attention.Shape
# Of the batch and the heads, so much is compared with float64: all scores of long sequences would not fit.
CHECKED_BATCH, CHECKED_HEADS = 1, 2


def cases() -> Iterator[Case]:
    """Every row, in the order of the table."""
    for direction in ("forward", "backward"):
        for shape in ((8, 16, 1024, 64), (4, 16, 4096, 64), (4, 16, 4096, 128), (1, 16, 16384, 128)):
            for causal in (False, True):
                yield attention(direction, shape, "bfloat16", causal)
    yield attention("forward", (4, 16, 4096, 64), "float16", causal=True)
    yield decode(16, heads=32, heads_kv=8, seqlen_k=8192, head_dim=128)
    for direction in ("forward", "backward"):
        for op, rows, columns in (
            ("layer norm", 16384, 768), ("layer norm", 8192, 4096), ("layer norm", 4096, 16384),
            ("rms norm", 8192, 4096), ("add + layer norm", 8192, 4096),
        ):  # fmt: skip
            yield norm(op, direction, rows, columns)
    for rows in (1, 16, 128, 4096):
        yield int8_linear(rows, 4096, 4096)
    yield int8_linear(8192, 4096, 14336)
    yield from gpu_models.cases()


# --- Attention -------------------------------------------------------------------------------------------------------


def attention(direction: str, shape: Shape, dtype: str, causal: bool) -> Case:
    seqlen, variant = shape[2], "causal" if causal else "full"
    share = bench_attention.causal_share(seqlen) if causal else 1.0
    work = bench_attention.forward_work if direction == "forward" else bench_attention.backward_work
    on_the_plot = shape[1:] == (16, seqlen, 128)
    return Case(
        "attention", f"attention {direction}", f"{'×'.join(map(str, shape))} {variant}", dtype,
        partial(build_attention, direction, shape, dtype, causal), **work(shape, dtype, share),
        seqlen=seqlen if on_the_plot else None, variant=f"{direction}, {variant}", quick=seqlen == 4096,
        headline=f"attention {direction}, {variant}" if shape == (4, 16, 4096, 128) else "",
    )  # fmt: skip


def build_attention(direction: str, shape: Shape, dtype: str, causal: bool) -> Subject:
    grad = direction != "forward"
    inputs = bench_attention.make_qkv(shape, dtype, grad)
    dout = torch.randn(shape, generator=seeded_generator(1)).to(inputs[0].dtype)
    ours = partial(fastattn.attention, is_causal=causal)
    definition = partial(bench_attention.eager, causal=causal)

    def callee(form: Callable[..., Tensor], tensors: list[Tensor], cotangent: Tensor) -> Callable[[], Any]:
        return partial(gradients, form(*tensors), tensors, cotangent) if grad else partial(form, *tensors)

    def part(tensor: Tensor) -> Tensor:
        return tensor[:CHECKED_BATCH, :CHECKED_HEADS]

    def few(dtype: torch.dtype | None = None) -> Any:
        """The definition on the part that is checked."""
        tensors = [part(t).detach().to(dtype or t.dtype).requires_grad_(grad) for t in inputs]
        return callee(definition, tensors, part(dout).to(tensors[0].dtype))()

    mine = callee(ours, inputs, dout)

    def checked() -> tuple[Tensor, ...]:
        result = mine()
        return tuple(part(t) for t in (result if isinstance(result, tuple) else (result,)))

    names = ("dq", "dk", "dv") if grad else ("out",)
    check = as_accurate_as_eager(checked, few, partial(few, torch.float64), names)
    forms = gpu_peers.attention_forms(causal)
    callees = gpu_peers.available({name: partial(callee, form) for name, form in forms.items()}, inputs, dout)
    peers = {name: make(inputs, dout) for name, make in callees.items()}
    return Subject(mine, gpu_peers.available(peers), check)


def decode(batch: int, heads: int, heads_kv: int, seqlen_k: int, head_dim: int) -> Case:
    """One new token a sequence against a long cache, with grouped queries: bound by reading the keys and values."""

    def build() -> Subject:
        generator = seeded_generator(0)

        def make(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).bfloat16()

        q, (k, v) = make(batch, heads, 1, head_dim), (make(batch, heads_kv, seqlen_k, head_dim) for _ in range(2))
        ours = partial(fastattn.attention, q, k, v, enable_gqa=True)

        def definition(dtype: torch.dtype) -> Tensor:
            keys, values = (t[:1].to(dtype).repeat_interleave(heads // heads_kv, 1) for t in (k, v))
            return bench_attention.eager(q[:1].to(dtype), keys, values)

        check = as_accurate_as_eager(
            lambda: ours()[:1], partial(definition, q.dtype), partial(definition, torch.float64)
        )
        peers = {name: partial(form, q, k, v) for name, form in gpu_peers.attention_forms(causal=False).items()}
        return Subject(ours, gpu_peers.available(peers), check)

    cache_elements = 2 * batch * heads_kv * seqlen_k * head_dim
    return Case(
        "attention", "attention decode", f"{batch}×{heads}/{heads_kv}×{seqlen_k}×{head_dim}", "bfloat16", build,
        flops=4 * batch * heads * seqlen_k * head_dim, bytes=2 * (cache_elements + 2 * batch * heads * head_dim),
        quick=True, headline=f"decoding, {seqlen_k} keys, grouped heads",
    )  # fmt: skip


# --- Norms -----------------------------------------------------------------------------------------------------------


def norm(op: str, direction: str, rows: int, columns: int, dtype: str = "bfloat16") -> Case:
    plain = bench_layer_norm.norm(op, direction, rows, columns, dtype)
    build = partial(build_norm, op, direction, rows, columns, dtype)
    headline = f"{op} {direction}" if columns == 4096 else ""
    return Case(
        plain.group, plain.op, plain.shape, dtype, build, flops=plain.flops, bytes=plain.bytes, quick=columns == 4096,
        headline=headline,
    )  # fmt: skip


def build_norm(op: str, direction: str, rows: int, columns: int, dtype: str) -> Subject:
    ours, _, definition, activations, weights = bench_layer_norm.forms(op, columns)
    generator, grad = seeded_generator(0), direction == "backward"
    tensors = [torch.randn(rows, columns, generator=generator) for _ in range(activations)]
    tensors += [1 + 0.1 * torch.randn(columns, generator=generator) for _ in weights]
    tensors = [tensor.to(torch_dtype(dtype)).requires_grad_(grad) for tensor in tensors]
    douts = [torch.randn(rows, columns, generator=generator).to(torch_dtype(dtype)) for _ in range(activations)]

    def callee(form: Callable, inputs: list[Tensor], cotangents: list[Tensor]) -> Callable[[], Any]:
        return partial(gradients, form(*inputs), inputs, cotangents) if grad else partial(form, *inputs)

    names = ("out", "new_residual")[:activations]
    if grad:
        names = (*("dx", "dresidual")[:activations], *(f"d{weight}" for weight in weights))
    exact, exact_douts = like(tensors, torch.float64), [dout.double() for dout in douts]
    mine = callee(ours, tensors, douts)
    check = as_accurate_as_eager(
        mine, lambda: callee(definition, tensors, douts)(), lambda: callee(definition, exact, exact_douts)(), names
    )
    makers = {name: partial(callee, form) for name, form in gpu_peers.norm_forms(op).items()}
    peers = {name: make(tensors, douts) for name, make in gpu_peers.available(makers, tensors, douts).items()}
    return Subject(mine, gpu_peers.available(peers), check)


# --- INT8 ------------------------------------------------------------------------------------------------------------


def int8_linear(rows: int, in_features: int, out_features: int) -> Case:
    """A layer as a model calls it: bfloat16 in and out, its input quantised on the way."""
    weight_bytes, activation_bytes = in_features * out_features, 2 * rows * (in_features + out_features)
    return Case(
        "int8_matmul", "int8 linear", f"{rows}×{in_features}→{out_features}", "bfloat16",
        partial(build_int8_linear, rows, in_features, out_features), flops=2 * rows * in_features * out_features,
        bytes=weight_bytes + activation_bytes, compute_dtype="int8", quick=in_features == out_features,
        headline=f"int8 linear, {rows} row{'s' * (rows > 1)}" if in_features == out_features else "",
    )  # fmt: skip


def build_int8_linear(rows: int, in_features: int, out_features: int) -> Subject:
    layer = bench_int8_matmul.make_linear.__wrapped__(in_features, out_features).bfloat16()
    x = torch.randn(rows, in_features, generator=seeded_generator(0)).bfloat16()
    ours = fastattn.Int8Linear.from_linear(layer)
    few = min(rows, 64)

    def definition(dtype: torch.dtype) -> Tensor:
        exact = bench_int8_matmul.definition(x[:few], layer, lambda out: out, dtype)
        return exact if dtype == torch.float64 else exact.to(x.dtype)

    rule = as_accurate_as_eager(
        lambda: ours(x)[:few], partial(definition, torch.float32), partial(definition, torch.float64)
    )

    def check() -> Verdict:
        verdict = rule()
        exact = torch.nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double())
        lost = bench_int8_matmul.relative_error(ours(x), exact)
        return Verdict(verdict.error, verdict.allowed, f"lost to 8 bits: {lost:.1%}")

    forms = gpu_peers.int8_forms(layer, ours.weight, ours.weight_scale)
    peers = {name: partial(form, x) for name, form in forms.items()}
    return Subject(partial(ours, x), gpu_peers.available(peers), check)
