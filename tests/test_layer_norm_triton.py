"""The norms on Triton: as accurate as eager for every feature, and what their launches and ops promise."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from devices import device_for
from layer_norm_cases import HALF, OPS, check, dtype_id, evaluate, make_inputs

import fastattn
from fastattn.dispatch import available_backends
from fastattn.ops import layer_norm_triton_launch
from fastattn.ops.triton_launch import Device

pytestmark = pytest.mark.skipif(
    available_backends()["triton"] is not None, reason=f"no triton backend: {available_backends()['triton']}"
)
DEVICE = device_for("triton")
ADD_OPS = ("add_layer_norm", "add_rms_norm")
# A row in registers, and with limits so low that the kernels for long rows run, in chunks.
LENGTHS = [1, 3, 31, 33, 64, 257, 1025]


@pytest.fixture
def short_limits(monkeypatch):
    """Rows of more than 64 elements count as long, and are taken 32 at a time."""
    for name, value in {"FWD_MAX_COLS": 64, "BWD_MAX_COLS": 64, "LOOP_COLS": 32, "LOOP_WARPS": 1}.items():
        monkeypatch.setattr(layer_norm_triton_launch, name, value)
    monkeypatch.setitem(layer_norm_triton_launch.PARTIAL_TILE, "BLOCK_COLS", 64)


# --- The matrix ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("affine", ["none", "weight", "bias", "weight bias"])
def test_matches_eager(op, affine):
    check(op, make_inputs(op, (3, 5, 97), torch.float32, affine=affine), "triton")


@pytest.mark.parametrize("dtype", HALF, ids=dtype_id)
@pytest.mark.parametrize("op", OPS)
def test_half_precision(op, dtype):
    check(op, make_inputs(op, (3, 5, 97), dtype), "triton")


@pytest.mark.parametrize("cols", LENGTHS)
@pytest.mark.parametrize("op", OPS)
def test_any_row_length(op, cols):
    check(op, make_inputs(op, (7, cols), torch.float32), "triton")


@pytest.mark.parametrize("rows", [1, 2, 31, 130])
@pytest.mark.parametrize("op", ["layer_norm", "add_rms_norm"])
def test_any_number_of_rows(op, rows, monkeypatch):
    # Several tiles of partial sums, too.
    monkeypatch.setitem(layer_norm_triton_launch.COLUMN_TILE, "BLOCK_ROWS", 2)
    check(op, make_inputs(op, (rows, 65), torch.float32), "triton")


@pytest.mark.parametrize("cols", [65, 96, 131])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("op", OPS)
def test_long_rows(op, dropout_p, cols, short_limits):
    if dropout_p > 0.0 and op not in ADD_OPS:
        pytest.skip(f"{op} has no dropout")
    options = {"dropout_p": dropout_p} if dropout_p > 0.0 else {}
    check(op, make_inputs(op, (9, cols), torch.float32), "triton", **options)


@pytest.mark.parametrize("op", ["layer_norm", "add_rms_norm"])
def test_rows_beyond_the_real_limit(op):
    check(op, make_inputs(op, (2, 16500), torch.bfloat16, parameter_dtype=torch.float32), "triton")


@pytest.mark.parametrize("parameter_dtype", [torch.float32, torch.bfloat16, torch.float64], ids=dtype_id)
@pytest.mark.parametrize("op", OPS)
def test_parameters_of_another_dtype(op, parameter_dtype):
    results = check(op, make_inputs(op, (6, 97), torch.float16, parameter_dtype=parameter_dtype), "triton")
    assert results["out"].dtype == torch.float16
    assert results["dweight"].dtype == parameter_dtype


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize(
    ("dtype", "residual_dtype"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.float16, torch.bfloat16),
    ],
    ids=dtype_id,
)
@pytest.mark.parametrize("op", ADD_OPS)
def test_residual_of_another_dtype(op, dtype, residual_dtype, dropout_p):
    inputs = make_inputs(op, (6, 97), dtype, residual_dtype=residual_dtype)
    results = check(op, inputs, "triton", dropout_p=dropout_p)
    assert results["out"].dtype == results["dinput"].dtype == dtype
    assert results["new_residual"].dtype == results["dresidual"].dtype == residual_dtype


@pytest.mark.parametrize("cols", [3, 64, 257])
@pytest.mark.parametrize("op", ADD_OPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
def test_dropout_matches_eager(op, dtype, cols):
    check(op, make_inputs(op, (2, 3, cols), dtype), "triton", dropout_p=0.25)


# --- Accuracy --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cols", [1500, 16500], ids=["in registers", "long"])
def test_a_large_mean_costs_no_accuracy(cols):
    # 1e4 is a multiple of 2^-9 in float32: the input is what it is, exactly. Summing squares would lose all digits.
    x = torch.randn(4, cols, device=DEVICE) + 1e4
    out = fastattn.layer_norm(x, cols, backend="triton")
    # A long row is normalised by its mean in float32, half an ulp of 1e4 off.
    tolerance = 3e-6 if cols < 2000 else 1e-3
    torch.testing.assert_close(out.double(), F.layer_norm(x.double(), (cols,)), rtol=0, atol=tolerance)


def test_what_pads_a_row_does_not_count_in_its_variance():
    """Deviations of half an ulp of the mean: the rounded mean is as far off, and 127 elements of 256 are padding."""
    x = (2.0**23 + torch.arange(129, device=DEVICE) % 2).expand(3, 129)
    out = fastattn.layer_norm(x, 129, backend="triton")
    torch.testing.assert_close(out.double(), F.layer_norm(x.double(), (129,)), rtol=0, atol=1e-4)


def test_a_constant_row_gives_the_bias(short_limits):
    for cols in (50, 97):
        weight, bias = torch.randn(cols, device=DEVICE), torch.randn(cols, device=DEVICE)
        for value in (0.0, 0.1, 1e4, -3.7e30):
            x = torch.full((2, cols), value, device=DEVICE)
            out = fastattn.layer_norm(x, cols, weight, bias, backend="triton")
            assert torch.isfinite(out).all()
            if abs(value) < 1e5:
                torch.testing.assert_close(out, bias.expand(2, cols), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("cols", [50, 97], ids=["in registers", "long"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("op", OPS)
def test_a_bad_element_spoils_its_row_only(op, value, cols, short_limits):
    inputs = make_inputs(op, (6, cols), torch.float32)
    inputs["input"][2, cols - 1] = value
    results = evaluate(op, inputs, "triton")
    spoilt = torch.isnan(results["out"]).any(dim=1) | (op.endswith("rms_norm") & (results["out"] == 0).any(dim=1))
    assert spoilt.tolist() == [row == 2 for row in range(6)]
    assert torch.isfinite(results["dinput"][[0, 1, 3, 4, 5]]).all()


def test_a_weight_that_is_loaded_again_gives_the_same_bits(monkeypatch):
    inputs = make_inputs("add_layer_norm", (9, 50), torch.float32)
    kept = evaluate("add_layer_norm", inputs, "triton", dropout_p=0.2)
    monkeypatch.setattr(layer_norm_triton_launch, "KEEP_WEIGHT_MAX_COLS", 1)
    loaded = evaluate("add_layer_norm", inputs, "triton", dropout_p=0.2)
    for name, result in kept.items():
        assert torch.equal(result, loaded[name]), name


@pytest.mark.parametrize("cols", [50, 97], ids=["in registers", "long"])
def test_the_same_bits_in_every_run(cols, short_limits):
    inputs = make_inputs("add_layer_norm", (14, cols), torch.float32)
    first, second = (evaluate("add_layer_norm", inputs, "triton", dropout_p=0.2) for _ in range(2))
    for name, result in first.items():
        assert torch.equal(result, second[name]), name


# --- Launches --------------------------------------------------------------------------------------------------------

H100 = Device(132, (9, 0), 227 * 1024)


@pytest.mark.parametrize("rows", [1, 100, 4096, 1_000_000])
@pytest.mark.parametrize("cols", [1, 33, 768, 1024, 1025, 4096, 8192, 16384, 100_000])
def test_tiles_hold_the_row_and_little_else(rows, cols):
    launches = layer_norm_triton_launch
    for tile, limit in (
        (launches.fwd_tile(rows, cols, H100), launches.FWD_MAX_COLS),
        (launches.bwd_tile(rows, cols, H100), launches.BWD_MAX_COLS),
    ):
        if cols > limit:
            assert tile is None
            continue
        assert tile is not None and cols <= tile.cols < max(2 * cols, 33)
        assert 1 <= tile.warps <= 16 and tile.rows * tile.cols <= 32 * 32 * tile.warps
        # More than one row a program only where every multiprocessor has work.
        assert tile.rows == 1 or rows >= 2 * tile.rows * H100.multiprocessors


def test_a_program_of_the_backward_takes_several_tiles():
    tile = layer_norm_triton_launch.bwd_tile(100_000, 768, H100)
    programs = layer_norm_triton_launch.bwd_programs(100_000, tile, H100)
    assert H100.multiprocessors <= programs < 100_000 // tile.rows
    assert layer_norm_triton_launch.bwd_programs(3, tile, H100) <= 3


# --- Ops -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
def test_opcheck(rms):
    x, dout = (torch.randn(3, 5, 65, device=DEVICE).bfloat16().requires_grad_() for _ in range(2))
    residual = torch.randn(3, 5, 65, device=DEVICE).requires_grad_()
    weight = torch.randn(65, device=DEVICE).requires_grad_()
    bias = None if rms else torch.randn(65, device=DEVICE).bfloat16().requires_grad_()
    rng_state = torch.tensor([5, 6], device=DEVICE)
    ops, check_op = torch.ops.fastattn, torch.library.opcheck
    check_op(ops.layer_norm_triton.default, (x, weight, bias, 1, 1e-5, rms))
    check_op(ops.add_layer_norm_triton.default, (x, residual, weight, bias, rng_state, 0.3, 1, 1e-5, rms))
    check_op(ops.add_layer_norm_triton.default, (x, x, None, None, None, 0.0, 1, 1e-5, rms))
    x, dout, residual, weight = x.detach(), dout.detach(), residual.detach(), weight.detach()
    bias_dtype = None if rms else torch.bfloat16
    _, mean, rstd = ops.layer_norm_triton.default(x, weight, None, 1, 1e-5, rms)
    for needs in ((True, not rms), (False, False)):
        check_op(ops.layer_norm_backward_triton.default, (dout, x, mean, rstd, weight, 1, rms, *needs, bias_dtype))
        for rng, dropout_p in ((rng_state, 0.3), (None, 0.0)):
            check_op(
                ops.add_layer_norm_backward_triton.default,
                (dout, residual, residual, mean, rstd, weight, rng, dropout_p, 1, rms, *needs, bias_dtype, x.dtype),
            )


@pytest.mark.parametrize("op", OPS)
def test_gradients_of_gradients_are_refused(op):
    inputs = {n: t.to(DEVICE).requires_grad_() for n, t in make_inputs(op, (5, 7), torch.float32).items()}
    outputs = getattr(fastattn, op)(normalized_shape=7, backend="triton", **inputs)
    out = outputs[0] if isinstance(outputs, tuple) else outputs
    (dinput,) = torch.autograd.grad(out.square().sum(), inputs["input"], create_graph=True)
    with pytest.raises(NotImplementedError, match=rf"^{op}: the kernels do not compute gradients of gradients"):
        dinput.square().sum().backward()


def test_ops_check_what_memory_safety_needs():
    ops, x, short = torch.ops.fastattn, torch.zeros(4, 65, device=DEVICE), torch.zeros(4, 64, device=DEVICE)
    forward, backward, add = ops.layer_norm_triton, ops.layer_norm_backward_triton, ops.add_layer_norm_triton
    weight, rstd = torch.zeros(65, device=DEVICE), torch.zeros(4, device=DEVICE)
    bad = [
        (ValueError, "normalized_dims must be", forward, (x, None, None, 3, 1e-5, False)),
        (ValueError, "normalized_dims must be", forward, (x, None, None, 0, 1e-5, False)),
        (ValueError, "weight must be", forward, (x, weight, None, 2, 1e-5, False)),
        (TypeError, "must be float32", forward, (x.double(), None, None, 1, 1e-5, False)),
        (ValueError, "bias must be", forward, (x, None, weight[:64], 1, 1e-5, False)),
        (ValueError, "residual must be", add, (x, short, None, None, None, 0.0, 1, 1e-5, False)),
        (TypeError, "residual must be", add, (x, x.double(), None, None, None, 0.0, 1, 1e-5, False)),
        (ValueError, "needs rng_state", add, (x, x, None, None, None, 0.5, 1, 1e-5, False)),
        (ValueError, "dropout_p must be in", add, (x, x, None, None, None, 1.5, 1, 1e-5, False)),
        (ValueError, "rng_state must", add, (x, x, None, None, rstd[:1].long(), 0.5, 1, 0.1, True)),
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


def test_refusals_say_why():
    x = torch.randn(4, 65, device=DEVICE)
    with pytest.raises(NotImplementedError, match=r"'triton' cannot run this: input has dtype torch\.float64"):
        fastattn.layer_norm(x.double(), 65, backend="triton")
    with pytest.raises(NotImplementedError, match=r"residual has dtype torch\.float64"):
        fastattn.add_rms_norm(x, x.double(), 65, backend="triton")
    with pytest.raises(NotImplementedError, match="input is on meta"):
        fastattn.layer_norm(x.to("meta"), 65, backend="triton")
