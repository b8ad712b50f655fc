"""Whole modules and a pretrained model: what fastattn.accelerate gives, against PyTorch's own fast paths."""

from __future__ import annotations

if __name__ == "__main__":
    import os
    import runpy

    runpy.run_path(os.path.join(os.path.dirname(__file__), "by_path.py"))

import copy
from collections.abc import Callable, Iterator
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastattn
from bench import bench_generation, bench_training, peer_ctranslate2
from bench.bench_int8_matmul import ENGINES, dynamically_quantised
from bench.case import Case, Subject, Verdict, as_accurate_as_eager, seeded_generator
from bench.sentences import SENTENCES
from models.minilm import SentenceEncoder, find_weights, mean_pool, tokenize

GROUP = "models"
EMBED_DIM, HEADS, FEED_FORWARD = 768, 12, 3072  # BERT-base
# Between the outputs of an INT8 model and of the same model in float64. Very short texts suffer most from 8 bits.
MIN_COSINE, MIN_COSINE_OF_ANY = 0.99, 0.95


def cases() -> Iterator[Case]:
    for seqlen, padded in ((128, False), (512, False), (512, True)):
        yield multi_head_attention(4 if padded else 1, seqlen, padded)
    for seqlen in (128, 512):
        yield multi_head_attention_training(seqlen)
    for seqlen in (128, 512):
        for int8 in (False, True):
            yield encoder_layer(seqlen, int8)
    if find_weights() is not None:
        for batch in (1, 32):
            for int8 in (False, True):
                yield minilm(batch, int8)
    yield from bench_generation.cases()
    yield from bench_training.cases()


def accelerated(model: nn.Module, int8: bool = False) -> nn.Module:
    """A swapped copy, linear layers included."""
    return fastattn.accelerate(copy.deepcopy(model), int8=int8, linear=True, verbose=False)


# --- nn.MultiheadAttention -------------------------------------------------------------------------------------------


def multi_head_attention(batch: int, seqlen: int, padded: bool) -> Case:
    """Self-attention in inference. torch's fast path is slower with padding than its ordinary path: both are peers."""

    def build() -> Subject:
        theirs = make_attention().eval().requires_grad_(False)
        ours = accelerated(theirs)
        x = make_input(batch, seqlen)
        kept = padding(batch, seqlen) if padded else torch.ones(batch, seqlen, dtype=torch.bool)
        ignored = ~kept if padded else None

        def call(module: nn.Module, x: Tensor = x) -> Tensor:
            return module(x, x, x, key_padding_mask=ignored, need_weights=False)[0]

        check = as_accurate_as_eager(
            lambda: call(ours)[kept],
            lambda: call(theirs)[kept],
            lambda: call(copy.deepcopy(theirs).double(), x.double())[kept],
        )
        peers = {"nn.MHA": partial(call, theirs)}
        if padded:
            peers["nn.MHA not fused"] = without_fast_path(partial(call, theirs))
        return Subject(partial(call, ours), peers, check)

    return Case(
        GROUP, "MultiheadAttention", f"{batch}×{seqlen}×{EMBED_DIM}{' padded' if padded else ''}", "float32",
        build, flops=attention_flops(batch, seqlen), bytes=4 * (4 * EMBED_DIM**2 + 2 * batch * seqlen * EMBED_DIM),
        quick=padded, headline="nn.MultiheadAttention, half padding" if padded else "",
    )  # fmt: skip


def multi_head_attention_training(seqlen: int) -> Case:
    """Forward and backward, with gradients of the input and of every parameter."""

    def build() -> Subject:
        theirs = make_attention().train()
        ours = accelerated(theirs)
        exact = copy.deepcopy(theirs).double()
        x, dout = make_input(1, seqlen), make_input(1, seqlen, seed=2)

        def step(module: nn.Module, x: Tensor, dout: Tensor) -> tuple[Tensor, ...]:
            x = x.detach().requires_grad_()
            out = module(x, x, x, need_weights=False)[0]
            return torch.autograd.grad(out, [x, *module.parameters()], dout)

        check = as_accurate_as_eager(
            partial(step, ours, x, dout), partial(step, theirs, x, dout),
            partial(step, exact, x.double(), dout.double()), ["dx", *(f"d{n}" for n, _ in theirs.named_parameters())],
        )  # fmt: skip
        return Subject(
            partial(step, ours, x, dout), {"nn.MHA": partial(step, theirs, x, dout)}, check
        )  # fmt: skip

    return Case(
        GROUP, "MultiheadAttention training", f"1×{seqlen}×{EMBED_DIM}", "float32", build,
        flops=3 * attention_flops(1, seqlen), bytes=8 * (4 * EMBED_DIM**2 + 2 * seqlen * EMBED_DIM),
        quick=seqlen == 512,
    )  # fmt: skip


