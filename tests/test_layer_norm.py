"""layer_norm, rms_norm, add_layer_norm, add_rms_norm: as accurate as eager PyTorch, for any shape, stride and dtype."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from devices import generator_state
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_norm_cases import DTYPES, HALF, OPS, check, dtype_id, evaluate, make_inputs, needs_cpu, skip_refusals
from torch import Tensor

import fastattn
from fastattn.dispatch import TABLE, available_backends
from fastattn.ops.philox import draw_rng_state, dropout_mask

pytestmark = pytest.mark.usefixtures("tensors_where_the_backend_runs")


@pytest.fixture(params=[kernel.backend for kernel in TABLE["layer_norm"]])
def backend(request: pytest.FixtureRequest) -> str:
    reason = available_backends()[request.param]
    if reason is not None:
        pytest.skip(f"no {request.param} backend: {reason}")
    return request.param


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
            fastattn.add_layer_norm(normalized_shape=97, backend="cpu", **inputs)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize(("rows", "cols"), [(2049, 1024), (512, 4096)])
def test_a_large_residual_stream_is_the_small_ones_together(rows, cols, dropout_p, cpu_isa):
    # From 8 MiB on the CPU kernel writes new_residual past the caches and normalises a copy of the row.
    inputs = make_inputs("add_layer_norm", (rows, cols), torch.float32)
    arguments = (cols,), inputs["weight"], inputs["bias"]
    torch.manual_seed(0)
    large = fastattn.add_layer_norm(inputs["input"], inputs["residual"], *arguments, dropout_p=dropout_p, backend="cpu")
    torch.manual_seed(0)
    dropped = (inputs["input"] * _kept(rows, cols, dropout_p) / (1 - dropout_p)).split(128)
    small = [fastattn.add_layer_norm(x, residual, *arguments, backend="cpu")
             for x, residual in zip(dropped, inputs["residual"].split(128), strict=True)]  # fmt: skip
    for whole, parts in zip(large, zip(*small, strict=True), strict=True):
        torch.testing.assert_close(whole, torch.cat(parts), rtol=0, atol=1e-5 if dropout_p else 0)


@pytest.mark.parametrize(("rows", "cols"), [(8193, 1024), (8400, 1001)], ids=["streamed", "unaligned"])
@pytest.mark.parametrize("op", ["layer_norm", "rms_norm"])
def test_a_large_output_is_the_small_ones_together(op, rows, cols, cpu_isa):
    # From 32 MiB on the CPU kernel writes out past the caches.
    inputs = make_inputs(op, (rows, cols), torch.float32)
    x, parameters = inputs.pop("input"), inputs
    large = getattr(fastattn, op)(x, cols, **parameters, backend="cpu")
    small = [getattr(fastattn, op)(part, cols, **parameters, backend="cpu") for part in x.split(1024)]
    assert torch.equal(large, torch.cat(small))


def _kept(rows: int, cols: int, dropout_p: float) -> Tensor:
    if dropout_p == 0.0:
        return torch.ones(())
    return dropout_mask(draw_rng_state(torch.device("cpu")), 1, 1, rows, cols, dropout_p)[0, 0]


@pytest.mark.parametrize(
    ("rows", "cols", "dropout_p"),
    [(2051, 1024, 0.0), (4097, 1024, 0.0), (1025, 4096, 0.0), (4210, 1001, 0.0), (4097, 1024, 0.3)],
    ids=["single rows", "streamed", "streamed, long rows", "unaligned", "dinput beside dx"],
)
def test_gradients_larger_than_the_caches(rows, cols, dropout_p, cpu_isa):
    # The CPU kernel takes rows one by one from 8 MiB of dx on, and writes it past the caches from 16 MiB on.
    inputs = make_inputs("add_layer_norm", (rows, cols), torch.float32)
    check("add_layer_norm", inputs, "cpu", dropout_p=dropout_p)


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
    assert results["dweight"].shape == shape[-1:] and not results["dweight"].any()


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
    with skip_refusals():
        out = fastattn.rms_norm(x, 65, backend=backend)
    torch.testing.assert_close(out, F.rms_norm(x, (65,)))


# --- Accuracy --------------------------------------------------------------------------------------------------------


def test_a_large_mean_costs_no_accuracy(cpu_isa):
    # 1e4 is a multiple of 2^-9 in float32: the input is what it is, exactly. Summing squares would lose all digits, and
    # a float32 mean alone three of them.
    x = torch.randn(8, 9000) + 1e4
    out = fastattn.layer_norm(x, 9000, backend="cpu")
    torch.testing.assert_close(out.double(), F.layer_norm(x.double(), (9000,)), rtol=0, atol=3e-6)
    check("layer_norm", make_inputs("layer_norm", (8, 768), torch.float32) | {"input": x[:, :768]}, "cpu")


def test_a_poor_guess_at_the_mean_costs_no_accuracy(cpu_isa):
    # The kernel guesses the mean from four vectors spread over the row: here they, and they alone, are outliers.
    x = torch.randn(8, 4096).mul(1e-3)
    for column in (0, 1360, 2720, 4080):
        x[:, column : column + 16] += 1.0
    out = fastattn.layer_norm(x, 4096, backend="cpu")
    torch.testing.assert_close(out.double(), F.layer_norm(x.double(), (4096,)), rtol=3e-7, atol=3e-8)


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
        "a head of each token": torch.randn(2, 3, 5, 65)[:, :, 1],
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
    assert torch.equal(results["new_residual"], inputs["residual"].cpu())
    assert results["dinput"].shape == (5, 97) and not results["dinput"].any()


def test_the_generator_is_left_alone_without_dropout(backend):
    inputs = make_inputs("add_layer_norm", (5, 97), torch.float32)
    before = generator_state(backend)
    fastattn.add_layer_norm(normalized_shape=97, backend=backend, **inputs)
    fastattn.explain("add_layer_norm", normalized_shape=97, dropout_p=0.5, **inputs)
    assert torch.equal(generator_state(backend), before)
    fastattn.add_layer_norm(normalized_shape=97, dropout_p=0.5, backend=backend, **inputs)
    assert not torch.equal(generator_state(backend), before)
