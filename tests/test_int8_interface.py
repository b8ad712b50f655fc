"""The INT8 ops under torch.compile and opcheck, called directly, and given what they cannot run."""

from __future__ import annotations

import functools

import pytest
import torch
from int8_cases import needs_cpu, random_int8, random_linear, shape_id

import fastattn
from fastattn.ops.int8_matmul_compiled import pack_weight

# --- torch.compile, opcheck ------------------------------------------------------------------------------------------


@needs_cpu
def test_ops_pass_opcheck():
    ops = torch.ops.fastattn
    weight, scale, bias = random_linear(9, 12)
    x = torch.randn(2, 3, 12)
    a, b = random_int8(3, 12), random_int8(9, 12)
    torch.library.opcheck(ops.quantize_int8.default, (x,))
    torch.library.opcheck(ops.int8_matmul.default, (a, b, torch.rand(3), torch.rand(9), bias, "gelu", torch.bfloat16))
    # The packed form holds the weight's address, so that of a copy, which the omitted test makes, differs.
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(ops.int8_pack_weight.default, (weight,), test_utils=tests)
    for requires_grad in (False, True):
        x, bias = x.detach().requires_grad_(requires_grad), bias.detach().requires_grad_(requires_grad)
        for activation in ("none", "silu"):
            torch.library.opcheck(ops.int8_linear.default, (x, weight, scale, bias, activation))
            torch.library.opcheck(
                ops.int8_linear_packed.default, (x, pack_weight(weight), weight, scale, bias, activation)
            )


@needs_cpu
@pytest.mark.parametrize("shape", [(0, 0), (33, 1), (1, 33), (32, 64), (100, 131)], ids=shape_id)
def test_fake_packed_weight_has_the_real_length(shape):
    weight = random_int8(*shape)
    assert pack_weight(weight.to("meta")).shape == pack_weight(weight).shape


def test_compiles_without_graph_breaks():
    weight, scale, bias = random_linear(20, 16)

    def function(x):
        y = fastattn.int8_linear(x, weight, scale, bias, activation="gelu")
        q, q_scale = fastattn.quantize_int8(y)
        return fastattn.int8_matmul(q, weight.t().contiguous(), q_scale, torch.ones(16), out_dtype=torch.bfloat16)

    compiled = torch.compile(function, fullgraph=True)
    x = torch.randn(5, 16)
    assert torch.equal(compiled(x), function(x))
    x = x.requires_grad_()
    gradient = torch.compile(lambda x: fastattn.int8_linear(x, weight, scale, bias, activation="silu"), fullgraph=True)
    (actual,) = torch.autograd.grad(gradient(x).square().sum(), x)
    (expected,) = torch.autograd.grad(fastattn.int8_linear(x, weight, scale, bias, activation="silu").square().sum(), x)
    torch.testing.assert_close(actual, expected)


def test_eager_gradient_compiles_without_graph_breaks():
    weight, scale, bias = random_linear(20, 16)
    x, bias = torch.randn(5, 16, requires_grad=True), bias.requires_grad_()
    function = functools.partial(fastattn.int8_linear, activation="silu", backend="eager")
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(
        *(torch.autograd.grad(each(x, weight, scale, bias).square().sum(), (x, bias)) for each in (compiled, function)),
        strict=True,
    ):
        torch.testing.assert_close(actual, expected)


# --- Bad input -------------------------------------------------------------------------------------------------------

A, B, ONES3, ONES4 = (
    torch.ones(3, 8, dtype=torch.int8),
    torch.ones(4, 8, dtype=torch.int8),
    torch.ones(3),
    torch.ones(4),
)
X = torch.ones(3, 8)
linear, matmul, quantize = fastattn.int8_linear, fastattn.int8_matmul, fastattn.quantize_int8

