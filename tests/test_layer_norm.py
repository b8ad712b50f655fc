"""layer_norm, rms_norm, add_layer_norm, add_rms_norm, LayerNorm and RMSNorm against eager PyTorch and float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_as_accurate_as_eager
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastattn
from fastattn.dispatch import TABLE, available_backends
from fastattn.ops.philox import draw_rng_state, dropout_mask

OPS = ("layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
HALF = (torch.bfloat16, torch.float16)
needs_cpu = pytest.mark.skipif(
    available_backends()["cpu"] is not None, reason=f"no cpu backend: {available_backends()['cpu']}"
)


def dtype_id(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@pytest.fixture(params=[kernel.backend for kernel in TABLE["layer_norm"]])
def backend(request: pytest.FixtureRequest) -> str:
    reason = available_backends()[request.param]
    if reason is not None:
        pytest.skip(f"no {request.param} backend: {reason}")
    return request.param


def make_inputs(
    op, shape, dtype, *, affine="weight bias", normalized_dims=1, parameter_dtype=None, residual_dtype=None
):
    """The tensors that ``op`` takes, by name."""
    parameter_shape = shape[len(shape) - normalized_dims :]
    inputs = {"input": torch.randn(shape).mul(2).add(0.5).to(dtype)}
    if op.startswith("add"):
        inputs["residual"] = torch.randn(shape).to(residual_dtype or dtype)
    if "weight" in affine:
        inputs["weight"] = torch.randn(parameter_shape).to(parameter_dtype or dtype)
    if "bias" in affine and "layer" in op:
        inputs["bias"] = torch.randn(parameter_shape).to(parameter_dtype or dtype)
    return inputs


def evaluate(op, inputs, backend, *, normalized_dims=1, dtype=None, wanted=(0, 1), **options) -> dict[str, Tensor]:
    """Outputs and gradients by name; ``dtype`` converts everything first. The same random numbers in every call."""
    leaves = {name: (t if dtype is None else t.to(dtype)).detach().requires_grad_() for name, t in inputs.items()}
    shape = leaves["input"].shape[leaves["input"].dim() - normalized_dims :]
    torch.manual_seed(7)
    outputs = getattr(fastattn, op)(normalized_shape=shape, backend=backend, **leaves, **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(8)
    gradients = [torch.randn(o.shape, generator=generator, dtype=torch.float64) for o in outputs]
    # Every run must see the same numbers: rounded to what the outputs' dtypes hold in the run that is not converted.
    if dtype is not None:
        dtypes = [inputs["input"].dtype, inputs.get("residual", inputs["input"]).dtype]
        gradients = [g.to(d) for g, d in zip(gradients, dtypes, strict=False)]
    gradients = [g.to(o.dtype) for g, o in zip(gradients, outputs, strict=True)]
    used = [i for i in wanted if i < len(outputs)]
    computed = torch.autograd.grad([outputs[i] for i in used], list(leaves.values()), [gradients[i] for i in used],
                                   allow_unused=True)  # fmt: skip
    results = dict(zip(("out", "new_residual"), (o.detach() for o in outputs), strict=False))
    results.update({f"d{name}": g for name, g in zip(leaves, computed, strict=True) if g is not None})
    return results


def check(op, inputs, backend, **options) -> dict[str, Tensor]:
    """Asserts that ``backend`` is as accurate as eager, in every output and gradient; returns its results."""
    actual = evaluate(op, inputs, backend, **options)
    eager = evaluate(op, inputs, "eager", **options)
    reference = evaluate(op, inputs, "eager", dtype=torch.float64, **options)
    assert actual.keys() == eager.keys() == reference.keys()
    for name, result in actual.items():
        # Rows of one element have gradient 0, the difference of terms as large as the parameters' gradients.
        terms = max((g.abs().max().item() for n, g in reference.items() if n.startswith("d") and g.numel()), default=0)
        assert_as_accurate_as_eager(result, eager[name], reference[name], f"{op} {name}", terms=terms)
    return actual


# --- The matrix ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("affine", ["none", "weight", "bias", "weight bias"])
def test_matches_eager(op, dtype, affine, cpu_isa):
    check(op, make_inputs(op, (3, 5, 97), dtype, affine=affine), "cpu")


@pytest.mark.parametrize("cols", [1, 3, 63, 64, 65, 97, 768, 1025, 8192, 131073])
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
def test_any_row_length(op, dtype, cols, cpu_isa):
    # 7 rows: a group of rows that the backward takes at once, and some that are left.
    check(op, make_inputs(op, (7 if cols < 100_000 else 2, cols), dtype), "cpu")


@pytest.mark.parametrize("rows", [1, 2, 4, 31, 33, 700])
@pytest.mark.parametrize("op", OPS)
def test_any_number_of_rows(op, rows, cpu_isa):
    check(op, make_inputs(op, (rows, 65), torch.float32), "cpu")


@pytest.mark.parametrize("parameter_dtype", [torch.float32, torch.bfloat16, torch.float64], ids=dtype_id)
@pytest.mark.parametrize("dtype", HALF, ids=dtype_id)
@pytest.mark.parametrize("op", OPS)
def test_parameters_of_another_dtype(op, dtype, parameter_dtype, cpu_isa):
    results = check(op, make_inputs(op, (6, 97), dtype, parameter_dtype=parameter_dtype), "cpu")
    assert results["out"].dtype == dtype
    assert results["dweight"].dtype == parameter_dtype


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", HALF, ids=dtype_id)
@pytest.mark.parametrize("op", ["add_layer_norm", "add_rms_norm"])
def test_float32_residual_stream(op, dtype, dropout_p, cpu_isa):
    inputs = make_inputs(op, (6, 97), dtype, residual_dtype=torch.float32)
    results = check(op, inputs, "cpu", dropout_p=dropout_p)
    assert results["out"].dtype == results["dinput"].dtype == dtype
    assert results["new_residual"].dtype == results["dresidual"].dtype == torch.float32


def test_any_pair_of_residual_and_input_runs(backend):
    inputs = make_inputs("add_layer_norm", (6, 97), torch.float32, residual_dtype=torch.bfloat16)
    assert evaluate("add_layer_norm", inputs, "auto")["new_residual"].dtype == torch.bfloat16
    if backend == "cpu":
        with pytest.raises(NotImplementedError, match=r"'cpu' cannot run this: residual has dtype torch\.bfloat16"):
            evaluate("add_layer_norm", inputs, "cpu")


@pytest.mark.parametrize("normalized_dims", [2, 3])
@pytest.mark.parametrize("op", OPS)
def test_several_normalized_dims(op, normalized_dims, backend):
    inputs = make_inputs(op, (4, 3, 5, 7), torch.float32, normalized_dims=normalized_dims)
    results = check(op, inputs, backend, normalized_dims=normalized_dims)
    assert results["out"].shape == (4, 3, 5, 7)
    assert results["dweight"].shape == inputs["weight"].shape


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0), (2, 0, 4), (0,)], ids=str)
def test_empty(op, shape, backend):
    results = evaluate(op, make_inputs(op, shape, torch.float32), backend)
    assert results["out"].shape == results["dinput"].shape == shape
    assert torch.equal(results["dweight"], torch.zeros(shape[-1]))


@pytest.mark.parametrize("op", OPS)
def test_a_single_row_without_batch(op, backend):
    check(op, make_inputs(op, (65,), torch.float32), backend)


@pytest.mark.parametrize("eps", [0.0, 1e-12, 0.1])
@pytest.mark.parametrize("op", OPS)
def test_eps(op, eps, backend):
    check(op, make_inputs(op, (5, 65), torch.float32), backend, eps=eps)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_rms_norm_default_eps_is_that_of_torch(dtype, backend):
    x = torch.randn(4, 65).mul(1e-4).to(dtype)
    torch.testing.assert_close(fastattn.rms_norm(x, 65, backend=backend), F.rms_norm(x, (65,)))


# --- Accuracy --------------------------------------------------------------------------------------------------------


def test_a_large_mean_costs_no_accuracy(cpu_isa):
    # 1e4 is a multiple of 2^-9 in float32: the input is what it is, exactly. Summing squares would lose all digits, and
    # a float32 mean alone three of them.
    x = torch.randn(8, 9000) + 1e4
    out = fastattn.layer_norm(x, 9000, backend="cpu")
    torch.testing.assert_close(out.double(), F.layer_norm(x.double(), (9000,)), rtol=0, atol=3e-6)
    check("layer_norm", make_inputs("layer_norm", (8, 768), torch.float32) | {"input": x[:, :768]}, "cpu")


def test_a_constant_row_gives_the_bias(cpu_isa):
    weight, bias = torch.randn(97), torch.randn(97)
    for value in (0.0, 0.1, 1e4, -3.7e30):
        out = fastattn.layer_norm(torch.full((2, 97), value), 97, weight, bias, backend="cpu")
        torch.testing.assert_close(out, bias.expand(2, 97), rtol=1e-6, atol=1e-6 if abs(value) < 1e5 else float("inf"))
        assert torch.isfinite(out).all()


@needs_cpu
def test_parameter_gradients_of_many_rows():
    inputs = make_inputs("layer_norm", (100_000, 16), torch.float32)
    check("layer_norm", inputs, "cpu")
    # A gradient that grows with the rows: sums of one sign lose most to rounding.
    leaf = inputs["weight"].requires_grad_()
    x = inputs["input"]
    fastattn.layer_norm(x, 16, leaf, inputs["bias"].requires_grad_(), backend="cpu").backward(torch.ones_like(x))
    torch.testing.assert_close(inputs["bias"].grad, torch.full((16,), 1e5), rtol=1e-6, atol=0)


@needs_cpu
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("shape", [(5000, 65), (37, 4097), (3, 131073)], ids=str)
def test_results_do_not_depend_on_the_number_of_threads(op, shape):
    inputs = make_inputs(op, shape, torch.float32)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(evaluate(op, inputs, "cpu"))
    finally:
        torch.set_num_threads(threads)
    for name, result in results[0].items():
        assert torch.equal(result, results[1][name]) and torch.equal(result, results[2][name]), name


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("op", OPS)
def test_a_bad_element_spoils_its_row_only(op, value, cpu_isa):
    inputs = make_inputs(op, (6, 97), torch.float32)
    inputs["input"][2, 96] = value
    results = evaluate(op, inputs, "cpu")
    spoilt = torch.isnan(results["out"]).any(dim=1) | (op.endswith("rms_norm") & (results["out"] == 0).any(dim=1))
    assert spoilt.tolist() == [row == 2 for row in range(6)]
    assert torch.isfinite(results["dinput"][[0, 1, 3, 4, 5]]).all()


# --- Memory ----------------------------------------------------------------------------------------------------------


def strided_views() -> dict[str, Tensor]:
    """(…, 65) views of larger tensors."""
    return {
        "columns of wider rows": torch.randn(6, 200)[:, 31:96],
        "every other row": torch.randn(12, 65)[::2],
        "a head of each token": torch.randn(2, 3, 4, 65)[:, :, 1],
        "one row expanded": torch.randn(1, 65).expand(6, 65),
        "transposed tokens and heads": torch.randn(2, 4, 3, 65).transpose(1, 2),
        "columns apart": torch.randn(6, 130)[:, ::2],
        "transposed": torch.randn(65, 6).t(),
        "rows that overlap": torch.randn(100).as_strided((6, 65), (7, 1)),
    }


@pytest.mark.parametrize("name", strided_views())
@pytest.mark.parametrize("op", OPS)
def test_strides(op, name, backend):
    view = strided_views()[name]
    inputs = make_inputs(op, tuple(view.shape), torch.float32) | {"input": view}
    if "residual" in inputs:
        inputs["residual"] = torch.randn(*view.shape[:-1], 67)[..., 1:66]
    results = check(op, inputs, backend)
    plain = evaluate(op, {name: t.contiguous() for name, t in inputs.items()}, backend)
    assert results["out"].is_contiguous() or backend == "eager"
    if backend == "cpu":
        for name, result in results.items():
            assert torch.equal(result, plain[name]), name


@pytest.mark.parametrize("cols", [1, 3, 65])
def test_strided_gradients(cols, backend):
    for dout in (torch.randn(cols, 6).t(), torch.randn(6, 2 * cols)[:, cols:], torch.randn(1).expand(6, cols)):
        inputs = [t.requires_grad_() for t in make_inputs("layer_norm", (6, cols), torch.float32).values()]
        out = fastattn.layer_norm(inputs[0], cols, *inputs[1:], backend=backend)
        strided = torch.autograd.grad(out, inputs, dout, retain_graph=True)
        for result, expected in zip(strided, torch.autograd.grad(out, inputs, dout.contiguous()), strict=True):
            assert torch.equal(result, expected)


@needs_cpu
@pytest.mark.parametrize("op", ["layer_norm", "add_rms_norm"])
def test_strided_rows_are_not_copied(op):
    inputs = make_inputs(op, (6, 4, 65), torch.float32)
    inputs = {name: torch.randn(6, 4, 90)[..., 3:68] if t.dim() == 3 else t for name, t in inputs.items()}
    copies = {"aten::copy_", "aten::contiguous", "aten::clone"}

    def events(tensors):
        with torch.no_grad(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            getattr(fastattn, op)(normalized_shape=65, backend="cpu", **tensors)
        return {event.name for event in profile.events()}

    assert not copies & events(inputs)
    # The test can fail: columns that are not neighbours are copied, and that shows.
    assert copies & events(inputs | {"input": torch.randn(6, 4, 130)[..., ::2]})


@pytest.mark.parametrize("offset", [1, 2, 3, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
def test_misaligned_pointers(dtype, offset, cpu_isa):
    def misaligned(shape):
        count = torch.Size(shape).numel()
        return torch.randn(count + offset).to(dtype)[offset:].view(shape)

    inputs = {"input": misaligned((5, 97)), "residual": misaligned((5, 97)), "weight": misaligned((97,)),
              "bias": misaligned((97,))}  # fmt: skip
    check("add_layer_norm", inputs, "cpu")


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_shape_and_stride(data):
    torch.manual_seed(0)
    op = data.draw(st.sampled_from(OPS))
    dtype = data.draw(st.sampled_from(DTYPES))
    shape = (*data.draw(st.lists(st.integers(0, 5), max_size=3)), data.draw(st.integers(1, 150)))

    def strided(shape):
        padded = [size * data.draw(st.integers(1, 2)) + data.draw(st.integers(0, 2)) for size in shape]
        order = data.draw(st.permutations(range(len(shape))))
        storage = torch.randn([padded[dim] for dim in order]).to(dtype)
        view = storage.permute([order.index(dim) for dim in range(len(shape))])
        for dim, size in enumerate(shape):
            step = data.draw(st.integers(1, max(1, view.shape[dim] // max(size, 1))))
            view = view.narrow(dim, 0, view.shape[dim])[(slice(None),) * dim + (slice(None, None, step),)]
            view = view.narrow(dim, view.shape[dim] - size, size)
        return view

    inputs = {name: strided(t.shape) for name, t in make_inputs(op, shape, dtype).items()}
    check(op, inputs, "auto")


# --- Dropout ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cols", [3, 64, 97, 1025])
@pytest.mark.parametrize("op", ["add_layer_norm", "add_rms_norm"])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_dropout_matches_eager(op, dtype, cols, cpu_isa):
    check(op, make_inputs(op, (2, 3, cols), dtype), "cpu", dropout_p=0.25)


@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 0.999])
def test_dropout_keeps_what_the_rule_keeps(dropout_p, backend):
    x, residual = torch.ones(5, 7, 200), torch.zeros(5, 7, 200)
    torch.manual_seed(3)
    _, new_residual = fastattn.add_rms_norm(x, residual, 200, dropout_p=dropout_p, backend=backend)
    torch.manual_seed(3)
    kept = dropout_mask(draw_rng_state(x.device), 1, 1, 35, 200, dropout_p).view(5, 7, 200)
    assert torch.equal(new_residual != 0, kept)
    torch.testing.assert_close(new_residual[kept], torch.full_like(new_residual[kept], 1 / (1 - dropout_p)))


def test_dropout_of_one_drops_everything(backend):
    inputs = make_inputs("add_layer_norm", (5, 97), torch.float32)
    inputs["input"][1, 2] = float("inf")
    results = evaluate("add_layer_norm", inputs, backend, dropout_p=1.0)
    assert torch.equal(results["new_residual"], inputs["residual"])
    assert torch.equal(results["dinput"], torch.zeros(5, 97))


def test_the_generator_is_left_alone_without_dropout(backend):
    inputs = make_inputs("add_layer_norm", (5, 97), torch.float32)
    before = torch.get_rng_state()
    fastattn.add_layer_norm(normalized_shape=97, backend=backend, **inputs)
    fastattn.explain("add_layer_norm", normalized_shape=97, dropout_p=0.5, **inputs)
    assert torch.equal(torch.get_rng_state(), before)
    fastattn.add_layer_norm(normalized_shape=97, dropout_p=0.5, backend=backend, **inputs)
    assert not torch.equal(torch.get_rng_state(), before)


# --- Autograd and the compiler ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", [(0,), (1,)], ids=["out", "new_residual"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("op", ["add_layer_norm", "add_rms_norm"])
def test_one_of_two_outputs_is_used(op, dropout_p, wanted, backend):
    inputs = make_inputs(op, (6, 97), torch.float32)
    options = {"dropout_p": dropout_p, "wanted": wanted}
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
    out.backward(torch.randn(out.shape, generator=generator, dtype=torch.float64).float())
    for name, leaf in leaves.items():
        if name in names:
            torch.testing.assert_close(leaf.grad, expected[f"d{name}"], rtol=1e-4, atol=1e-5)
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
    with pytest.raises(NotImplementedError, match="do not compute gradients of gradients"):
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
    "integer input": (TypeError, r"input must be floating, got torch\.int64", (X.long(), 65), {}),
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
    "integer residual": (TypeError, "residual must be floating", (X, X.long(), 65), {}),
    "residual elsewhere": (ValueError, "residual is on meta but input is on cpu", (X, X.to("meta"), 65), {}),
    "residual no tensor": (TypeError, "residual must be a tensor, got NoneType", (X, None, 65), {}),
    "dropout above 1": (ValueError, r"dropout_p must be in \[0, 1\], got 1.5", (X, X, 65), {"dropout_p": 1.5}),
    "dropout not a number": (ValueError, "dropout_p must be in", (X, X, 65), {"dropout_p": float("nan")}),
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
