"""INT8 on Triton: what its launches choose, where they change kernels, and what its ops promise when called directly.
Accuracy, shapes, strides and gradients: test_int8_matmul.py, with every other backend."""

from __future__ import annotations

import pytest
import torch

import fastattn
from fastattn.dispatch import available_backends
from fastattn.ops import int8_matmul_triton_launch as launches
from fastattn.ops.triton_launch import Device

pytestmark = pytest.mark.skipif(
    available_backends()["triton"] is not None, reason=f"no triton backend: {available_backends()['triton']}"
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
A100, RTX4090, H100 = Device(108, (8, 0), 163 << 10), Device(128, (8, 9), 99 << 10), Device(132, (9, 0), 227 << 10)


def random_int8(*shape):
    return torch.randint(-127, 128, shape, dtype=torch.int8, device=DEVICE)


def random_linear(columns, depth):
    weight, scale = fastattn.quantize_int8(torch.randn(columns, depth, device=DEVICE), backend="eager")
    return weight, scale, torch.randn(columns, device=DEVICE)


def test_more_columns_than_a_tile_can_address_are_refused():
    columns = launches.MAX_STRIDE + 1
    a, b = random_int8(1, 1), random_int8(columns, 1)
    a_scale, b_scale = torch.ones(1, device=DEVICE), torch.ones(columns, device=DEVICE)
    for op, arguments in (("int8_matmul", (a, b, a_scale, b_scale)), ("int8_linear", (a.float(), b, b_scale))):
        with pytest.raises(NotImplementedError, match=f"'triton' cannot run this: N is {columns}"):
            getattr(fastattn, op)(*arguments, backend="triton")
        with pytest.raises(NotImplementedError, match=f"N is {columns}"):
            getattr(torch.ops.fastattn, f"{op}_triton")(*arguments, None, "none", *([torch.float32] * (op[5] == "m")))


# --- Where kernels change --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("depth", [64, 65, 200])
def test_long_rows_quantize_like_eager(depth, dtype, monkeypatch):
    monkeypatch.setattr(launches, "QUANTIZE_MAX_DEPTH", 64)
    monkeypatch.setitem(launches.QUANTIZE_LONG, "BLOCK_DEPTH", 32)
    x = torch.randn(5, depth, device=DEVICE).to(dtype)
    x[1] = 0
    x[2, depth - 1] = float("nan")
    x[3, 40] = 1000
    q, scale = fastattn.quantize_int8(x, backend="triton")
    expected_q, expected_scale = fastattn.quantize_int8(x, backend="eager")
    assert torch.equal(q, expected_q)
    torch.testing.assert_close(scale, expected_scale, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("rows", [1, launches.FUSED_MAX_ROWS, launches.FUSED_MAX_ROWS + 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_quantising_inside_the_product_changes_no_bit(rows, dtype):
    x = torch.randn(rows, 300, device=DEVICE).to(dtype)
    weight, scale, bias = random_linear(70, 300)
    q, q_scale = fastattn.quantize_int8(x, backend="triton")
    expected = fastattn.int8_matmul(
        q, weight, q_scale, scale, bias, activation="gelu", out_dtype=dtype, backend="triton"
    )
    assert torch.equal(fastattn.int8_linear(x, weight, scale, bias, activation="gelu", backend="triton"), expected)


@pytest.mark.parametrize("shape", [(1200, 200, 20), (130, 1, 33)], ids=str)
def test_groups_of_tiles_cover_the_result(shape):
    rows, columns, depth = shape
    a, b = random_int8(rows, depth), random_int8(columns, depth)
    ones = torch.ones(max(rows, columns), device=DEVICE)
    out = fastattn.int8_matmul(a, b, ones[:rows], ones[:columns], backend="triton")
    assert torch.equal(out, (a.double() @ b.double().T).float())


def test_strides_that_32_bits_do_not_address_are_copied(monkeypatch):
    a, b = random_int8(20, 90)[:, 7:40], random_int8(30, 80)[:, 7:40]
    ones = torch.ones(30, device=DEVICE)
    copies = []
    contiguous = torch.Tensor.contiguous
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda t: (copies.append(t.shape), contiguous(t))[1])
    for limit, copied in ((1 << 22, False), (50, True)):
        monkeypatch.setattr(launches, "MAX_STRIDE", limit)
        copies.clear()
        out = fastattn.int8_matmul(a, b, ones[:20], ones, backend="triton")
        assert torch.equal(out, (a.double() @ b.double().T).float())
        assert (a.shape in copies) == copied


# --- Tiles -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", [A100, RTX4090, H100], ids=["A100", "RTX4090", "H100"])
@pytest.mark.parametrize("columns", [1, 768, 4096, 100_000])
@pytest.mark.parametrize("rows", [1, 16, 17, 33, 100, 4096, 100_000])
@pytest.mark.parametrize("itemsize", [1, 2, 4])
def test_tiles_fit_and_fill_the_device(rows, columns, device, itemsize):
    if itemsize > 1 and rows > launches.FUSED_MAX_ROWS:
        pytest.skip("quantised beforehand")
    tile = launches.matmul_tile(rows, columns, device, itemsize)
    assert tile.shared_bytes(itemsize) < device.shared_bytes
    if rows <= launches.FUSED_MAX_ROWS:
        assert tile.rows >= rows  # what int8_linear_kernel relies on
    tiles = -(-rows // tile.rows) * -(-columns // tile.columns)
    smallest = launches.candidates(rows, device, itemsize)[-1]
    assert tiles >= device.multiprocessors or tile == smallest


def test_large_products_take_large_tiles():
    assert launches.matmul_tile(8192, 8192, H100)[:3] == (128, 128, 128)
    assert launches.matmul_tile(8192, 8192, RTX4090)[:3] == (128, 128, 128)
    assert launches.matmul_tile(1, 16384, H100)[:3] == (16, 64, 256)


# --- Ops -------------------------------------------------------------------------------------------------------------


def test_opcheck():
    ops = torch.ops.fastattn
    weight, scale, bias = random_linear(9, 12)
    x, a = torch.randn(2, 3, 12, device=DEVICE), random_int8(3, 12)
    torch.library.opcheck(ops.quantize_int8_triton.default, (x,))
    torch.library.opcheck(
        ops.int8_matmul_triton.default, (a, weight, scale[:3].clone(), scale, bias, "gelu", torch.bfloat16)
    )
    for requires_grad in (False, True):
        x, bias = x.detach().requires_grad_(requires_grad), bias.detach().requires_grad_(requires_grad)
        torch.library.opcheck(ops.int8_linear_triton.default, (x, weight, scale, bias, "silu"))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles_without_graph_breaks(dynamic):
    torch.compiler.reset()
    weight, scale, bias = random_linear(20, 16)

    def function(x):
        y = fastattn.int8_linear(x, weight, scale, bias, activation="gelu", backend="triton")
        q, q_scale = fastattn.quantize_int8(y, backend="triton")
        ones = torch.ones(16, device=DEVICE)
        product = fastattn.int8_matmul(q, weight.t().contiguous(), q_scale, ones, backend="triton")
        return y.square().sum() + product.sum()

    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (3, 20):
        x = torch.randn(rows, 16, device=DEVICE, requires_grad=True)
        results = [(out, *torch.autograd.grad(out, x)) for out in (function(x), compiled(x))]
        torch.testing.assert_close(results[1], results[0])


def test_ops_check_what_memory_safety_needs():
    ops, x, bias = torch.ops.fastattn, torch.ones(3, 8, device=DEVICE), torch.ones(4, device=DEVICE)
    a, b, three = x.to(torch.int8), torch.ones(4, 8, dtype=torch.int8, device=DEVICE), torch.ones(3, device=DEVICE)
    matmul, linear = ops.int8_matmul_triton, ops.int8_linear_triton
    deep = torch.ones(1, 133145, dtype=torch.int8, device=DEVICE)
    one = torch.ones(1, device=DEVICE)
    calls = [
        (TypeError, "input must be", lambda: ops.quantize_int8_triton(a)),
        (ValueError, "at least one dim", lambda: ops.quantize_int8_triton(x[0, 0])),
        (ValueError, "weight must be", lambda: matmul(a, b[:, :7], three, bias, None, "none", torch.float32)),
        (ValueError, "a_scale must be", lambda: matmul(a, b, bias, bias, None, "none", torch.float32)),
        (ValueError, "weight_scale must be", lambda: matmul(a, b, three, three, None, "none", torch.float32)),
        (TypeError, "weight_scale must be", lambda: matmul(a, b, three, bias.half(), None, "none", torch.float32)),
        (ValueError, "bias must be", lambda: matmul(a, b, three, bias, three, "none", torch.float32)),
        (ValueError, "activation must be", lambda: matmul(a, b, three, bias, None, "swish", torch.float32)),
        (TypeError, "out_dtype must be", lambda: matmul(a, b, three, bias, None, "none", torch.int32)),
        (ValueError, "a must be a matrix", lambda: matmul(a[0], b, three, bias, None, "none", torch.float32)),
        (NotImplementedError, "overflow", lambda: matmul(deep, deep, one, one, None, "none", torch.float32)),
        (ValueError, "weight must be", lambda: linear(x[:, :7], b, bias, None, "none")),
        (ValueError, "weight must be a matrix", lambda: linear(x, b[0], bias, None, "none")),
        (TypeError, "weight must be", lambda: linear(x, b.float(), bias, None, "none")),
        (ValueError, "requires grad", lambda: linear(x.clone().requires_grad_(), b, bias.clone().requires_grad_(),
                                                     None, "none")),
    ]  # fmt: skip
    for error, message, call in calls:
        with pytest.raises(error, match=message):
            call()
