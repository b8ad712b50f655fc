"""attention under torch.compile, torch.export and opcheck: one graph, the same numbers."""

from __future__ import annotations

import pytest
import torch
from attention_cases import FEATURES, KERNEL_BACKENDS, Case, run
from attention_opcheck import arguments_of, opcheck
from torch._dynamo.testing import CompileCounter

import fastattn

pytestmark = pytest.mark.skipif("cpu" not in KERNEL_BACKENDS, reason=str(fastattn.available_backends()["cpu"]))


@pytest.fixture(autouse=True)
def _forget_compiled_code():
    torch._dynamo.reset()


FEATURES_TO_TRACE = ["plain", "causal_bottom_right_empty_rows", "bool_mask", "float_mask_per_head", "alibi_per_batch",
                     "sinks", "gqa", "everything"]  # fmt: skip


def _small(feature: str) -> Case:
    return Case(**{**vars(FEATURES[feature]), "seqlen_q": 7 + FEATURES[feature].seqlen_q % 4, "seqlen_k": 6})


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("feature", FEATURES_TO_TRACE)
def test_opcheck(feature, transposed):
    arguments = arguments_of(_small(feature))
    if transposed:
        arguments = (*(x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in arguments[:3]),
                     *arguments[3:])  # fmt: skip
    opcheck("attention", arguments)


@pytest.mark.parametrize("backend", ["auto", "cpu", "eager"])
@pytest.mark.parametrize("feature", FEATURES_TO_TRACE)
def test_compiles_to_one_graph(feature, backend):
    case = _small(feature)
    options = {name: value for name, value in case.options.items() if name != "dropout_p"}
    case = Case(**{**vars(case), "options": options})
    inputs = case.inputs(torch.float32)

    def step(**leaves):
        return fastattn.attention(**leaves, enable_gqa=True, return_lse=True, backend=backend, **options)

    expected = run(case, inputs, "eager")
    leaves = {n: t.detach().requires_grad_(t.is_floating_point() and n != "alibi_slopes") for n, t in inputs.items()}
    out, lse = torch.compile(step, fullgraph=True, backend="aot_eager")(**leaves)
    torch.testing.assert_close((out, lse), (expected["out"], expected["lse"]))
    torch.manual_seed(3)
    cotangents = torch.randn(out.shape), torch.randn(lse.shape)
    learned = [name for name, leaf in leaves.items() if leaf.requires_grad]
    for name, gradient in zip(
        learned, torch.autograd.grad((out, lse), [leaves[n] for n in learned], cotangents), strict=True
    ):
        torch.testing.assert_close(gradient, expected[f"d{name}"], rtol=1e-4, atol=1e-4)


def test_compiles_with_inductor():
    q, k, v = (torch.randn(2, 20, 4, 16, requires_grad=True) for _ in range(3))

    def step(q, k, v):
        q, k, v = (x.transpose(1, 2) * 2 for x in (q, k, v))
        return fastattn.attention(q, k, v, is_causal=True).transpose(1, 2).reshape(2, 20, 64).relu()

    expected, actual = step(q, k, v), torch.compile(step, fullgraph=True)(q, k, v)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(
        torch.autograd.grad(actual.sum(), (q, k, v)),
        torch.autograd.grad(expected.sum(), (q, k, v)),
        rtol=1e-4,
        atol=1e-5,
    )


def test_one_graph_serves_every_length():
    counter = CompileCounter()
    step = torch.compile(
        lambda q, k: fastattn.attention(q, k, k, is_causal=True, alignment="bottom_right", window=(9, -1)),
        fullgraph=True, dynamic=True, backend=counter,
    )  # fmt: skip
    for seqlen_q, seqlen_k in ((5, 9), (17, 33), (64, 65), (100, 40)):
        q, k = torch.randn(2, 3, seqlen_q, 8), torch.randn(2, 3, seqlen_k, 8)
        expected = fastattn.attention(q, k, k, is_causal=True, alignment="bottom_right", window=(9, -1))
        torch.testing.assert_close(step(q, k), expected)
    assert counter.frame_count == 1


def test_compiled_dropout_draws_anew_each_time():
    q = torch.randn(1, 2, 40, 8)
    step = torch.compile(
        lambda q: (fastattn.attention(q, q, q, dropout_p=0.5), fastattn.attention(q, q, q, dropout_p=0.5)),
        fullgraph=True, backend="aot_eager",
    )  # fmt: skip
    first, second = step(q)
    assert not torch.equal(first, second) and not torch.equal(step(q)[0], first)


class _Block(torch.nn.Module):
    def forward(self, q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return fastattn.attention(q, k, k, mask, is_causal=True)


def test_exports_with_dynamic_lengths():
    q, k, mask = torch.randn(2, 3, 10, 8), torch.randn(2, 3, 12, 8), torch.rand(2, 1, 1, 12) > 0.3
    seqlen_q, seqlen_k = torch.export.Dim("seqlen_q", min=2, max=512), torch.export.Dim("seqlen_k", min=2, max=512)
    shapes = {"q": {2: seqlen_q}, "k": {2: seqlen_k}, "mask": {3: seqlen_k}}
    exported = torch.export.export(_Block(), (q, k, mask), dynamic_shapes=shapes).module()
    q, k, mask = torch.randn(2, 3, 70, 8), torch.randn(2, 3, 33, 8), torch.rand(2, 1, 1, 33) > 0.3
    torch.testing.assert_close(exported(q, k, mask), _Block()(q, k, mask))


class _DroppingBlock(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, _ = fastattn.add_rms_norm(x, x, 8, dropout_p=0.3, backend="eager")
        return fastattn.attention(x, x, x, dropout_p=0.3, backend="eager")


def test_eager_dropout_exports_with_dynamic_lengths():
    sizes = {0: torch.export.Dim("batch", min=1, max=64), 2: torch.export.Dim("seqlen", min=2, max=512)}
    program = torch.export.export(_DroppingBlock(), (torch.randn(2, 3, 9, 8),), dynamic_shapes={"x": sizes})
    x = torch.randn(3, 3, 70, 8)
    torch.manual_seed(0)
    expected = _DroppingBlock()(x)
    torch.manual_seed(0)
    torch.testing.assert_close(program.module()(x), expected)


@torch._dynamo.config.patch(capture_scalar_outputs=True)
def test_one_graph_finds_the_longest_sequence():
    def step(q, starts):
        longest = starts.diff().max().item()
        return fastattn.varlen_attention(q, q, q, starts, starts, longest, longest, is_causal=True)

    q, compiled = torch.randn(10, 2, 8), torch.compile(step, fullgraph=True, backend="aot_eager")
    for starts in (torch.tensor([0, 3, 3, 10]), torch.tensor([0, 4, 8, 10])):
        torch.testing.assert_close(compiled(q, starts), step(q, starts))


def test_compiled_code_follows_use_backend():
    counter = CompileCounter()
    step = torch.compile(lambda q: fastattn.attention(q, q, q), fullgraph=True, backend=counter)
    q = torch.randn(1, 2, 5, 8)
    step(q)
    with fastattn.use_backend("eager"):
        step(q)
    step(q)
    assert counter.frame_count == 2