def attention_flops(batch: int, seqlen: int) -> float:
    return batch * (8 * seqlen * EMBED_DIM**2 + 4 * seqlen**2 * EMBED_DIM)


def make_attention() -> nn.MultiheadAttention:
    torch.manual_seed(0)
    return nn.MultiheadAttention(EMBED_DIM, HEADS, batch_first=True)


def make_input(batch: int, seqlen: int, seed: int = 1) -> Tensor:
    return torch.randn(batch, seqlen, EMBED_DIM, generator=seeded_generator(seed))


def padding(batch: int, seqlen: int) -> Tensor:
    """(batch, seqlen), True where there is a token: lengths spread evenly, half of the whole."""
    lengths = torch.linspace(seqlen / (2 * batch), seqlen * (1 - 1 / (2 * batch)), batch).long()
    return torch.arange(seqlen) < lengths[:, None]


def without_fast_path(callee: Callable[[], Tensor]) -> Callable[[], Tensor]:
    def call() -> Tensor:
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            return callee()
        finally:
            torch.backends.mha.set_fastpath_enabled(True)

    return call


# --- nn.TransformerEncoderLayer --------------------------------------------------------------------------------------


def encoder_layer(seqlen: int, int8: bool) -> Case:
    """One encoder layer in inference, float32 or with INT8 projections."""

    def build() -> Subject:
        torch.manual_seed(0)
        theirs = nn.TransformerEncoderLayer(EMBED_DIM, HEADS, FEED_FORWARD, activation="gelu", batch_first=True)
        theirs = theirs.eval().requires_grad_(False)
        ours = accelerated(theirs, int8)
        x = make_input(1, seqlen)
        exact = copy.deepcopy(theirs).double()
        if int8:
            check = similar(lambda: ours(x), lambda: exact(x.double()))
        else:
            check = as_accurate_as_eager(lambda: ours(x), lambda: theirs(x), lambda: exact(x.double()))
        return Subject(partial(ours, x), {"nn layer": partial(theirs, x)}, check)

    weights = 4 * EMBED_DIM**2 + 2 * EMBED_DIM * FEED_FORWARD
    return Case(
        GROUP, "TransformerEncoderLayer", f"1×{seqlen}×{EMBED_DIM}{' int8' if int8 else ''}", "float32", build,
        flops=attention_flops(1, seqlen) + 4 * seqlen * EMBED_DIM * FEED_FORWARD,
        bytes=(1 if int8 else 4) * weights + 8 * seqlen * EMBED_DIM, compute_dtype="int8" if int8 else None,
        quick=seqlen == 128, headline="nn.TransformerEncoderLayer, int8" if int8 and seqlen == 128 else "",
    )  # fmt: skip


def similar(
    ours: Callable[[], Tensor], exact: Callable[[], Tensor], theirs: dict[str, Callable[[], Tensor]] | None = None,
    remark: str | None = None,
) -> Callable[[], Verdict]:  # fmt: skip
    """The check of INT8 models: their vectors (the last dim) point where the exact ones do, on average and at worst.

    ``theirs``, the peers' INT8, is measured too, for the note; torch's, with one scale a tensor, would not pass.
    """

    def check() -> Verdict:
        reference = exact().double()
        mean, least = similarities(ours(), reference)
        assert mean >= MIN_COSINE, f"mean cosine similarity to float64 is {mean:.4f}, below {MIN_COSINE}"
        assert least >= MIN_COSINE_OF_ANY, f"a cosine similarity to float64 is {least:.4f}, below {MIN_COSINE_OF_ANY}"
        notes = [f"cosine to float64 {mean:.4f}, least {least:.4f}"]
        measured: dict[str, list[str]] = {}
        for name, callee in (theirs or {}).items():
            text = "{:.4f}, least {:.4f}".format(*similarities(callee(), reference))
            measured.setdefault(text, []).append(name)
        notes += [f"{', '.join(names)} {text}" for text, names in measured.items()]
        return Verdict(1 - mean, 1 - MIN_COSINE, "; ".join([*notes, *([remark] if remark else [])]))

    return check


def similarities(actual: Tensor, exact: Tensor) -> tuple[float, float]:
    cosine = F.cosine_similarity(actual.double(), exact, dim=-1)
    return cosine.mean().item(), cosine.min().item()


# --- MiniLM ----------------------------------------------------------------------------------------------------------


