"""The norms' nodes in autograd's graph keep the promises of any other node."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch._dynamo.compiled_autograd as compiled_autograd
from layer_norm_cases import OPS, make_inputs, needs_cpu
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import fastattn

pytestmark = needs_cpu
COLS = 97
every_op = pytest.mark.parametrize("op", OPS)


def make_leaves(op: str) -> dict[str, Tensor]:
    return {name: t.requires_grad_() for name, t in make_inputs(op, (6, COLS), torch.float32).items()}


def norm(op: str, leaves: dict[str, Tensor], backend: str = "cpu") -> Tensor:
    """``op``'s output, both of them added up where there are two."""
    outputs = getattr(fastattn, op)(normalized_shape=COLS, backend=backend, **leaves)
    return outputs[0] + 0.5 * outputs[1] if isinstance(outputs, tuple) else outputs


def node_of(out: Tensor):
    """The norm's node, below the sum of its outputs if there are two."""
    while "LayerNormFunction" not in out.grad_fn.name():
        out = type("", (), {"grad_fn": out.grad_fn.next_functions[0][0]})
    return out.grad_fn


def gradients(op: str, leaves: dict[str, Tensor], backend: str = "cpu") -> tuple[Tensor, ...]:
    return torch.autograd.grad(norm(op, leaves, backend).square().sum(), tuple(leaves.values()))


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@every_op
def test_a_saved_tensor_that_was_changed_is_an_error(op):
    leaves = make_leaves(op)
    inputs = {**leaves, "input": leaves["input"] * 1, "weight": leaves["weight"] * 1}
    for name in ["weight"] if op.startswith("add") else ["weight", "input"]:  # add_* saves what it computed
        out = norm(op, inputs)
        inputs[name].detach().add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()


@every_op
def test_the_graph_serves_twice_only_if_it_is_kept(op):
    leaves = make_leaves(op)
    out = norm(op, leaves).square().sum()
    kept = torch.autograd.grad(out, tuple(leaves.values()), retain_graph=True)
    freed = torch.autograd.grad(out, tuple(leaves.values()))
    for first, second in zip(kept, freed, strict=True):
        assert torch.equal(first, second)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(out, tuple(leaves.values()))


@every_op
def test_gradients_of_some_of_the_leaves(op):
    leaves = make_leaves(op)
    every = dict(zip(leaves, gradients(op, leaves), strict=True))
    for name, leaf in leaves.items():
        (alone,) = torch.autograd.grad(norm(op, leaves).square().sum(), leaf)
        assert torch.equal(alone, every[name])


@every_op
def test_a_missing_gradient_counts_as_zeros(op):
    class Swallow(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return None

    leaves = make_leaves(op)
    Swallow.apply(norm(op, leaves)).sum().backward()
    for leaf in leaves.values():
        assert leaf.grad is None or not leaf.grad.any()


@every_op
def test_hooks_of_the_node_see_a_gradient_for_each_tensor(op):
    leaves = make_leaves(op)
    out = norm(op, leaves)
    seen = []
    node = node_of(out)
    node.register_prehook(lambda incoming: seen.append(len(incoming)))
    node.register_hook(lambda results, incoming: seen.append([tuple(result.shape) for result in results]))
    out.sum().backward()
    assert seen == [2 if op.startswith("add") else 1, [tuple(leaf.shape) for leaf in leaves.values()]]


@every_op
def test_parameters_take_over_their_gradients_without_a_copy(op):
    leaves = make_leaves(op)
    addresses = {}
    for name, leaf in leaves.items():
        leaf.register_hook(lambda gradient, name=name: addresses.__setitem__(name, gradient.data_ptr()))
    norm(op, leaves).sum().backward()
    for name in ("weight", "bias"):
        if name in leaves:
            assert leaves[name].grad.data_ptr() == addresses[name]


@every_op
def test_hooks_of_saved_tensors_compute_like_any_code(op):
    tracked = []

    def unpack(tensor: Tensor) -> Tensor:
        with torch.enable_grad():
            tracked.append((tensor.detach().requires_grad_() * 1).requires_grad)
        return tensor

    leaves = make_leaves(op)
    expected = gradients(op, leaves)
    with saved_tensors_hooks(lambda tensor: tensor.clone(), unpack):
        actual = gradients(op, leaves)
    assert_close(actual, expected)
    assert len(tracked) >= 3 and all(tracked)


@every_op
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoints(op, use_reentrant):
    leaves = make_leaves(op)
    expected = gradients(op, leaves)
    checkpoint(lambda *t: norm(op, dict(zip(leaves, t, strict=True))), *leaves.values(),
               use_reentrant=use_reentrant).square().sum().backward()  # fmt: skip
    assert_close(tuple(leaf.grad for leaf in leaves.values()), expected)


@every_op
def test_threads_share_a_graph(op):
    leaves = make_leaves(op)
    expected = gradients(op, leaves)
    out = norm(op, leaves).square().sum()
    with ThreadPoolExecutor(4) as pool:
        calls = [pool.submit(torch.autograd.grad, out, tuple(leaves.values()), retain_graph=True) for _ in range(32)]
        for call in calls:
            for actual, each in zip(call.result(), expected, strict=True):
                assert torch.equal(actual, each)


@every_op
@pytest.mark.filterwarnings("ignore")  # the mode itself warns, and prints the call that made the node
def test_anomaly_mode_names_the_node(op):
    leaves = make_leaves(op)
    leaves["weight"].detach().fill_(float("nan"))
    with torch.autograd.detect_anomaly(), pytest.raises(RuntimeError, match=r"LayerNormFunction.*returned nan"):
        norm(op, leaves).sum().backward()


@every_op
def test_compiled_autograd(op):
    leaves = make_leaves(op)
    expected = gradients(op, leaves)
    out = norm(op, leaves).square().sum()
    with compiled_autograd._enable(lambda graph: torch.compile(graph, backend="eager")):
        out.backward()
    assert_close(tuple(leaf.grad for leaf in leaves.values()), expected)
