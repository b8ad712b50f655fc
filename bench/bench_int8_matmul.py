"""INT8 linear layers against torch's dynamic quantisation, each of its engines, and the float32 layer they replace."""

from __future__ import annotations

if __name__ == "__main__":
    import os
    import runpy

    runpy.run_path(os.path.join(os.path.dirname(__file__), "by_path.py"))

from collections.abc import Callable, Iterator
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastattn
from bench.case import Case, Subject, Verdict, as_accurate_as_eager, seeded_generator

GROUP = "int8_matmul"
ACTIVATIONS = {None: lambda x: x, "gelu": F.gelu}
# Built on others in turn: "x86" chooses between the two before it by the shape.
ENGINES = ("fbgemm", "onednn", "x86")


def cases() -> Iterator[Case]:
    for in_features, out_features in ((768, 3072), (4096, 4096)):
        for rows in (1, 32, 128, 512):
            yield linear(rows, in_features, out_features)
    for rows in (32, 512):
        yield linear(rows, 768, 3072, "gelu")


def linear(rows: int, in_features: int, out_features: int, activation: str | None = None) -> Case:
    """A layer as a model calls it: float32 in and out, weights quantised and packed beforehand."""
    quantised_bytes = in_features * out_features + 4 * out_features
    return Case(
        GROUP, f"int8 linear{' + ' + activation if activation else ''}", f"{rows}×{in_features}→{out_features}",
        "float32", partial(build, rows, in_features, out_features, activation),
        flops=2 * rows * in_features * out_features, bytes=quantised_bytes + 4 * rows * (in_features + out_features),
        compute_dtype="int8", quick=in_features == 768 and rows in (1, 32, 512),
        headline=f"int8 linear, {rows} row{'s' if rows > 1 else ''}" if in_features == 768 and not activation else "",
    )  # fmt: skip


def build(rows: int, in_features: int, out_features: int, activation: str | None) -> Subject:
    generator = seeded_generator(0)
    layer = make_linear(in_features, out_features)
    x = torch.randn(rows, in_features, generator=generator)
    ours = fastattn.Int8Linear.from_linear(layer)
    ours.activation = activation
    act = ACTIVATIONS[activation]

    peers: dict[str, Callable[[], Tensor]] = {}
    for engine in ENGINES:
        if engine in torch.backends.quantized.supported_engines:
            quantised = dynamically_quantised(layer, engine)
            peers[f"torch int8 {engine}"] = lambda quantised=quantised: act(quantised(x))
    peers["F.linear float32"] = lambda: act(F.linear(x, layer.weight, layer.bias))
    exact_definition = partial(definition, x, layer, act, torch.float64)
    rule = as_accurate_as_eager(lambda: ours(x), lambda: definition(x, layer, act), exact_definition)

    def check() -> Verdict:
        verdict = rule()
        exact = act(F.linear(x.double(), layer.weight.double(), layer.bias.double()))
        ours_lost, theirs_lost = (relative_error(result, exact) for result in (ours(x), next(iter(peers.values()))()))
        note = f"lost to 8 bits: {ours_lost:.1%}, torch int8 {theirs_lost:.1%}"
        return Verdict(verdict.error, verdict.allowed, note)

    return Subject(lambda: ours(x), peers, check)


def definition(x: Tensor, layer: nn.Linear, act: Callable, dtype: torch.dtype = torch.float32) -> Tensor:
    """What an INT8 linear means: both operands rounded to 8 bits, each row with its scale, the product exact."""
    q, scale = fastattn.quantize_int8(x, backend="eager")
    weight_q, weight_scale = fastattn.quantize_int8(layer.weight, backend="eager")
    # float64 holds every int8 product and sum exactly, and multiplies faster than integers do.
    product = (q.double() @ weight_q.double().T).to(dtype)
    return act(product * scale.to(dtype)[:, None] * weight_scale.to(dtype) + layer.bias.to(dtype))


def relative_error(actual: Tensor, exact: Tensor) -> float:
    return ((actual.double() - exact).norm() / exact.norm()).item()


@cache
def make_linear(in_features: int, out_features: int) -> nn.Linear:
    """The same layer for each number of rows; normal weights as trained ones roughly are."""
    generator = seeded_generator(1)
    layer = nn.Linear(in_features, out_features).requires_grad_(False)
    layer.weight.normal_(std=in_features**-0.5, generator=generator)
    layer.bias.normal_(std=0.1, generator=generator)
    return layer


def dynamically_quantised(model: nn.Module, engine: str) -> nn.Module:
    """A copy of ``model`` with its Linear layers quantised by one of torch's engines; the engine packs the weights."""
    import warnings

    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = engine
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.ao.quantization announces its successor, which has no CPU kernels
            wrapped = torch.ao.quantization.quantize_dynamic(nn.Sequential(model), {nn.Linear}, torch.qint8)
        return wrapped[0]
    finally:
        torch.backends.quantized.engine = before
