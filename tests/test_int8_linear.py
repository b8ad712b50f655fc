"""Int8Linear: what it keeps of the layer it is made from, how its state moves, that its packed weight stays fresh."""

from __future__ import annotations

import copy
import io
import pickle
import weakref

import pytest
import torch
from torch import nn

import fastattn
from fastattn import Int8Linear, dispatch
from fastattn._extension import extension, missing_reason

needs_cpu = pytest.mark.skipif(extension is None, reason=str(missing_reason))


def make(bias=True, activation=None):
    return Int8Linear.from_linear(nn.Linear(70, 45, bias=bias), activation)


def expected(module, x):
    """Without the module's packed weight."""
    out = fastattn.int8_linear(x, module.weight, module.weight_scale, module.bias, activation=module.activation)
    return out.detach()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", [None, "gelu"])
def test_from_linear_is_close_to_the_layer(bias, activation, cpu_isa):
    linear = nn.Linear(70, 45, bias=bias)
    module = Int8Linear.from_linear(linear, activation)
    x = torch.randn(2, 30, 70)
    exact = linear(x) if activation is None else nn.functional.gelu(linear(x))
    out = module(x)
    assert 20 * torch.log10(exact.norm() / (out - exact).norm()) > 35
    assert torch.equal(out, expected(module, x))


def test_from_linear_keeps_bias_dtype_and_training_flag():
    linear = nn.Linear(8, 4, dtype=torch.bfloat16).eval()
    linear.bias.requires_grad_(False)
    module = Int8Linear.from_linear(linear)
    assert module.bias is linear.bias
    assert not module.training
    assert module.weight.dtype == torch.int8 and module.weight_scale.dtype == torch.float32
    assert module(torch.randn(3, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16
    with pytest.raises(TypeError, match=r"must be an nn\.Linear, got Conv1d"):
        Int8Linear.from_linear(nn.Conv1d(1, 1, 1))


def test_new_module_is_zero_and_describes_itself():
    module = Int8Linear(6, 5, activation="silu")
    assert torch.equal(module(torch.randn(2, 6)), torch.zeros(2, 5))
    assert repr(module) == "Int8Linear(in_features=6, out_features=5, bias=True, activation='silu')"
    assert repr(Int8Linear(6, 5, bias=False)) == "Int8Linear(in_features=6, out_features=5, bias=False)"
    with pytest.raises(ValueError, match="Int8Linear: activation must be one of"):
        Int8Linear(6, 5, activation="tanh")


def test_state_dict_moves_the_weights():
    source, target = make(), Int8Linear(70, 45)
    assert list(source.state_dict()) == ["bias", "weight", "weight_scale"]
    x = torch.randn(3, 70)
    target(x)
    target.load_state_dict(source.state_dict())
    assert torch.equal(target(x), source(x))
    target = Int8Linear(70, 45)
    target.load_state_dict(source.state_dict(), assign=True)
    assert torch.equal(target(x), source(x))
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        Int8Linear(70, 44).load_state_dict(source.state_dict())


def test_float_weights_are_not_cut_to_int8():
    model = nn.Sequential(make())
    before = model[0].weight.clone()
    for strict in (True, False):
        with pytest.raises(RuntimeError, match=r"0\.weight is torch\.float32 but must be torch\.int8"):
            model.load_state_dict(nn.Sequential(nn.Linear(70, 45)).state_dict(), strict=strict)
    assert torch.equal(model[0].weight, before)


def test_a_scale_loaded_in_halves_is_widened():
    module = make()
    state = {name: value.half() if value.is_floating_point() else value for name, value in module.state_dict().items()}
    for assign in (False, True):
        module.load_state_dict(state, assign=assign)
        assert module.weight_scale.dtype == torch.float32
        assert torch.equal(module.weight_scale, state["weight_scale"].float())
        module(torch.randn(3, 70))


CONVERSIONS = {
    "half": nn.Module.half,
    "bfloat16": nn.Module.bfloat16,
    "double": nn.Module.double,
    "to": lambda module: module.to(torch.half),
    "type": lambda module: module.type(torch.half),
}


@pytest.mark.parametrize("convert", CONVERSIONS.values(), ids=CONVERSIONS)
def test_conversion_leaves_weight_and_scale(convert):
    module = make()
    scale, x = module.weight_scale.clone(), torch.randn(3, 70)
    before = module(x)
    convert(module)
    assert module.weight.dtype == torch.int8 and module.bias.dtype != torch.float32
    assert module.weight_scale.dtype == torch.float32 and torch.equal(module.weight_scale, scale)
    assert torch.equal(module(x), expected(module, x))
    torch.testing.assert_close(module(x), before, rtol=0, atol=2e-2)


def by_torch_save(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), by_torch_save])
def test_copies_are_independent_and_hold_no_packed_weight(duplicate):
    module = make(activation="relu")
    x = torch.randn(3, 70)
    before = module(x)
    if extension is not None:
        assert module._packed is not None
        assert module.__getstate__()["_packed"] is None
    other = duplicate(module)
    assert torch.equal(other(x), before)
    other.weight.neg_()
    assert torch.equal(module(x), before)
    assert torch.equal(other(x), expected(other, x))


