"""Encoder layers that ``accelerate(model, int8=True)`` has compute themselves in one call."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn

import fastattn
from fastattn._extension import extension
from fastattn.int8_encoder import Int8EncoderLayer

pytestmark = pytest.mark.skipif(extension is None, reason="the one call is the compiled extension's")

EMBED, HEADS = 48, 4


def make_layer(**options) -> Int8EncoderLayer:
    torch.manual_seed(0)
    settings = {"activation": "gelu", "batch_first": True, **options}
    layer = nn.TransformerEncoderLayer(EMBED, HEADS, 96, **settings).eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(0, 0.3)  # biases and norms that are not 0 and 1
    layer = fastattn.accelerate(layer, int8=True, verbose=False)
    assert type(layer) is Int8EncoderLayer
    return layer


def by_modules(layer: Int8EncoderLayer, x: torch.Tensor) -> torch.Tensor:
    return nn.TransformerEncoderLayer.forward(layer, x)


@pytest.fixture(autouse=True)
def inference():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("shape", [(1, 1), (2, 15), (3, 64), (7,)], ids=str)
@pytest.mark.parametrize("options", [{}, {"norm_first": True}, {"bias": False}, {"activation": "relu"}], ids=str)
def test_one_call_gives_what_the_modules_give(shape, options, cpu_isa):
    layer, x = make_layer(**options), torch.randn(*shape, EMBED)
    before = x.clone()
    out = layer.in_one_call(x)
    # Not equal: the one call adds and normalises in one op.
    torch.testing.assert_close(out, by_modules(layer, x), rtol=1e-5, atol=1e-5)
    assert torch.equal(layer(x), out) and torch.equal(x, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_one_call_in_other_dtypes(dtype):
    layer, x = make_layer().to(dtype), torch.randn(2, 9, EMBED, dtype=dtype)
    out = layer.in_one_call(x)
    assert out.dtype == dtype
    exact = by_modules(copy.deepcopy(layer).double(), x.double())
    error, allowed = (out - exact).abs().max(), (by_modules(layer, x) - exact).abs().max()
    assert error <= 2 * allowed + torch.finfo(dtype).eps * exact.abs().max()


def test_one_call_reads_any_strides():
    layer, x = make_layer(), torch.randn(15, 2, EMBED).transpose(0, 1)
    torch.testing.assert_close(layer.in_one_call(x), layer.in_one_call(x.contiguous()), rtol=0, atol=0)


def test_large_inputs_are_projected_one_by_one():
    # The joint projection's result would be 1 MiB.
    layer, x = make_layer(), torch.randn(1, 1900, EMBED)
    torch.testing.assert_close(layer.in_one_call(x), by_modules(layer, x), rtol=1e-5, atol=1e-5)


CHANGES = {
    "weight in place": lambda layer: layer.linear2.weight.neg_(),
    "weight replaced": lambda layer: setattr(layer.linear1, "weight", layer.linear1.weight.neg()),
    "projection's weight in place": lambda layer: layer.self_attn.k_proj.weight.neg_(),
    "scale in place": lambda layer: layer.self_attn.v_proj.weight_scale.mul_(3),
    "bias in place": lambda layer: layer.self_attn.q_proj.bias.add_(1),
    "bias's data": lambda layer: setattr(layer.self_attn.q_proj.bias, "data", layer.self_attn.q_proj.bias + 1),
    "bias removed": lambda layer: setattr(layer.linear1, "bias", None),
    "norm in place": lambda layer: layer.norm1.weight.mul_(2),
    "norm's bias replaced": lambda layer: setattr(layer.norm2, "bias", nn.Parameter(layer.norm2.bias + 1)),
    "eps": lambda layer: setattr(layer.norm2, "eps", 1.0),
    "order": lambda layer: setattr(layer, "norm_first", True),
    "module replaced": lambda layer: setattr(layer, "linear2", copy.deepcopy(layer.linear2)),
    "module's module replaced": lambda layer: setattr(layer.self_attn, "out_proj", nn.Linear(EMBED, EMBED)),
    "activation": lambda layer: setattr(layer, "activation", torch.tanh),
    "class": lambda layer: setattr(layer.norm1, "__class__", nn.LayerNorm),
    "state": lambda layer: layer.load_state_dict({k: v + 1 for k, v in layer.state_dict().items()}),
    "window": lambda layer: setattr(layer.self_attn, "window", (1, 1)),
    "forward": lambda layer: setattr(layer.norm1, "forward", torch.zeros_like),
    "hook": lambda layer: layer.linear1.register_forward_hook(lambda module, inputs, out: -out),
    "hook before": lambda layer: layer.self_attn.register_forward_pre_hook(
        lambda module, inputs, options: ((inputs[0] + 1, *inputs[1:]), options), with_kwargs=True
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_noticed(change):
    layer, x = make_layer(), torch.randn(2, 15, EMBED)
    before = layer(x)
    CHANGES[change](layer)
    after = layer(x)
    torch.testing.assert_close(after, by_modules(layer, x), rtol=1e-5, atol=1e-5)
    if change != "class" and change != "module replaced":
        assert (after - before).abs().max() > 0.01


def test_dropout_drops_again_in_training():
    layer, x = make_layer(dropout=0.5), torch.randn(2, 15, EMBED)
    assert layer.in_one_call(x) is not None
    layer.train()
    assert layer.in_one_call(x) is None and not torch.equal(layer(x), layer(x))
    layer.eval()
    layer.dropout1.train()
    assert layer.in_one_call(x) is None
    layer.eval()
    assert layer.in_one_call(x) is not None


def test_hooks_of_all_modules_are_called():
    layer, x, seen = make_layer(), torch.randn(2, 15, EMBED), []
    layer(x)
    with nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module).__name__)):
        layer(x)
    assert "LayerNorm" in seen and seen.count("Int8Linear") == 4
    assert layer.in_one_call(x) is not None


def test_gradients_masks_backends_and_autocast_go_to_the_modules():
    layer, x = make_layer(), torch.randn(2, 15, EMBED)
    assert layer.in_one_call(x) is not None
    with torch.enable_grad():
        assert layer.in_one_call(x) is None
        x_grad = x.clone().requires_grad_()
        layer(x_grad).sum().backward()
        assert x_grad.grad.abs().sum() > 0
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.in_one_call(x) is None
    with fastattn.use_backend("eager"):
        assert layer.in_one_call(x) is None
    ignored = torch.zeros(2, 15, dtype=torch.bool)
    ignored[:, 9:] = True
    torch.testing.assert_close(
        layer(x, src_key_padding_mask=ignored)[:, :9], layer(x[:, :9]), rtol=1e-4, atol=1e-4
    )  # fmt: skip


def test_wrong_inputs_raise_what_the_modules_raise():
    layer = make_layer()
    layer(torch.randn(2, 15, EMBED))
    with pytest.raises(ValueError, match="embed_dim"):
        layer(torch.randn(2, 15, EMBED + 1))
    assert layer(torch.randn(2, 0, EMBED)).shape == (2, 0, EMBED)


def test_inference_mode_and_a_whole_encoder():
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(EMBED, HEADS, 96, batch_first=True), 2).eval()
    x = torch.randn(2, 15, EMBED)
    exact = encoder(x)
    fastattn.accelerate(encoder, int8=True, verbose=False)
    with torch.inference_mode():
        assert encoder.layers[0].in_one_call(x) is not None
        torch.testing.assert_close(encoder(x), exact, rtol=0.1, atol=0.1)


def test_copies_pickles_and_restored_layers_stand_alone():
    layer, x = make_layer(), torch.randn(2, 15, EMBED)
    expected = layer(x)
    for other in copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)):
        assert other._one_call._compiled is None and torch.equal(other(x), expected)
        other.linear2.weight.neg_()
        assert not torch.equal(other(x), expected)
    assert torch.equal(layer(x), expected)
    assert type(fastattn.restore(layer)) is nn.TransformerEncoderLayer and "_one_call" not in layer.__dict__


def test_compiled_layers_trace_their_modules():
    layer, x = make_layer(), torch.randn(2, 15, EMBED)
    expected = layer(x)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), expected, rtol=1e-5, atol=1e-5)


def test_a_layer_that_ran_is_freed():
    layer = make_layer()
    layer(torch.randn(2, 15, EMBED))
    reference = weakref.ref(layer)
    del layer
    gc.collect()
    assert reference() is None
