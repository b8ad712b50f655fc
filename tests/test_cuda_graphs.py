"""What a CUDA graph captures of the ops is right for other contents of the same memory: nothing that the host read or
made is baked in. On a GPU by real graphs, without one by the emulator's stand-in (csrc/common/graph_emulated.cpp)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from test_ecosystem import DIM, Block
from torch import Tensor

import fastattn

BACKEND = "cuda" if fastattn.available_backends()["cuda"] is None else "emulated"
DEVICE = "cuda" if BACKEND == "cuda" else "cpu"
pytestmark = pytest.mark.skipif(
    fastattn.available_backends()[BACKEND] is not None,
    reason=f"no CUDA kernels: {fastattn.available_backends()[BACKEND]}",
)
Results = tuple[Tensor, ...]
Step = Callable[..., Results]


class Graph:
    """``torch.cuda.CUDAGraph``, or the emulator's."""

    def __init__(self) -> None:
        self.graph = torch.cuda.CUDAGraph() if BACKEND == "cuda" else torch.classes.fastattn.EmulatedGraph()
        self.replay = self.graph.replay

    @contextmanager
    def recording(self) -> Iterator[None]:
        if BACKEND == "cuda":
            with torch.cuda.graph(self.graph):
                yield
            return
        self.graph.begin()
        try:
            yield
        finally:
            self.graph.end()


def warm_up(step: Callable[[], object]) -> None:
    """Compiles, loads, sets up: what a capture must not find undone."""
    if BACKEND == "emulated":
        step()
        return
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)


def replayed(step: Step, inputs: dict[str, Tensor], others: dict[str, Tensor]) -> tuple[Results, Results]:
    """What a graph of ``step(**inputs)`` makes of the contents of ``others``, and what a call makes of them."""
    own = {name: t.clone().requires_grad_(t.is_floating_point()) for name, t in inputs.items()}
    warm_up(lambda: step(**own))
    with torch.no_grad():
        for name, tensor in inputs.items():
            own[name].copy_(tensor)  # those that the step writes to
    graph = Graph()
    with graph.recording():
        captured = step(**own)
    with torch.no_grad():
        for name, tensor in others.items():
            own[name].copy_(tensor)
    torch.manual_seed(7)
    graph.replay()
    torch.manual_seed(7)
    return captured, step(**{name: t.clone().requires_grad_(t.is_floating_point()) for name, t in others.items()})


def check(step: Step, make: Callable[[], dict[str, Tensor]]) -> None:
    inputs, others = make(), make()
    captured, expected = replayed(step, inputs, others)
    for index, (actual, wanted) in enumerate(zip(captured, expected, strict=True)):
        assert not actual.isnan().any(), f"result {index} has elements that the replay did not write"
        torch.testing.assert_close(actual, wanted, rtol=0, atol=0, msg=lambda text, i=index: f"result {i}: {text}")


def with_gradients(out: Tensor | Results, *leaves: Tensor) -> Results:
    """The results, and gradients of the leaves for cotangents that are no constant."""
    out = (out,) if isinstance(out, Tensor) else out
    total = sum((t.float() * t.float().cos()).sum() for t in out)
    return (*(t.detach() for t in out), *torch.autograd.grad(total, leaves))


def randn(*shape: int, dtype: torch.dtype = torch.half) -> Tensor:
    return torch.randn(*shape).to(DEVICE, dtype)


def qkv(heads: int = 4, heads_kv: int = 2, seqlen: int = 40) -> dict[str, Tensor]:
    return {
        "query": randn(2, heads, seqlen, 16),
        "key": randn(2, heads_kv, seqlen, 16),
        "value": randn(2, heads_kv, seqlen, 16),
    }


# --- The ops ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_attention(dropout_p):
    def step(query, key, value, mask, sinks):
        out, lse = fastattn.attention(
            query, key, value, mask, dropout_p, is_causal=True, enable_gqa=True, sinks=sinks, return_lse=True,
            backend=BACKEND,
        )  # fmt: skip
        return with_gradients((out, lse), query, key, value, mask, sinks)

    check(step, lambda: {**qkv(), "mask": randn(2, 1, 40, 40), "sinks": randn(4)})


def test_attention_with_a_bool_mask():
    """Whose tiles are sorted out on the device."""

    def step(query, key, value, mask):
        return with_gradients(fastattn.attention(query, key, value, mask, backend=BACKEND), query, key, value)

    check(step, lambda: {**qkv(2, 2), "mask": (torch.rand(40, 40) < 0.5).to(DEVICE)})


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_norms(dropout_p):
    def step(x, residual, weight, bias):
        out, added = fastattn.add_layer_norm(x, residual, (72,), weight, bias, dropout_p=dropout_p, backend=BACKEND)
        return with_gradients((out, added, fastattn.rms_norm(added, (72,), weight, backend=BACKEND)), x, weight, bias)

    check(step, lambda: {"x": randn(9, 72), "residual": randn(9, 72), "weight": randn(72), "bias": randn(72)})