@needs_cpu
@pytest.mark.parametrize("change", ["in_place", "replaced", "through_data", "past_the_count", "loaded", "moved"])
def test_packed_weight_follows_the_weight(change, cpu_isa):
    module = make()
    x = torch.randn(3, 70)
    before = module(x)
    with torch.no_grad():
        if change == "in_place":
            module.weight.mul_(-1)
        elif change == "replaced":
            module.weight = -module.weight
        elif change == "through_data":
            module.weight.data = -module.weight
        elif change == "past_the_count":
            module.weight.data.neg_()
            module.to(module.weight.device)
        elif change == "loaded":
            module.load_state_dict({**module.state_dict(), "weight": -module.weight})
        else:
            module.to("meta").to_empty(device="cpu")
            module.weight.zero_()
            module.weight_scale.fill_(1.0)
            module.bias.zero_()
    assert torch.equal(module(x), expected(module, x))
    assert not torch.equal(module(x), before)


@needs_cpu
def test_no_weight_comes_to_the_address_of_the_packed_one():
    module, x = make(), torch.randn(3, 70)
    memory = module.weight.numpy().copy()
    kept = weakref.ref(memory)
    module.weight = torch.from_numpy(memory)
    module(x)
    module.weight = module.weight.neg()
    del memory
    assert kept() is not None
    module(x)
    assert kept() is None


@needs_cpu
def test_another_thread_may_pack_meanwhile(monkeypatch):
    module, x = make(), torch.randn(3, 70)

    def takes_cpu(backend):
        module._packed = None  # what another thread that packs does first
        return True

    monkeypatch.setattr(dispatch, "takes_cpu", takes_cpu)
    assert torch.equal(module(x), expected(module, x))


def test_an_ensemble_maps_over_the_weights():
    modules, x = [make(), make()], torch.randn(2, 3, 70)

    def one(parameters, buffers, x):
        return torch.func.functional_call(modules[0], (parameters, buffers), x)

    out = torch.func.vmap(one)(*torch.func.stack_module_state(modules), x)
    torch.testing.assert_close(out, torch.stack([module(x) for module, x in zip(modules, x, strict=True)]))
    assert torch.equal(modules[0](x), expected(modules[0], x))


@needs_cpu
def test_works_in_inference_mode():
    with torch.inference_mode():
        module = make()
        x = torch.randn(3, 70)
        before = module(x)
        assert module._packed is not None
        assert torch.equal(before, expected(module, x))
        module.weight = -module.weight  # an inference tensor, whose changes nobody counts: not packed
        assert torch.equal(module(x), expected(module, x))
        module.weight.zero_()
        assert torch.equal(module(x), module.bias.expand(3, -1))


@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_an_activation_set_later_is_applied(backend):
    layer, x = Int8Linear.from_linear(nn.Linear(40, 24), backend=backend), torch.randn(3, 40)
    without = layer(x)
    layer.activation = "relu"
    assert torch.equal(layer(x), without.relu()) and (without < 0).any()
    layer.activation = "cube"
    with pytest.raises(ValueError, match="activation must be one of"):
        layer(x)


@needs_cpu
@pytest.mark.parametrize("backend", ["auto", "cpu"])
def test_shortcut_computes_what_the_op_does(backend, cpu_isa, monkeypatch):
    module = make(activation="gelu")
    module.backend = backend
    monkeypatch.setattr(module, "_forward_in_general", None)  # the shortcut serves all of these
    for shape in ((70,), (1, 70), (2, 3, 70), (0, 70)):
        x = torch.randn(shape)
        assert torch.equal(module(x), expected(module, x))
    x = torch.randn(4, 70, requires_grad=True)
    module(x).sum().backward()
    assert x.grad is not None and module.bias.grad is not None
    with pytest.raises(ValueError, match="last dim is 69"):
        module(torch.randn(3, 69))
    with pytest.raises(TypeError, match="input must be float32"):
        module(torch.ones(3, 70, dtype=torch.int32))


