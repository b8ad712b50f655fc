"""The norms on CUDA kernels, on a device or emulated: as accurate as eager in every shape of row, on any schedule."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.nn.functional as F
from devices import device_for
from emulated import MODES, AsyncMode, Mode, Schedule
from layer_norm_cases import HALF, OPS, check, dtype_id, evaluate, make_inputs

import fastattn
from fastattn._extension import extension
from fastattn.dispatch import available_backends

BACKEND = "cuda" if available_backends()["cuda"] is None else "emulated"
DEVICE = device_for(BACKEND)
ADD_OPS = ("add_layer_norm", "add_rms_norm")
CUDA_DTYPES = (torch.float32, *HALF)
pytestmark = pytest.mark.skipif(
    available_backends()[BACKEND] is not None, reason=f"no CUDA kernels: {available_backends()[BACKEND]}"
)
only_emulated = pytest.mark.skipif(BACKEND == "cuda", reason="a device has one schedule and one size")

# One length for each shape of row in csrc/layer_norm/layer_norm_{fwd,bwd}_cuda.cu, counted in chunks of 16 bytes, some
# full and some with a partial chunk at the end; the last ones are too long for registers in backward, then in forward.
CHUNKS = (1, 8, 9, 32, 40, 64, 100, 129, 256, 300, 600, 1024, 1030, 2049, 4097)


@pytest.fixture
def device_of_two_multiprocessors():
    """Few blocks, so that each goes through several rows."""
    if BACKEND == "emulated":
        Mode().apply(multiprocessors=2)
    yield
    if BACKEND == "emulated":
        Mode().apply()


# --- The matrix ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", CUDA_DTYPES, ids=dtype_id)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("affine", ["none", "weight", "bias", "weight bias"])
def test_matches_eager(op, dtype, affine):
    check(op, make_inputs(op, (3, 5, 97), dtype, affine=affine), BACKEND)


@pytest.mark.parametrize("tail", [0, -1], ids=["whole", "partial"])
@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("op", ["layer_norm", "add_rms_norm"])
def test_any_shape_of_row(op, chunks, tail, device_of_two_multiprocessors):
    options = {"dropout_p": 0.2} if op in ADD_OPS and chunks % 2 else {}
    rows = 3 if chunks > 500 else 11
    check(op, make_inputs(op, (rows, 4 * chunks + tail), torch.float32), BACKEND, **options)


@pytest.mark.parametrize("chunks", [8, 31, 100, 250, 1030])
@pytest.mark.parametrize("dtype", HALF, ids=dtype_id)
@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
def test_any_shape_of_row_in_half_precision(dtype, chunks, dropout_p, device_of_two_multiprocessors):
    inputs = make_inputs("add_layer_norm", (5, 8 * chunks), dtype, parameter_dtype=torch.float32)
    check("add_layer_norm", inputs, BACKEND, dropout_p=dropout_p)


def test_the_longest_rows():
    check("layer_norm", make_inputs("layer_norm", (2, 131073), torch.bfloat16), BACKEND)


# The backward gives a block 16, 4 or 1 rows at a time; a grid of few blocks comes back for more.
@pytest.mark.parametrize("cols", [16, 65, 160, 600, 4200])
@pytest.mark.parametrize("rows", [1, 2, 15, 17, 133])
def test_any_number_of_rows(rows, cols, device_of_two_multiprocessors):
    if rows * cols > 100_000:
        rows = 13
    check("layer_norm", make_inputs("layer_norm", (rows, cols), torch.float32), BACKEND)


@pytest.mark.parametrize("parameter_dtype", [torch.float32, torch.bfloat16, torch.float64], ids=dtype_id)
@pytest.mark.parametrize("op", OPS)
def test_parameters_of_another_dtype(op, parameter_dtype):
    results = check(op, make_inputs(op, (6, 97), torch.float16, parameter_dtype=parameter_dtype), BACKEND)
    assert results["dweight"].dtype == parameter_dtype


@pytest.mark.parametrize("cols", [96, 97, 4200])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", HALF, ids=dtype_id)
@pytest.mark.parametrize("op", ADD_OPS)
def test_float32_residual_stream(op, dtype, dropout_p, cols):
    inputs = make_inputs(op, (3, cols), dtype, residual_dtype=torch.float32)
    results = check(op, inputs, BACKEND, dropout_p=dropout_p)
    assert results["new_residual"].dtype == results["dresidual"].dtype == torch.float32


def test_only_the_gradients_that_are_wanted():
    for names in (("input",), ("weight",), ("bias",)):
        inputs = make_inputs("layer_norm", (5, 97), torch.float32)
        expected = evaluate("layer_norm", inputs, "eager", device=DEVICE)
        leaves = {name: t.to(DEVICE).requires_grad_(name in names) for name, t in inputs.items()}
        out = fastattn.layer_norm(normalized_shape=97, backend=BACKEND, **leaves)
        generator = torch.Generator().manual_seed(8)
        out.backward(torch.randn(out.shape, generator=generator, dtype=torch.float64).float().to(DEVICE))
        for name in names:
            torch.testing.assert_close(leaves[name].grad.cpu(), expected[f"d{name}"], rtol=1e-4, atol=1e-5)


# --- Numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cols", [768, 9000])
def test_a_large_mean_costs_no_accuracy(cols):
    # 1e4 is a multiple of 2^-9 in float32: the input is what it is, exactly. Summing squares would lose all digits, and
    # a float32 mean alone three of them.
    x = torch.randn(4, cols, device=DEVICE) + 1e4
    out = fastattn.layer_norm(x, cols, backend=BACKEND)
    torch.testing.assert_close(out.double(), F.layer_norm(x.double(), (cols,)), rtol=0, atol=3e-6)


@pytest.mark.parametrize("value", [0.0, 0.1, 1e4])
def test_a_constant_row_gives_the_bias(value):
    weight, bias = torch.randn(97, device=DEVICE), torch.randn(97, device=DEVICE)
    out = fastattn.layer_norm(torch.full((2, 97), value, device=DEVICE), 97, weight, bias, backend=BACKEND)
    torch.testing.assert_close(out, bias.expand(2, 97), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("op", OPS)
def test_a_bad_element_spoils_its_row_only(op, value):
    inputs = make_inputs(op, (6, 97), torch.float32)
    inputs["input"][2, 96] = value
    results = evaluate(op, inputs, BACKEND)
    spoilt = torch.isnan(results["out"]).any(dim=1) | (op.endswith("rms_norm") & (results["out"] == 0).any(dim=1))
    assert spoilt.tolist() == [row == 2 for row in range(6)]
    assert torch.isfinite(results["dinput"][[0, 1, 3, 4, 5]]).all()


@pytest.mark.parametrize("cols", [65, 700, 4200])
def test_results_are_the_same_bits_on_every_run(cols):
    inputs = make_inputs("add_layer_norm", (9, cols), torch.float32)
    first, second = (evaluate("add_layer_norm", inputs, BACKEND, dropout_p=0.1) for _ in range(2))
    for name, result in first.items():
        assert torch.equal(result, second[name]), name


# --- Memory ----------------------------------------------------------------------------------------------------------


def _padded(shape, dtype, before, after):
    """A view whose rows lie apart and whose neighbours, before and after each row, are NaN."""
    wide = torch.full((*shape[:-1], before + shape[-1] + after), float("nan"), dtype=dtype, device=DEVICE)
    view = wide[..., before : before + shape[-1]]
    view.copy_(torch.randn(shape))
    return view


# (before, after): rows at any address; aligned rows apart; a first row that is aligned and others that are not.
@pytest.mark.parametrize("before, after", [(1, 0), (3, 5), (16, 16), (0, 1)], ids=str)
@pytest.mark.parametrize("dtype", CUDA_DTYPES, ids=dtype_id)
@pytest.mark.parametrize("cols", [64, 65, 4224])
def test_rows_at_any_address(dtype, cols, before, after):
    rows = 5 if cols < 100 else 2
    inputs = {name: _padded((rows, cols), dtype, before, after) for name in ("input", "residual")}
    inputs |= {name: _padded((cols,), dtype, before, after) for name in ("weight", "bias")}
    strided = check("add_layer_norm", inputs, BACKEND)
    plain = evaluate("add_layer_norm", {name: t.contiguous() for name, t in inputs.items()}, BACKEND)
    for name, result in strided.items():
        assert torch.equal(result, plain[name]), name


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0), (2, 0, 4), (0,)], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_empty(op, shape):
    results = evaluate(op, make_inputs(op, shape, torch.float32), BACKEND)
    assert results["out"].shape == results["dinput"].shape == shape
    assert torch.equal(results["dweight"], torch.zeros(shape[-1]))


# --- The emulator ----------------------------------------------------------------------------------------------------


@only_emulated
@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("cols", [40, 250, 1100, 4200])
def test_whatever_the_schedule(mode, cols):
    """Every schedule gives the bits of the plain one, which the tests above compare with eager."""
    inputs = make_inputs("add_layer_norm", (9, cols), torch.float32)
    expected = evaluate("add_layer_norm", inputs, BACKEND, dropout_p=0.1)
    mode.apply(multiprocessors=2)
    try:
        results = evaluate("add_layer_norm", inputs, BACKEND, dropout_p=0.1)
    finally:
        Mode().apply()
    for name in ("out", "new_residual", "dinput", "dresidual"):
        assert torch.equal(results[name], expected[name]), name
    for name in ("dweight", "dbias"):  # fewer blocks, other partial sums
        torch.testing.assert_close(results[name], expected[name], rtol=1e-5, atol=1e-5)


@only_emulated
def test_blocks_on_several_os_threads():
    inputs = make_inputs("layer_norm", (37, 97), torch.float32)
    expected = evaluate("layer_norm", inputs, BACKEND)
    Mode(Schedule.UNIFORM, AsyncMode.RANDOM, seed=5, os_threads=3).apply()
    try:
        results = evaluate("layer_norm", inputs, BACKEND)
    finally:
        Mode().apply()
    for name, result in results.items():
        assert torch.equal(result, expected[name]), name


@only_emulated
def test_backward_is_emulated_where_forward_was():
    """The switch is a thread's; backward on another thread has to find it again. The CPU kernels give other bits."""
    inputs = make_inputs("layer_norm", (40, 97), torch.float32)
    leaves = {name: t.requires_grad_() for name, t in inputs.items()}
    gradients = {}
    for backend in ("cpu", "emulated"):
        out = fastattn.layer_norm(normalized_shape=97, backend=backend, **leaves)
        assert not extension.emulating()
        for where in ("here", "thread"):
            grads = []
            run = lambda out=out, grads=grads: grads.extend(  # noqa: E731
                torch.autograd.grad(out.sin().sum(), leaves.values(), retain_graph=True)
            )
            if where == "here":
                run()
            else:
                thread = threading.Thread(target=run)
                thread.start()
                thread.join()
            gradients[backend, where] = torch.cat([g.flatten() for g in grads])
    assert torch.equal(gradients["emulated", "here"], gradients["emulated", "thread"])
    assert not torch.equal(gradients["emulated", "here"], gradients["cpu", "here"])


@only_emulated
def test_the_emulator_is_left_after_an_error():
    with pytest.raises(RuntimeError), extension.Emulation():
        assert extension.emulating()
        raise RuntimeError
    assert not extension.emulating()


def test_opcheck():
    x, weight, bias = (torch.randn(s, device=DEVICE).requires_grad_() for s in ((3, 65), (65,), (65,)))
    rng_state = torch.tensor([5, 6], device=DEVICE)
    ops = torch.ops.fastattn
    with extension.Emulation(BACKEND == "emulated"):
        torch.library.opcheck(ops.layer_norm.default, (x, weight, bias, 1, 1e-5, False))
        torch.library.opcheck(ops.add_layer_norm.default, (x, x, weight, bias, rng_state, 0.3, 1, 1e-5, False))
