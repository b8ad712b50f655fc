"""Models with fastattn's modules under torch.fx.symbolic_trace, torch.jit.trace and torch.jit.script."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fastattn
from fastattn._extension import extension, missing_reason

DIM = 32


class ForeignRMSNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.rand(DIM)), 1e-6

    def forward(self, x):
        return self.weight * (x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt())


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(DIM), nn.MultiheadAttention(DIM, 4, batch_first=True)

    def forward(self, x):
        y = self.norm(x)
        out, weights = self.attention(y, y, y, average_attn_weights=False)
        return x + out, weights


MODELS = {
    "norms": lambda: nn.Sequential(nn.Linear(DIM, DIM), nn.LayerNorm(DIM), nn.RMSNorm(DIM), ForeignRMSNorm()),
    "linear": lambda: nn.Sequential(nn.LayerNorm(DIM), nn.Linear(DIM, DIM), nn.ReLU(), nn.Linear(DIM, 8)),
    "attention": Attending,
}


@pytest.mark.parametrize("options", [{}, {"linear": True}, {"int8": True}], ids=["float", "linear", "int8"])
@pytest.mark.parametrize("name", MODELS)
def test_fx_traces_our_modules_as_nodes(name, options):
    model = fastattn.accelerate(MODELS[name]().eval(), verbose=False, **options)
    swapped = {n for n, module in model.named_modules() if type(module).__module__.startswith("fastattn.")}
    traced = torch.fx.symbolic_trace(model)
    called = {node.target for node in traced.graph.nodes if node.op == "call_module"}
    assert swapped and {n for n in swapped if not n.startswith("attention.")} <= called
    x = torch.randn(2, 5, DIM)
    with torch.no_grad():
        torch.testing.assert_close(traced(x), model(x), rtol=0, atol=0)


@pytest.mark.parametrize("module", [fastattn.LayerNorm(DIM), fastattn.MultiHeadAttention(DIM, 4)], ids=["norm", "mha"])
def test_fx_says_what_to_do_with_a_module_alone(module):
    with pytest.raises(TypeError, match=r"torch.fx cannot trace into it.*trace torch.nn.Sequential\(module\)"):
        torch.fx.symbolic_trace(module)


@pytest.mark.skipif(extension is None, reason=str(missing_reason))
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("change", ["replaced", "written"])
def test_jit_traces_a_layer_that_packs_its_weight_in_the_call(change):
    """Its check traces once more, with the packed weight that the first trace left."""
    layer = fastattn.Int8Linear.from_linear(nn.Linear(DIM, DIM)).eval()
    with torch.no_grad():
        if change == "replaced":
            layer.weight = layer.weight.flip(0)
        else:
            layer.weight.copy_(layer.weight.flip(0))
        x, other = torch.randn(3, DIM), torch.randn(7, DIM)
        traced = torch.jit.trace(copy.copy(layer), (x,))
        assert torch.equal(traced(other), layer(other))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", MODELS)
def test_scripting_is_refused_with_what_to_do_instead(name):
    model = fastattn.accelerate(MODELS[name](), linear=True, verbose=False)
    with pytest.raises(NotImplementedError, match=r"torch\.jit\.script: fastattn's \w+ .*torch\.jit\.trace"):
        torch.jit.script(model)
    torch.jit.script(fastattn.restore(nn.Sequential(model))[0])