recorded: list[str] = []


class Recorded(torch.Tensor):
    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        recorded.append(str(func))
        return super().__torch_function__(func, types, args, kwargs or {})


class Recorder(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        recorded.append(str(func))
        return func(*args, **(kwargs or {}))


@needs_cpu
@pytest.mark.parametrize("watcher", ["subclass", "mode"])
def test_subclasses_and_modes_see_the_op(watcher):
    module, x = make(), torch.randn(3, 70)
    recorded.clear()
    if watcher == "subclass":
        out = module(x.as_subclass(Recorded))
    else:
        with Recorder():
            out = module(x)
    assert any("int8_linear" in call for call in recorded)
    assert torch.equal(torch.Tensor(out.detach()), expected(module, x))


@needs_cpu
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_traces_follow_their_input():
    module, x = make(), torch.randn(3, 70)
    with torch.no_grad():
        traced = torch.jit.trace(module, (torch.randn(3, 70),), check_trace=False)
        assert torch.equal(traced(x), expected(module, x))


def test_gradients_reach_input_and_bias():
    module = make(activation="gelu_tanh")
    x = torch.randn(4, 70, requires_grad=True)
    module(x).square().sum().backward()
    grads = x.grad, module.bias.grad
    eager_x, eager_bias = x.detach().requires_grad_(), module.bias.detach().requires_grad_()
    out = fastattn.int8_linear(
        eager_x, module.weight, module.weight_scale, eager_bias, activation="gelu_tanh", backend="eager"
    )
    out.square().sum().backward()
    torch.testing.assert_close(grads, (eager_x.grad, eager_bias.grad))


def test_compiles_without_graph_breaks_and_follows_the_weight():
    module = make(activation="gelu")
    compiled = torch.compile(module, fullgraph=True)
    x = torch.randn(4, 70)
    with torch.no_grad():
        assert torch.equal(compiled(x), module(x))
        module.weight.mul_(-1)
        assert torch.equal(compiled(x), expected(module, x))
        module.load_state_dict(make().state_dict())
        assert torch.equal(compiled(x), expected(module, x))


def test_exports():
    module = make()
    x = torch.randn(4, 70)
    program = torch.export.export(module, (x,))
    assert torch.equal(program.module()(x), module(x))
    assert set(program.state_dict) == {"weight", "weight_scale", "bias"}


def test_backend_by_name_and_meta_device():
    module = Int8Linear(70, 45, backend="eager", device="meta")
    assert module(torch.randn(3, 70, device="meta")).shape == (3, 45)
    with pytest.raises(NotImplementedError, match="'cpu' cannot run this"):
        Int8Linear(70, 45, backend="cpu", device="meta")(torch.randn(3, 70, device="meta"))
    module = make()
    x = torch.randn(3, 70)
    with fastattn.use_backend("eager"):
        assert torch.allclose(module(x), expected(module, x), rtol=1e-6, atol=1e-6)


@pytest.mark.skipif(fastattn.available_backends()["emulated"] is not None, reason="no emulated CUDA kernels")
@pytest.mark.parametrize("activation", [None, "gelu"])
def test_cuda_kernels_read_the_weight_as_it_is(activation):
    """The packed form is the CPU's: a module that holds one gives it to no other kernel, in backward neither."""
    linear = nn.Linear(70, 45)
    module = Int8Linear.from_linear(linear, activation, backend="emulated")
    assert module._packed is not None
    x = torch.randn(5, 70, requires_grad=True)
    out = module(x)
    assert torch.equal(out, fastattn.int8_linear(x, module.weight, module.weight_scale, linear.bias,
                                                 activation=activation, backend="emulated"))  # fmt: skip
    (actual,) = torch.autograd.grad(out.sum(), x)
    by_cpu = Int8Linear.from_linear(linear, activation, backend="cpu")(x)
    (expected_gradient,) = torch.autograd.grad(by_cpu.sum(), x)
    torch.testing.assert_close(out, by_cpu, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(actual, expected_gradient, rtol=1e-5, atol=1e-6)
    module.weight.neg_()
    assert torch.equal(module(-x)[:, 0], Int8Linear.from_linear(linear, activation, backend="emulated")(x)[:, 0])


@pytest.mark.parametrize("x, error", [(torch.ones(3, 71), ValueError), (torch.ones(()), ValueError),
                                      (torch.ones(3, 70, dtype=torch.int32), TypeError)])  # fmt: skip
def test_rejects_bad_input(x, error):
    with pytest.raises(error, match="int8_linear: "):
        make()(x)