@cache
def pretrained() -> SentenceEncoder:
    return SentenceEncoder.from_pretrained().requires_grad_(False)


def minilm(batch: int, int8: bool) -> Case:
    """all-MiniLM-L6-v2 on real sentences of all lengths, padded to the longest of the batch."""
    ids, mask = tokenize(SENTENCES[:batch])
    given = (ids,) if mask.all() else (ids, mask)

    def build() -> Subject:
        theirs = pretrained()
        ours = accelerated(theirs, int8)
        exact = copy.deepcopy(theirs).double()
        peers = {"nn encoder": partial(theirs, *given), "SDPA": partial(sdpa_form, theirs, *given)}
        if int8:
            quantised = quantised_forms(theirs, given)
            missing = peer_ctranslate2.why_missing()
            if missing is None:
                quantised[peer_ctranslate2.NAME] = peer_ctranslate2.minilm(ids, mask)
            peers |= quantised
            check = similar(lambda: ours(*given), lambda: exact(*given), quantised, missing)
        else:
            check = as_accurate_as_eager(lambda: ours(*given), lambda: theirs(*given), lambda: exact(*given))
        peers = {name: in_inference(callee) for name, callee in peers.items()}
        return Subject(in_inference(partial(ours, *given)), peers, check)

    layers, hidden, expanded = 6, 384, 1536
    weights = layers * (4 * hidden**2 + 2 * hidden * expanded)
    lengths = mask.sum(1).double()
    flops = 2 * weights * lengths.sum().item() + 4 * layers * hidden * lengths.square().sum().item()
    density = f", {mask.double().mean():.0%} full" if not mask.all() else ""
    precision = ", int8" if int8 else ""
    return Case(
        GROUP, "MiniLM sentence encoder", f"{batch}×{ids.shape[1]}{density}{precision}", "float32", build, flops=flops,
        bytes=(1 if int8 else 4) * weights, compute_dtype="int8" if int8 else None, quick=True,
        headline=f"MiniLM, {batch} sentence{'s' if batch > 1 else ''}, int8" if int8 else "",
    )  # fmt: skip


def in_inference(callee: Callable[[], Tensor]) -> Callable[[], Tensor]:
    return torch.no_grad()(callee)


def sdpa_form(model: SentenceEncoder, ids: Tensor, mask: Tensor | None = None, layers: list | None = None) -> Tensor:
    """The encoder as model libraries write it: F.scaled_dot_product_attention between linear layers.

    ``layers`` may hold the four projections of each layer as modules (quantised ones) in place of the model's.
    """
    bert = model.encoder
    x = bert.embeddings(ids, None)
    visible = None if mask is None else mask.bool()[:, None, None, :]
    for i, layer in enumerate(bert.encoder.layers):
        qkv, project, expand, contract = layers[i] if layers else projections(layer)
        heads = layer.self_attn.num_heads
        q, k, v = qkv(x).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)  # each (batch, heads, seqlen, head_dim)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
        x = layer.norm1(x + project(attended.transpose(1, 2).flatten(2)))
        x = layer.norm2(x + contract(F.gelu(expand(x))))
    return mean_pool(x, mask)


def projections(layer: nn.TransformerEncoderLayer) -> tuple[Callable[[Tensor], Tensor], ...]:
    attention = layer.self_attn
    qkv = partial(F.linear, weight=attention.in_proj_weight, bias=attention.in_proj_bias)
    project = partial(F.linear, weight=attention.out_proj.weight, bias=attention.out_proj.bias)
    return qkv, project, layer.linear1, layer.linear2


def quantised_forms(model: SentenceEncoder, given: tuple[Tensor, ...]) -> dict[str, Callable[[], Tensor]]:
    """The SDPA form with every projection dynamically quantised, by each engine of torch's."""

    def linear(weight: Tensor, bias: Tensor) -> nn.Linear:
        module = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
        module.weight, module.bias = nn.Parameter(weight, False), nn.Parameter(bias, False)
        return module

    forms = {}
    for engine in ENGINES:
        if engine not in torch.backends.quantized.supported_engines:
            continue
        layers = []
        for layer in model.encoder.encoder.layers:
            attention = layer.self_attn
            modules = [linear(attention.in_proj_weight, attention.in_proj_bias)]
            modules += [linear(attention.out_proj.weight, attention.out_proj.bias), layer.linear1, layer.linear2]
            layers.append([dynamically_quantised(module, engine) for module in modules])
        forms[f"torch int8 {engine}"] = partial(sdpa_form, model, *given, layers=layers)
    return forms