def test_int8_linear():
    weight, scale = fastattn.quantize_int8(randn(40, 64, dtype=torch.float32), backend="eager")

    def step(x, bias):
        out = fastattn.int8_linear(x, weight, scale, bias, activation="gelu", backend=BACKEND)
        return with_gradients(out, x)

    check(step, lambda: {"x": randn(6, 64), "bias": randn(40)})


def test_attention_with_kv_cache():
    """Lengths are contents: a graph of one decoding step serves every step."""

    def step(query, key, value, key_cache, value_cache, lengths):
        query, key, value, key_cache, value_cache = (t.detach() for t in (query, key, value, key_cache, value_cache))
        out = fastattn.attention_with_kv_cache(
            query, key_cache, value_cache, key, value, cache_seqlens=lengths, backend=BACKEND
        )
        return out, key_cache.clone(), value_cache.clone()

    def make():
        new, cache = (2, 1, 2, 16), (2, 50, 2, 16)
        lengths = torch.randint(3, 48, (2,), dtype=torch.int32).to(DEVICE)
        tensors = {"key": randn(*new), "value": randn(*new), "key_cache": randn(*cache), "value_cache": randn(*cache)}
        return {"query": randn(2, 1, 4, 16), **tensors, "lengths": lengths}

    check(step, make)


def test_varlen_attention():
    def step(query, key, value, bounds):
        out = fastattn.varlen_attention(query, key, value, bounds, bounds, 30, 30, is_causal=True, backend=BACKEND)
        return with_gradients(out, query, key, value)

    def make():
        bounds = torch.tensor([0, torch.randint(10, 30, ()).item(), 40], dtype=torch.int32).to(DEVICE)
        return {**{name: randn(40, 2, 16) for name in ("query", "key", "value")}, "bounds": bounds}

    check(step, make)


def test_modules():
    block = Block(fastattn).to(DEVICE, torch.half)

    def step(x):
        with fastattn.use_backend(BACKEND):
            return with_gradients(block(x), x, *block.parameters())

    check(step, lambda: {"x": randn(2, 33, DIM)})


# --- The emulator's graph --------------------------------------------------------------------------------------------

only_emulated = pytest.mark.skipif(BACKEND == "cuda", reason="a device has graphs of its own")


@only_emulated
def test_a_length_that_the_host_read_shows():
    def step(query, key, value, lengths):
        longest = lengths.tolist()[0]  # no op: nothing could refuse it
        return (fastattn.attention(query, key[:, :, :longest], value[:, :, :longest], backend=BACKEND).detach(),)

    def make(length):
        return {**qkv(2, 2), "lengths": torch.tensor([length])}

    captured, expected = replayed(step, make(20), make(30))
    assert not torch.equal(*captured, *expected)


@only_emulated
def test_a_value_that_the_host_made_shows():
    def step(query, key, value):
        seed = torch.randint(100, ()).tolist()
        return (fastattn.attention(query, key, value, torch.tensor(float(seed)), backend=BACKEND).detach(),)

    captured, expected = replayed(step, qkv(2, 2), qkv(2, 2))
    assert captured[0].isnan().any() or not torch.equal(*captured, *expected)


@only_emulated
def test_reading_a_tensor_on_the_host_is_refused():
    x, graph = torch.ones(3), Graph()
    for read in (lambda: x.sum().item(), lambda: bool(x.sum() > 0), lambda: x.nonzero(), lambda: torch.equal(x, x)):
        with graph.recording(), pytest.raises(RuntimeError, match="a CUDA graph cannot capture it"):
            read()


@only_emulated
def test_a_replay_is_made_of_launches_and_of_pytorchs_ops():
    before, graph = fastattn._extension.extension.emulated_launches(), Graph()
    x, weight = randn(5, 64), randn(64)
    with graph.recording():
        out = fastattn.rms_norm(x.neg(), (64,), weight, backend=BACKEND)
    assert graph.graph.steps() >= 2, "neg and a launch"
    recorded = fastattn._extension.extension.emulated_launches() - before
    x.mul_(3)
    graph.replay()
    assert fastattn._extension.extension.emulated_launches() - before == 2 * recorded
    assert torch.equal(out, fastattn.rms_norm(x.neg(), (64,), weight, backend=BACKEND))
