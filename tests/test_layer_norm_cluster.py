"""Rows of the norms that a cluster of blocks shares on compute capability 9.0, on a device or emulated."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from devices import device_for
from emulated import MODES, Mode
from layer_norm_cases import HALF, OPS, check, dtype_id, evaluate, make_inputs

import fastattn
from fastattn.dispatch import available_backends

BACKEND = "cuda" if available_backends()["cuda"] is None else "emulated"
DEVICE = device_for(BACKEND)
pytestmark = [
    pytest.mark.skipif(
        available_backends()[BACKEND] is not None, reason=f"no CUDA kernels: {available_backends()[BACKEND]}"
    ),
    pytest.mark.skipif(
        BACKEND == "cuda" and torch.cuda.get_device_capability() != (9, 0), reason="clusters are for 9.0"
    ),
]
only_emulated = pytest.mark.skipif(BACKEND == "cuda", reason="a device has one schedule and one size")

# Chunks of 16 bytes: just past a block's share and at both ends of what 2, 4 and 8 blocks hold, backward (1024 each)
# and forward (2048), then 8 long shares, and rows too long for any cluster.
CHUNKS = (1025, 2048, 2049, 4096, 4097, 8192, 8193, 16384, 16385, 32768, 32769)


@pytest.fixture(autouse=True)
def hopper():
    """A card with room for two clusters of eight, so that each goes through several rows."""
    if BACKEND == "emulated":
        Mode().apply(compute_capability=90, multiprocessors=16)
    yield
    if BACKEND == "emulated":
        Mode().apply()


@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("op", ["layer_norm", "add_rms_norm"])
def test_any_number_of_blocks(op, chunks):
    rows = 5 if chunks < 3000 else 3 if chunks < 9000 else 1
    cols = 4 * chunks - chunks % 2  # a partial chunk at the end of every second length
    check(op, make_inputs(op, (rows, cols), torch.float32), BACKEND)


@pytest.mark.parametrize("cols", [16384, 65536, 131072])
@pytest.mark.parametrize("op", OPS)
def test_the_lengths_that_models_have(op, cols):
    check(op, make_inputs(op, (2, cols), torch.bfloat16, parameter_dtype=torch.float32), BACKEND)


@pytest.mark.parametrize("cols", [16391, 32776])
@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
@pytest.mark.parametrize("dtype", HALF, ids=dtype_id)
def test_half_precision_with_a_float32_residual(dtype, dropout_p, cols):
    inputs = make_inputs("add_layer_norm", (3, cols), dtype, residual_dtype=torch.float32)
    check("add_layer_norm", inputs, BACKEND, dropout_p=dropout_p)


@pytest.mark.parametrize("affine", ["none", "weight"])
def test_without_parameters(affine):
    check("layer_norm", make_inputs("layer_norm", (3, 9001), torch.float32, affine=affine), BACKEND)


def test_rows_at_any_address():
    wide = torch.randn(3, 8300, device=DEVICE)
    inputs = {name: wide[:, start : start + 8199] for name, start in (("input", 1), ("residual", 101))}
    plain = evaluate("add_layer_norm", {name: t.contiguous() for name, t in inputs.items()}, BACKEND)
    for name, result in check("add_layer_norm", inputs, BACKEND).items():
        assert torch.equal(result, plain[name]), name


@pytest.mark.parametrize("rows", [0, 1, 7])
def test_any_number_of_rows(rows):
    if rows == 0:
        results = evaluate("layer_norm", make_inputs("layer_norm", (0, 9000), torch.float32), BACKEND)
        assert torch.equal(results["dweight"], torch.zeros(9000))
    else:
        check("layer_norm", make_inputs("layer_norm", (rows, 4100), torch.float32), BACKEND)


def test_a_large_mean_costs_no_accuracy():
    # The parts of a row differ in their means as well, which the combination of moments has to bring together.
    x = torch.randn(2, 20000, device=DEVICE) + 1e4
    x[1] += torch.linspace(-3, 3, 20000, device=DEVICE)
    out = fastattn.layer_norm(x, 20000, backend=BACKEND)
    torch.testing.assert_close(out.double(), F.layer_norm(x.double(), (20000,)), rtol=0, atol=3e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("column", [0, 8999])
def test_a_bad_element_spoils_its_row_only(value, column):
    inputs = make_inputs("layer_norm", (3, 9000), torch.float32)
    inputs["input"][1, column] = value
    results = evaluate("layer_norm", inputs, BACKEND)
    assert torch.isnan(results["out"]).all(dim=1).tolist() == [False, True, False]
    assert torch.isfinite(results["dinput"][[0, 2]]).all()


@only_emulated
def test_other_cards_give_the_row_to_one_block():
    inputs = make_inputs("layer_norm", (2, 9000), torch.float32)
    hopper = evaluate("layer_norm", inputs, BACKEND)
    Mode().apply(compute_capability=80)
    other = evaluate("layer_norm", inputs, BACKEND)
    assert not torch.equal(hopper["out"], other["out"])  # other sums, other last bits
    torch.testing.assert_close(hopper["out"], other["out"], rtol=1e-5, atol=1e-5)


@only_emulated
@pytest.mark.parametrize("mode", [*MODES[1:], Mode(os_threads=2)], ids=str)
@pytest.mark.parametrize("cols", [9000, 33000])
def test_whatever_the_schedule(mode, cols):
    """Every schedule gives the bits of the plain one, which the tests above compare with eager."""
    inputs = make_inputs("add_layer_norm", (5, cols), torch.float32)
    expected = evaluate("add_layer_norm", inputs, BACKEND, dropout_p=0.1)
    mode.apply(compute_capability=90, multiprocessors=16)
    for name, result in evaluate("add_layer_norm", inputs, BACKEND, dropout_p=0.1).items():
        assert torch.equal(result, expected[name]), name
