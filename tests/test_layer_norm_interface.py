"""Norms under autograd, torch.compile and opcheck, as modules, and given what they cannot run."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from devices import device_for
from layer_norm_cases import OPS, dtype_id, evaluate, make_inputs, needs_cpu, skip_refusals
from torch.overrides import TorchFunctionMode

import fastattn
from fastattn.dispatch import TABLE, available_backends
from fastattn.ops import layer_norm_compiled
from fastattn.ops.layer_norm_compiled import (
    add_layer_norm_if_plain,
    add_rms_norm_if_plain,
    layer_norm_if_plain,
    rms_norm_if_plain,
)

pytestmark = pytest.mark.usefixtures("tensors_where_the_backend_runs")


@pytest.fixture(params=[kernel.backend for kernel in TABLE["layer_norm"]])
def backend(request: pytest.FixtureRequest) -> str:
    reason = available_backends()[request.param]
    if reason is not None:
        pytest.skip(f"no {request.param} backend: {reason}")
    return request.param


def test_compiling_the_emulator_is_refused(backend):
    if backend != "emulated":
        pytest.skip("the others are compiled")
    compiled = torch.compile(lambda x: fastattn.layer_norm(x, 8, backend="emulated"), fullgraph=True, backend="eager")
    with pytest.raises(Exception, match="cannot trace the switch of the emulator"):
        compiled(torch.randn(2, 8))


# --- The short way to the op, for plain tensors on the CPU ------------------------------------------------------------


class Subclass(torch.Tensor):
    pass


class Mode(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


@needs_cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=dtype_id)
@pytest.mark.parametrize("parameters", [(None, None), ("weight", None), (None, "bias"), ("weight", "bias")], ids=str)
def test_the_short_way_computes_what_the_op_does(parameters, dtype):
    inputs = make_inputs("layer_norm", (3, 2, 97), dtype)
    weight, bias = (inputs[name].requires_grad_() if name else None for name in parameters)
    out = layer_norm_if_plain(inputs["input"], (97,), weight, bias, 1e-3)
    expected = torch.ops.fastattn.layer_norm(inputs["input"], weight, bias, 1, 1e-3, False)[0]
    assert torch.equal(out, expected)
    assert (out.grad_fn is None) == (expected.grad_fn is None)
    assert torch.equal(layer_norm_if_plain(inputs["input"], 97, weight, bias, 1e-3), expected)
    two_dims = layer_norm_if_plain(inputs["input"], torch.Size((2, 97)), None, None, 1e-3)
    assert torch.equal(two_dims, torch.ops.fastattn.layer_norm(inputs["input"], None, None, 2, 1e-3, False)[0])


@needs_cpu
@pytest.mark.parametrize(
    "changed",
    [{"input": torch.ones(3, 8).as_subclass(Subclass)}, {"input": torch.ones(3, 8).to_sparse()},
     {"input": torch.ones(3, 8, device="meta")}, {"input": torch.ones(3, 8, dtype=torch.int32)},
     {"input": torch.ones(3, 8, dtype=torch.complex64)}, {"input": torch.ones(())}, {"input": None},
     {"shape": [8]}, {"shape": ()}, {"shape": (9,)}, {"shape": (8, 3)}, {"shape": (1, 3, 8)},
     {"shape": (2**70,)}, {"shape": 9}, {"shape": True}, {"shape": 2**70},
     {"weight": torch.ones(7)}, {"weight": torch.ones(1, 8)}, {"weight": torch.ones(8, dtype=torch.int32)},
     {"weight": torch.ones(8, device="meta")}, {"bias": torch.ones(8).as_subclass(Subclass)}, {"eps": 1}],
    ids=lambda changed: next(iter(changed)),
)  # fmt: skip
def test_the_short_way_leaves_the_unusual_to_the_general_one(changed):
    usual = {"input": torch.ones(3, 8), "shape": (8,), "weight": torch.ones(8), "bias": torch.ones(8), "eps": 1e-5}
    assert layer_norm_if_plain(*usual.values()) is not None
    assert layer_norm_if_plain(*(usual | changed).values()) is None
    if "bias" not in changed:
        del usual["bias"]
        assert rms_norm_if_plain(*usual.values()) is not None
        assert rms_norm_if_plain(*(usual | changed).values()) is None


@needs_cpu
@pytest.mark.parametrize("eps", [None, 1e-3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=dtype_id)
def test_the_short_way_of_rms_norm_computes_what_the_op_does(dtype, eps):
    # Rows as small as a usual epsilon, so that the one chosen for None shows.
    inputs = make_inputs("rms_norm", (3, 97), dtype)
    inputs["input"] = inputs["input"] * 1e-4
    general = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps if eps is None else eps
    out = rms_norm_if_plain(inputs["input"], 97, inputs["weight"], eps)
    expected = torch.ops.fastattn.layer_norm(inputs["input"], inputs["weight"], None, 1, general, True)[0]
    assert torch.equal(out, expected)


@needs_cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=dtype_id)
def test_the_short_ways_of_the_fused_norms_compute_what_the_op_does(dtype):
    # Rows as small as a usual epsilon, so that the one chosen for None shows.
    inputs = {name: tensor * 1e-4 for name, tensor in make_inputs("add_layer_norm", (3, 97), dtype).items()}
    x, residual, weight, bias = (inputs[name] for name in ("input", "residual", "weight", "bias"))
    x.requires_grad_()
    default = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    short = [
        (add_layer_norm_if_plain(x, residual, 97, weight, bias, 1e-3), (bias, 1e-3, False)),
        (add_rms_norm_if_plain(x, residual, (97,), weight, None), (None, default, True)),
        (add_rms_norm_if_plain(x, residual, (97,), weight, 1e-3), (None, 1e-3, True)),
    ]
    for outputs, (b, eps, rms) in short:
        expected = torch.ops.fastattn.add_layer_norm(x, residual, weight, b, None, 0.0, 1, eps, rms)[:2]
        assert len(outputs) == 2
        for mine, theirs in zip(outputs, expected, strict=True):
            assert torch.equal(mine, theirs) and mine.grad_fn is not None


@needs_cpu
@pytest.mark.parametrize(
    "changed",
    [{"input": torch.ones(3, 8).as_subclass(Subclass)}, {"input": torch.ones(3, 8, dtype=torch.bfloat16)},
     {"input": torch.ones(2, 8)}, {"residual": torch.ones(3, 8).to_sparse()}, {"residual": torch.ones(1, 8)},
     {"residual": torch.ones(3, 8, device="meta")}, {"residual": None}, {"shape": (9,)}, {"weight": torch.ones(7)},
     {"eps": 1}],
    ids=lambda changed: next(iter(changed)),
)  # fmt: skip
def test_the_short_ways_of_the_fused_norms_leave_the_unusual(changed):
    usual = {name: torch.ones(3, 8) for name in ("input", "residual")}
    usual |= {"shape": (8,), "weight": torch.ones(8), "bias": torch.ones(8), "eps": 1e-5}
    assert add_layer_norm_if_plain(*usual.values()) is not None
    assert add_layer_norm_if_plain(*(usual | changed).values()) is None
    del usual["bias"]
    assert add_rms_norm_if_plain(*usual.values()) is not None
    assert add_rms_norm_if_plain(*(usual | changed).values()) is None


@needs_cpu
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_the_short_way_is_left_to_those_who_watch():
    x = torch.randn(3, 8)
    with Mode():
        assert layer_norm_if_plain(x, (8,), None, None, 1e-5) is None
        assert rms_norm_if_plain(x, 8, None, None) is None
        assert add_layer_norm_if_plain(x, x, 8, None, None, 1e-5) is None
    traced = torch.jit.trace(lambda y: fastattn.layer_norm(y, (8,)), (torch.ones(3, 8),), check_trace=False)
    assert torch.equal(traced(x), fastattn.layer_norm(x, (8,)))


@needs_cpu
@pytest.mark.parametrize("op", ["layer_norm", "rms_norm"])
def test_the_short_way_is_taken_only_to_the_cpu_kernel(op, monkeypatch):
    calls = []
    monkeypatch.setattr(layer_norm_compiled, f"{op}_if_plain", lambda *args: calls.append(args))
    norm, x = getattr(fastattn, op), torch.randn(3, 8)
    norm(x, (8,), backend="eager")
    with fastattn.use_backend("eager"):
        norm(x, (8,))
    assert not calls
    with fastattn.use_backend("cpu"):
        norm(x, (8,))
    norm(x, (8,))
    assert len(calls) == 2


@needs_cpu
@pytest.mark.parametrize("op", ["add_layer_norm", "add_rms_norm"])
def test_the_short_way_of_a_fused_norm_is_taken_only_without_dropout_to_the_cpu_kernel(op, monkeypatch):
    calls = []
    monkeypatch.setattr(layer_norm_compiled, f"{op}_if_plain", lambda *args: calls.append(args))
    norm, x = getattr(fastattn, op), torch.randn(3, 8)
    norm(x, x, (8,), backend="eager")
    norm(x, x, (8,), dropout_p=0.5)
    assert not calls
    norm(x, x, (8,))
    norm(x, x, (8,), backend="cpu")
    assert len(calls) == 2


# --- Autograd and the compiler ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", [(0,), (1,)], ids=["out", "new_residual"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("op", ["add_layer_norm", "add_rms_norm"])
def test_one_of_two_outputs_is_used(op, dropout_p, wanted, backend):
    inputs = make_inputs(op, (6, 97), torch.float32)
    options = {"dropout_p": dropout_p, "wanted": wanted, "device": device_for(backend)}
    actual, expected = (evaluate(op, inputs, each, **options) for each in (backend, "eager"))
    for name in ("dinput", "dresidual"):
        torch.testing.assert_close(actual[name], expected[name])


@pytest.mark.parametrize("names", [("input",), ("weight",), ("bias",), ("weight", "bias"), ("input", "bias")], ids=str)
def test_only_some_inputs_require_grad(names, backend):
    inputs = make_inputs("add_layer_norm", (6, 97), torch.float32)
    expected = evaluate("add_layer_norm", inputs, "eager", wanted=(0,))
    leaves = {name: t.clone().requires_grad_(name in names) for name, t in inputs.items()}
    torch.manual_seed(8)
    out, _ = fastattn.add_layer_norm(normalized_shape=97, backend=backend, **leaves)
    generator = torch.Generator().manual_seed(8)
    out.backward(torch.randn(out.shape, generator=generator, dtype=torch.float64, device="cpu").to(out))
    for name, leaf in leaves.items():
        if name in names:
            torch.testing.assert_close(leaf.grad.cpu(), expected[f"d{name}"], rtol=1e-4, atol=1e-5)
        else:
            assert leaf.grad is None


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("affine", ["none", "bias", "weight bias"])
def test_gradcheck(op, affine, backend):
    inputs = {n: t.requires_grad_() for n, t in make_inputs(op, (5, 7), torch.float64, affine=affine).items()}

    def function(*tensors):
        torch.manual_seed(0)
        options = {"dropout_p": 0.3} if op.startswith("add") else {}
        return getattr(fastattn, op)(
            normalized_shape=7, backend=backend, **dict(zip(inputs, tensors, strict=True)), **options
        )

    with skip_refusals():
        assert torch.autograd.gradcheck(function, tuple(inputs.values()))
    if backend == "eager":
        assert torch.autograd.gradgradcheck(function, tuple(inputs.values()), fast_mode=True)


@needs_cpu
@pytest.mark.parametrize("op", OPS)
def test_gradients_of_gradients_are_refused(op):
    inputs = {n: t.requires_grad_() for n, t in make_inputs(op, (5, 7), torch.float32).items()}
    outputs = getattr(fastattn, op)(normalized_shape=7, backend="cpu", **inputs)
    out = outputs[0] if isinstance(outputs, tuple) else outputs
    (dinput,) = torch.autograd.grad(out.square().sum(), inputs["input"], create_graph=True)
    with pytest.raises(NotImplementedError, match=rf"^{op}: the kernels do not compute gradients of gradients"):
        dinput.square().sum().backward()


@needs_cpu
@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
def test_opcheck(dtype, rms):
    x, dout = (torch.randn(3, 5, 65).to(dtype).requires_grad_() for _ in range(2))
    residual = torch.randn(3, 5, 65).requires_grad_()
    weight = torch.randn(65).requires_grad_()
    bias = None if rms else torch.randn(65).to(dtype).requires_grad_()
    rng_state = torch.tensor([5, 6])
    ops = torch.ops.fastattn
    torch.library.opcheck(ops.layer_norm.default, (x, weight, bias, 1, 1e-5, rms))
    torch.library.opcheck(ops.layer_norm.default, (x, None, None, 1, 1e-5, rms))
    torch.library.opcheck(ops.add_layer_norm.default, (x, residual, weight, bias, rng_state, 0.3, 1, 1e-5, rms))
    torch.library.opcheck(ops.add_layer_norm.default, (x, x, weight, bias, None, 0.0, 1, 1e-5, rms))
    # The backward ops have no gradient of their own: they are checked on inputs that require none.
    x, dout, residual, weight = x.detach(), dout.detach(), residual.detach(), weight.detach()
    bias_dtype = None if rms else dtype
    _, mean, rstd = ops.layer_norm.default(x, weight, None, 1, 1e-5, rms)
    for needs in ((True, not rms), (False, False)):
        torch.library.opcheck(
            ops.layer_norm_backward.default, (dout, x, mean, rstd, weight, 1, rms, *needs, bias_dtype)
        )
        for rng, dropout_p in ((rng_state, 0.3), (None, 0.0)):
            torch.library.opcheck(
                ops.add_layer_norm_backward.default,
                (dout, residual, residual, mean, rstd, weight, rng, dropout_p, 1, rms, *needs, bias_dtype, dtype),
            )
    torch.library.opcheck(
        ops.add_layer_norm_backward.default,
        (dout, None, x, mean, rstd, weight, None, 0.0, 1, rms, True, False, bias_dtype, dtype),
    )


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("op", OPS)
def test_compiles_without_a_graph_break(op, dynamic, backend):
    if backend == "emulated":
        pytest.skip("torch.compile cannot trace the switch of the emulator")
    torch.compiler.reset()

    def make_leaves(rows):
        inputs = make_inputs(op, (rows, 4, 65), torch.float32, normalized_dims=2)
        return {name: t.requires_grad_() for name, t in inputs.items()}

    def function(tensors):
        outputs = getattr(fastattn, op)(normalized_shape=(4, 65), backend=backend, **tensors)
        return outputs if isinstance(outputs, tuple) else (outputs,)

    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (3, 6):
        leaves = make_leaves(rows)
        results = []
        for each in (function, compiled):
            outputs = each(leaves)
            results.append([*outputs, *torch.autograd.grad([o.square().sum() for o in outputs], leaves.values())])
        torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("normalized_dims", [1, 2])
def test_gradients_of_both_inputs_have_memory_of_their_own(normalized_dims, backend):
    inputs = make_inputs("add_layer_norm", (6, 4, 65), torch.float32, normalized_dims=normalized_dims)
    leaves = {name: t.requires_grad_() for name, t in inputs.items()}
    for _ in range(2):  # The second backward adds to the gradients in place.
        outputs = fastattn.add_layer_norm(normalized_shape=(4, 65)[2 - normalized_dims :], backend=backend, **leaves)
        losses = [o.square().sum() for o in outputs]
        expected = torch.autograd.grad(losses, leaves.values(), retain_graph=True)
        torch.autograd.backward(losses)
    for leaf, once in zip(leaves.values(), expected, strict=True):
        torch.testing.assert_close(leaf.grad, 2 * once)


@needs_cpu
def test_compiles_with_dropout():
    inputs = make_inputs("add_layer_norm", (6, 65), torch.float32)

    def function(tensors):
        return fastattn.add_layer_norm(normalized_shape=65, dropout_p=0.5, **tensors)

    out, new_residual = torch.compile(function, fullgraph=True)(inputs)
    dropped = (new_residual == inputs["residual"]).float().mean()
    assert 0.3 < dropped < 0.7
    torch.testing.assert_close(out, F.layer_norm(new_residual, (65,), inputs["weight"], inputs["bias"]))


# --- Modules ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [(65,), ((5, 13), 1e-3), (65, 1e-5, False)], ids=str)
@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm"])
def test_modules_are_those_of_torch(name, arguments):
    ours, theirs = getattr(fastattn, name)(*arguments), getattr(torch.nn, name)(*arguments)
    assert [(n, p.shape) for n, p in ours.named_parameters()] == [(n, p.shape) for n, p in theirs.named_parameters()]
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_()
    ours.load_state_dict(theirs.state_dict())
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert repr(ours) == repr(theirs)
    x = torch.randn(4, *theirs.normalized_shape)
    torch.testing.assert_close(ours(x), theirs(x))


def test_layer_norm_module_without_bias_in_half():
    ours, theirs = fastattn.LayerNorm(65, bias=False), torch.nn.LayerNorm(65, bias=False)
    x = torch.randn(4, 65).bfloat16()
    torch.testing.assert_close(ours.bfloat16()(x), theirs.bfloat16()(x))
    assert torch.compile(ours, fullgraph=True, backend="aot_eager")(x).dtype == torch.bfloat16


# --- Refusals and errors ---------------------------------------------------------------------------------------------


@needs_cpu
def test_auto_takes_the_cpu_kernel_and_explains_itself():
    x = torch.randn(4, 65)
    for op in OPS:
        tensors = {"input": x, "residual": x} if op.startswith("add") else {"input": x}
        assert fastattn.explain(getattr(fastattn, op), normalized_shape=65, **tensors).startswith(f"{op}: cpu runs")
    assert "cpu       no: input is on meta" in fastattn.explain("layer_norm", x.to("meta"), 65)
    with pytest.raises(NotImplementedError, match="layer_norm: backend 'cpu' cannot run this: input is on meta"):
        fastattn.layer_norm(x.to("meta"), 65, backend="cpu")


X = torch.zeros(4, 65)
BAD = {
    "wrong normalized_shape": (ValueError, r"normalized_shape is \(64,\) but input is \(4, 65\)", (X, 64), {}),
    "more dims than input has": (ValueError, r"normalized_shape is \(1, 4, 65\) but input", (X, (1, 4, 65)), {}),
    "empty normalized_shape": (ValueError, "normalized_shape is empty", (X, ()), {}),
    "scalar input": (ValueError, r"but input is \(\)", (torch.zeros(()), 1), {}),
    "integer input": (TypeError, r"input must be float32, .* got torch\.int64\. Convert", (X.long(), 65), {}),
    "no tensor": (TypeError, "input must be a tensor, got list", ([1.0], 1), {}),
    "long weight": (ValueError, r"weight is \(66,\) but normalized_shape is \(65,\)", (X, 65, torch.zeros(66)), {}),
    "integer weight": (TypeError, r"weight must be floating, got torch\.int64", (X, 65, torch.zeros(65).long()), {}),
    "weight elsewhere": (ValueError, "weight is on meta but input is on cpu", (X, 65, torch.zeros(65).to("meta")), {}),
    "weight no tensor": (TypeError, "weight must be a tensor or None, got float", (X, 65, 1.0), {}),
    "unknown backend": (ValueError, "backend must be 'auto' or one of", (X, 65), {"backend": "gpu"}),
}  # fmt: skip
BAD_BIAS = {
    "short bias": (ValueError, r"bias is \(64,\) but normalized_shape is \(65,\)", (X, 65, None, torch.zeros(64)), {}),
}
BAD_ADD = {
    "residual of another shape": (ValueError, r"residual is \(65,\) but input is \(4, 65\)", (X, X[0], 65), {}),
    "integer residual": (TypeError, "residual must be float32, .* got torch.int64", (X, X.long(), 65), {}),
    "residual elsewhere": (ValueError, "residual is on meta but input is on cpu", (X, X.to("meta"), 65), {}),
    "residual no tensor": (TypeError, "residual must be a tensor, got NoneType", (X, None, 65), {}),
    "dropout above 1": (ValueError, "dropout_p must be between 0 and 1, got 1.5", (X, X, 65), {"dropout_p": 1.5}),
    "dropout not a number": (ValueError, "dropout_p must be between", (X, X, 65), {"dropout_p": float("nan")}),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("op", ["layer_norm", "rms_norm"])
def test_rejects(op, case):
    error, message, arguments, options = BAD[case]
    with pytest.raises(error, match=message):
        getattr(fastattn, op)(*arguments, **options)


@pytest.mark.parametrize("case", BAD_BIAS)
def test_rejects_bias(case):
    error, message, arguments, options = BAD_BIAS[case]
    with pytest.raises(error, match=f"layer_norm: {message}"):
        fastattn.layer_norm(*arguments, **options)


@pytest.mark.parametrize("case", BAD_ADD)
@pytest.mark.parametrize("op", ["add_layer_norm", "add_rms_norm"])
def test_rejects_with_residual(op, case):
    error, message, arguments, options = BAD_ADD[case]
    with pytest.raises(error, match=f"{op}: {message}"):
        getattr(fastattn, op)(*arguments, **options)


@needs_cpu
def test_ops_check_what_memory_safety_needs():
    ops, x, short = torch.ops.fastattn, torch.zeros(4, 65), torch.zeros(4, 64)
    forward, backward, add = ops.layer_norm, ops.layer_norm_backward, ops.add_layer_norm
    weight, rstd = torch.zeros(65), torch.zeros(4)
    bad = [
        (ValueError, "normalized_dims must be", forward, (torch.zeros(()), None, None, 1, 1e-5, False)),
        (ValueError, "normalized_dims must be", forward, (x, None, None, 3, 1e-5, False)),
        (ValueError, "normalized_dims must be", forward, (x, None, None, 0, 1e-5, False)),
        (ValueError, "weight must be", forward, (x, weight, None, 2, 1e-5, False)),
        (TypeError, "not float32", forward, (x.long(), None, None, 1, 1e-5, False)),
        (ValueError, "weight must be", forward, (x, weight[:64], None, 1, 1e-5, False)),
        (ValueError, "bias must be", forward, (x, None, weight[:64], 1, 1e-5, False)),
        (ValueError, "no bias", forward, (x, None, weight, 1, 1e-5, True)),
        (ValueError, "residual must be", add, (x, short, None, None, None, 0.0, 1, 1e-5, False)),
        (ValueError, "needs rng_state", add, (x, x, None, None, None, 0.5, 1, 1e-5, False)),
        (ValueError, "rng_state must", add, (x, x, None, None, torch.zeros(1).long(), 0.5, 1, 0.1, True)),
        (NotImplementedError, "take a residual", add, (x, x.half(), None, None, None, 0.0, 1, 1e-5, False)),
        (ValueError, "dout must be", backward, (short, x, rstd, rstd, None, 1, False, False, False, None)),
        (ValueError, "rstd must be", backward, (x, x, rstd, rstd[:3], None, 1, False, False, False, None)),
        (ValueError, "mean must be", backward, (x, x, rstd[:3], rstd, None, 1, False, False, False, None)),
        (TypeError, "rstd must be", backward, (x, x, rstd, rstd.half(), None, 1, True, False, False, None)),
        (ValueError, "dweight needs", backward, (x, x, rstd, rstd, None, 1, False, True, False, None)),
        (ValueError, "dbias needs", backward, (x, x, rstd, rstd, None, 1, False, False, True, None)),
    ]  # fmt: skip
    for error, message, op, arguments in bad:
        with pytest.raises(error, match=message):
            op(*arguments)


@pytest.mark.parametrize("magnitude", [1e19, 3e19, 1e20, 1e30, 1e38])
def test_rows_whose_squares_overflow_are_0_or_nan(magnitude, backend):
    """As PyTorch's: never a number that looks like a norm. The row between them is right."""
    x = torch.randn(3, 96).clamp(-3, 3)
    x[::2] = x[::2].sign() * magnitude
    x[::2, 0] *= -1
    expected = fastattn.layer_norm(x[1:2], 96, backend="eager")
    out, rms = fastattn.layer_norm(x, 96, backend=backend), fastattn.rms_norm(x, 96, backend=backend)
    torch.testing.assert_close(out[1:2], expected)
    assert bool(((out[::2] == 0) | out[::2].isnan()).all())
    assert not rms[::2].any() and bool(rms[1].all())