BAD_CALLS = {
    "quantize int": (lambda: quantize(A), TypeError, "quantize_int8: input must be float32, .*got torch.int8"),
    "quantize scalar": (lambda: quantize(torch.tensor(1.0)), ValueError, "at least one dimension"),
    "a float": (lambda: matmul(X, B, ONES3, ONES4), TypeError, "int8_matmul: a must be int8, got torch.float32"),
    "b uint8": (lambda: matmul(A, B.byte(), ONES3, ONES4), TypeError, "b must be int8, got torch.uint8"),
    "a 3-D": (lambda: matmul(A[None], B, ONES3, ONES4), ValueError, r"a must be a matrix, got shape \(1, 3, 8\)"),
    "K differs": (lambda: matmul(A, B[:, :7], ONES3, ONES4), ValueError, "a has K = 8 but b has K = 7"),
    "a_scale shape": (lambda: matmul(A, B, ONES4, ONES4), ValueError, r"a_scale must have shape \(3,\).* got \(4,\)"),
    "b_scale 2-D": (lambda: matmul(A, B, ONES3, ONES4[None]), ValueError, r"b_scale must have shape \(4,\)"),
    "b_scale half": (
        lambda: matmul(A, B, ONES3, ONES4.half()),
        TypeError,
        "b_scale must be float32, .*float16",
    ),
    "bias shape": (lambda: matmul(A, B, ONES3, ONES4, ONES3), ValueError, r"bias must have shape \(4,\), got \(3,\)"),
    "bias int": (lambda: matmul(A, B, ONES3, ONES4, ONES4.int()), TypeError, "bias must be float32, .*got torch.int32"),
    "out_dtype": (lambda: matmul(A, B, ONES3, ONES4, out_dtype=torch.int8), TypeError, "out_dtype must be float32"),
    "activation": (
        lambda: matmul(A, B, ONES3, ONES4, activation="tanh"),
        ValueError,
        "activation must be one of None, 'relu', 'gelu', 'gelu_tanh', 'silu', got 'tanh'",
    ),
    "device": (lambda: matmul(A, B.to("meta"), ONES3, ONES4), ValueError, "all tensors must be on one device"),
    "linear input int": (
        lambda: linear(A, B, ONES4),
        TypeError,
        "input must be float32, .*got torch.int8",
    ),
    "linear weight float": (lambda: linear(X, X, ONES3), TypeError, "weight must be int8, got torch.float32; quantize"),
    "linear K": (
        lambda: linear(X[:, :5], B, ONES4),
        ValueError,
        r"input has shape \(3, 5\) but .*must be 8",
    ),
    "linear scalar": (lambda: linear(torch.tensor(1.0), B, ONES4), ValueError, r"input has shape \(\)"),
    "linear scale": (lambda: linear(X, B, ONES3), ValueError, r"weight_scale must have shape \(4,\)"),
    "linear bias": (lambda: linear(X, B, ONES4, ONES3), ValueError, r"int8_linear: bias must have shape \(4,\)"),
    "linear activation": (lambda: linear(X, B, ONES4, activation="none"), ValueError, "got 'none'"),
    "linear device": (lambda: linear(X, B, ONES4.to("meta")), ValueError, "weight_scale on meta"),
    "linear scale grad": (lambda: linear(X, B, torch.ones(4, requires_grad=True)), ValueError, "requires grad.*detach"),
    "backend": (lambda: linear(X, B, ONES4, backend="gpu"), ValueError, "backend must be"),
    "no kernel": (
        lambda: linear(X.to("meta"), B.to("meta"), ONES4.to("meta"), backend="triton"),
        NotImplementedError,
        "int8_linear: backend 'triton' cannot run this",
    ),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_rejects(case):
    call, error, message = BAD_CALLS[case]
    with pytest.raises(error, match=message):
        call()


@needs_cpu
def test_ops_called_directly_check_what_memory_safety_needs():
    ops = torch.ops.fastattn
    calls = [
        lambda: ops.quantize_int8(A),
        lambda: ops.quantize_int8(torch.tensor(1.0)),
        lambda: ops.int8_matmul(A, B[:, :7], ONES3, ONES4, None, "none", torch.float32),
        lambda: ops.int8_matmul(A, B, ONES4, ONES4, None, "none", torch.float32),
        lambda: ops.int8_matmul(A, B, ONES3, ONES3, None, "none", torch.float32),
        lambda: ops.int8_matmul(A, B, ONES3, ONES4.double(), None, "none", torch.float32),
        lambda: ops.int8_matmul(A, B, ONES3, ONES4, ONES3, "none", torch.float32),
        lambda: ops.int8_matmul(A, B, ONES3, ONES4, None, "swish", torch.float32),
        lambda: ops.int8_matmul(A, B, ONES3, ONES4, None, "none", torch.int32),
        lambda: ops.int8_linear(X[:, :7], B, ONES4, None, "none"),
        lambda: ops.int8_linear(X, B[0], ONES4, None, "none"),
        lambda: ops.int8_linear(X, B.float(), ONES4, None, "none"),
        lambda: ops.int8_pack_weight(B[0]),
        lambda: ops.int8_pack_weight(X),
    ]
    for call in calls:
        with pytest.raises((ValueError, TypeError)):
            call()


def test_explains_the_choice():
    text = fastattn.explain(fastattn.int8_linear, X, B, ONES4)
    assert "int8_linear: " in text and "eager     would run" in text
