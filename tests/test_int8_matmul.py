"""quantize_int8, int8_matmul, int8_linear: exact integers, accurate epilogues, gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_as_accurate_as_eager
from emulated import Mode
from hypothesis import given, settings
from hypothesis import strategies as st
from int8_cases import needs_cpu, random_int8, random_linear, shape_id

import fastattn
from fastattn._extension import extension, missing_reason
from fastattn.ops.int8_matmul_compiled import MAX_DEPTH, pack_weight

BACKENDS = [
    *(extension.usable_cpu_isas() if extension else []),
    *(name for name in ("cuda", "triton", "emulated") if fastattn.available_backends()[name] is None),
] or [pytest.param(None, marks=pytest.mark.skip(reason=str(missing_reason)))]

# 12 rows (6, 4) and 32 columns are a tile, 4 of k a group, 1024 of k a slice; each is met exactly, one short, one over.
SHAPES = [
    (1, 32, 64),
    (1, 1, 1),
    (2, 33, 3),
    (3, 31, 5),
    (5, 64, 1023),
    (7, 40, 1025),
    (11, 97, 63),
    (12, 96, 1024),
    (13, 95, 65),
    (49, 70, 2051),
    (97, 130, 129),
]
EMPTY = [(0, 5, 8), (4, 0, 8), (4, 5, 0), (0, 0, 0)]
ACTIVATIONS = [None, "relu", "gelu", "gelu_tanh", "silu"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=BACKENDS)
def backend(request):
    """The name of each backend with kernels; the CPU's once for each of its builds."""
    if request.param in ("cuda", "triton") and torch.cuda.is_available():
        torch.set_default_device("cuda")
        yield request.param
        torch.set_default_device(None)
    elif request.param in ("triton", "emulated"):
        yield request.param
    else:
        before = extension.active_cpu_isa()
        extension.set_cpu_isa(request.param)
        yield "cpu"
        extension.set_cpu_isa(before)


def exact_product(a, b):
    """Of integers: float64 holds them up to 2^53."""
    return (a.double() @ b.double().T).float()


def activation_in_float64(x, activation):
    """Without the cancellation of F.gelu: x * Phi(x) by erfc."""
    if activation == "gelu":
        return x * 0.5 * torch.special.erfc(-x * 0.5**0.5)
    by_name = {None: lambda x: x, "relu": F.relu, "silu": F.silu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}
    return by_name[activation](x)


def linear_in_float64(input, weight, weight_scale, bias, activation):
    q, scale = fastattn.quantize_int8(input, backend="eager")
    product = (q.double() @ weight.double().T) * scale.double().unsqueeze(-1) * weight_scale.double()
    return activation_in_float64(product if bias is None else product + bias.double(), activation)


# --- quantize_int8 ---------------------------------------------------------------------------------------------------


def assert_quantizes_like_eager(input, backend):
    q, scale = fastattn.quantize_int8(input, backend=backend)
    expected_q, expected_scale = fastattn.quantize_int8(input, backend="eager")
    assert q.dtype == torch.int8 and scale.dtype == torch.float32
    assert torch.equal(q, expected_q)
    assert torch.equal(scale.view(torch.int32), expected_scale.view(torch.int32)) or torch.allclose(
        scale, expected_scale, rtol=0, atol=0, equal_nan=True
    )
    return q, scale


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 15), (2, 3, 64), (5, 65), (7, 257), (97,), (0, 8), (4, 0)], ids=shape_id)
def test_quantization_equals_eager_bit_for_bit(backend, shape, dtype):
    assert_quantizes_like_eager((torch.randn(shape) * torch.rand(shape).exp()).to(dtype), backend)


@needs_cpu
@given(
    st.lists(st.floats(width=32, allow_nan=True, allow_infinity=True), min_size=1, max_size=80),
    st.sampled_from(DTYPES),
)
@settings(max_examples=200, deadline=None)
def test_any_row_quantizes_like_eager(row, dtype):
    assert_quantizes_like_eager(torch.tensor(row, dtype=torch.float32).to(dtype), "cpu")


def test_quantization_error_is_at_most_half_a_step(backend):
    x = torch.randn(50, 300) * torch.logspace(-30, 30, 50).unsqueeze(1)
    q, scale = fastattn.quantize_int8(x, backend=backend)
    assert q.abs().amax(-1).eq(127).all()
    error = (q.double() * scale.double().unsqueeze(1) - x.double()).abs()
    assert (error <= 0.5 * (1 + 1e-5) * scale.double().unsqueeze(1)).all()


def test_ties_round_to_even(backend):
    q, scale = fastattn.quantize_int8(torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, -127.0]), backend=backend)
    assert scale.item() == 1.0
    assert q.tolist() == [127, 0, 2, 2, 0, -2, -2, -127]


def test_zero_rows_have_scale_one(backend):
    q, scale = fastattn.quantize_int8(torch.tensor([[0.0, -0.0, 0.0], [0.0, 1.0, 0.0]]), backend=backend)
    assert q.tolist() == [[0, 0, 0], [0, 127, 0]]
    assert scale[0] == 1.0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("position", [0, 17, 64, 69])
def test_rows_with_nan_or_infinity_become_nan(bad, position, backend):
    x = torch.randn(3, 70)
    x[1, position] = bad
    q, scale = assert_quantizes_like_eager(x, backend)
    assert scale.isnan().tolist() == [False, True, False]
    assert (q[1] == 0).all() and (q[0] != 0).any() and (q[2] != 0).any()
    weight, weight_scale, bias = random_linear(33, 70)
    for activation in ACTIVATIONS:
        for each in (backend, "eager"):
            out = fastattn.int8_linear(x, weight, weight_scale, bias, activation=activation, backend=each)
            assert out[1].isnan().all() and not out[0].isnan().any() and not out[2].isnan().any()


def test_tiny_rows_keep_a_finite_reciprocal(backend):
    q, scale = assert_quantizes_like_eager(torch.tensor([[1e-44, -1e-44, 0.0], [1e-37, 5e-38, -1e-37]]), backend)
    assert (scale >= 2.0**-126).all()
    assert q[1].tolist() == [9, 4, -9]


@pytest.mark.parametrize(
    "view",
    [lambda x: x[:, 1:], lambda x: x.t(), lambda x: x[::2], lambda x: x[:, ::3], lambda x: x[:1].expand(5, -1)],
    ids=["offset", "transposed", "every_other_row", "strided_columns", "expanded"],
)
def test_strided_input_is_read_in_place(view, backend):
    x = view(torch.randn(24, 36))
    q, _ = assert_quantizes_like_eager(x, backend)
    assert q.is_contiguous()
    weight, weight_scale, bias = random_linear(35, x.shape[1])
    expected = fastattn.int8_linear(x.contiguous(), weight, weight_scale, bias, backend=backend)
    assert torch.equal(fastattn.int8_linear(x, weight, weight_scale, bias, backend=backend), expected)


def test_quantized_tensors_have_no_gradient(backend):
    for each in (backend, "eager"):
        q, scale = fastattn.quantize_int8(torch.randn(3, 8, requires_grad=True), backend=each)
        assert not q.requires_grad and not scale.requires_grad


# --- int8_matmul -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES + EMPTY, ids=shape_id)
def test_integer_sums_are_exact(backend, shape):
    rows, columns, depth = shape
    a, b = random_int8(rows, depth), random_int8(columns, depth)
    if depth > 0:
        # The extremes: -128 is int8, too, though quantize_int8 never makes it.
        a[:, 0], b[:, depth - 1] = -128, -128
    out = fastattn.int8_matmul(a, b, torch.ones(rows), torch.ones(columns), out_dtype=torch.float32, backend=backend)
    assert torch.equal(out, exact_product(a, b))


@pytest.mark.parametrize("signs", [(1, 1), (1, -1), (-1, -1)])
def test_integer_sums_are_exact_up_to_the_largest_depth(backend, signs):
    a = torch.full((2, MAX_DEPTH), 127 * signs[0], dtype=torch.int8)
    b = torch.full((3, MAX_DEPTH), 127 * signs[1], dtype=torch.int8)
    a[1, ::2], b[2, 1::2] = 1, -1
    out = fastattn.int8_matmul(a, b, torch.ones(2), torch.ones(3), out_dtype=torch.float32, backend=backend)
    assert torch.equal(out, exact_product(a, b))


@pytest.mark.parametrize("depth", [MAX_DEPTH, MAX_DEPTH + 1, 133144])
def test_sums_of_the_smallest_int8_are_exact_at_any_depth(depth):
    """(-128)² 2^17 is 2^31, one more than an int32 holds: what a kernel cannot sum is left to eager."""
    a, one = torch.full((2, depth), -128, dtype=torch.int8), torch.ones(2)
    a[1, 0] = 127
    out = fastattn.int8_matmul(a, a, one, one, out_dtype=torch.float64)
    assert torch.equal(out, exact_product(a, a).double())
    x, expected = -torch.ones(1, depth), torch.full((1, 2), 128.0 * depth)
    expected[0, 1] -= 255
    torch.testing.assert_close(fastattn.int8_linear(x, a, one), expected, rtol=1e-6, atol=0)


@needs_cpu
def test_deeper_sums_are_left_to_eager(backend):
    a, b = random_int8(1, MAX_DEPTH + 1), random_int8(1, MAX_DEPTH + 1)
    out = fastattn.int8_matmul(a, b, torch.ones(1), torch.ones(1))
    assert torch.equal(out, exact_product(a, b))
    with pytest.raises(NotImplementedError, match=f"K is {MAX_DEPTH + 1}, and the int32 sum"):
        fastattn.int8_matmul(a, b, torch.ones(1), torch.ones(1), backend=backend)
    with pytest.raises(NotImplementedError, match="may overflow"):
        torch.ops.fastattn.int8_matmul(a, b, torch.ones(1), torch.ones(1), None, "none", torch.float32)


@needs_cpu
@given(st.integers(0, 30), st.integers(0, 70), st.integers(0, 140), st.integers(0, 3), st.integers(0, 2**31))
@settings(max_examples=150, deadline=None)
def test_any_shape_is_exact(rows, columns, depth, offset, seed):
    for isa in extension.usable_cpu_isas():
        before = extension.active_cpu_isa()
        extension.set_cpu_isa(isa)
        torch.manual_seed(seed)
        a, b = random_int8(rows, depth + offset)[:, offset:], random_int8(columns, depth + offset)[:, offset:]
        out = fastattn.int8_matmul(a, b, torch.ones(rows), torch.ones(columns), backend="cpu")
        extension.set_cpu_isa(before)
        assert torch.equal(out, exact_product(a, b))


@pytest.mark.parametrize("out_dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias_dtype", [None, torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_epilogue_is_as_accurate_as_eager(backend, activation, out_dtype, bias_dtype):
    a, b = random_int8(29, 75), random_int8(53, 75)
    a_scale, b_scale = torch.rand(29) * 0.01, torch.rand(53) * 0.01
    bias = None if bias_dtype is None else torch.randn(53, dtype=bias_dtype)
    arguments = {"activation": activation, "out_dtype": out_dtype}
    actual = fastattn.int8_matmul(a, b, a_scale, b_scale, bias, **arguments, backend=backend)
    eager = fastattn.int8_matmul(a, b, a_scale, b_scale, bias, **arguments, backend="eager")
    exact = (a.double() @ b.double().T) * a_scale.double().unsqueeze(1) * b_scale.double()
    reference = activation_in_float64(exact if bias is None else exact + bias.double(), activation)
    if out_dtype == torch.float64:
        # Computed in float32 by every backend.
        actual, eager = actual.float(), eager.float()
    assert_as_accurate_as_eager(actual, eager, reference)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("low, high", [(-14, -0.5), (-0.5, 0.5), (0.5, 14), (-200, 200)])
def test_activations_are_accurate_over_their_range(backend, activation, low, high):
    bias = torch.linspace(low, high, 4001)
    call = (
        torch.zeros(1, 4, dtype=torch.int8),
        torch.zeros(4001, 4, dtype=torch.int8),
        torch.ones(1),
        torch.ones(4001),
    )
    actual = fastattn.int8_matmul(*call, bias, activation=activation, backend=backend)
    eager = fastattn.int8_matmul(*call, bias, activation=activation, backend="eager")
    assert_as_accurate_as_eager(actual, eager, activation_in_float64(bias.double(), activation).unsqueeze(0))


@pytest.mark.parametrize("activation", [each for each in ACTIVATIONS if each is not None])
def test_activations_vanish_far_below_zero(backend, activation):
    """Also where exp(-x) has no place in float32."""
    bias = torch.tensor([-90.0, -1e20, -1e38])
    a, b = torch.zeros(1, 4, dtype=torch.int8), torch.zeros(3, 4, dtype=torch.int8)
    out = fastattn.int8_matmul(a, b, torch.ones(1), torch.ones(3), bias, activation=activation, backend=backend)
    assert torch.equal(out, torch.zeros(1, 3)), out


def test_matmul_with_gradient_runs_in_eager(backend):
    a, b, a_scale = random_int8(5, 9), random_int8(4, 9), torch.rand(5, requires_grad=True)
    out = fastattn.int8_matmul(a, b, a_scale, torch.rand(4))
    assert out.requires_grad
    with pytest.raises(NotImplementedError, match="requires grad"):
        fastattn.int8_matmul(a, b, a_scale, torch.rand(4), backend=backend)
    with torch.no_grad():
        fastattn.int8_matmul(a, b, a_scale, torch.rand(4), backend=backend)


# --- int8_linear -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize(
    "shape", [(5,), (1, 768), (2, 3, 65), (2, 2, 7, 1030), (0, 12), (3, 0, 12), (4, 0)], ids=shape_id
)
def test_linear_is_as_accurate_as_eager(backend, shape, dtype):
    x = torch.randn(shape, dtype=dtype)
    weight, scale, bias = random_linear(45, shape[-1], dtype)
    actual = fastattn.int8_linear(x, weight, scale, bias, activation="gelu", backend=backend)
    eager = fastattn.int8_linear(x, weight, scale, bias, activation="gelu", backend="eager")
    reference = linear_in_float64(x, weight, scale, bias, "gelu")
    assert actual.dtype == eager.dtype == dtype
    assert actual.shape == eager.shape == (*shape[:-1], 45)
    if dtype == torch.float64:
        actual, eager = actual.float(), eager.float()
    assert_as_accurate_as_eager(actual, eager, reference)


@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_linear_equals_quantize_then_matmul(backend, shape):
    rows, columns, depth = shape
    x = torch.randn(rows, depth)
    weight, scale, bias = random_linear(columns, depth)
    operands = _swap(fastattn.quantize_int8(x, backend=backend), weight, scale)
    expected = fastattn.int8_matmul(*operands, bias, activation="silu", backend=backend)
    assert torch.equal(fastattn.int8_linear(x, weight, scale, bias, activation="silu", backend=backend), expected)
    if backend == "cpu":
        packed = torch.ops.fastattn.int8_linear_packed(x, pack_weight(weight), weight, scale, bias, "silu")
        assert torch.equal(packed, expected)


def _swap(quantized, weight, weight_scale):
    return quantized[0], weight, quantized[1], weight_scale


# Outputs of the last two are written past the caches: of whole panels, and with half a panel at the end.
@pytest.mark.parametrize(
    "shape",
    [(512, 96, 200), (700, 40, 64), (97, 3000, 130), (64, 512, 4100), (300, 1024, 70), (270, 1008, 66)],
    ids=shape_id,
)
def test_many_rows_blocks_and_threads_agree(cpu_isa, shape):
    """More rows, columns and depth than a block of each, by one thread and by three."""
    rows, columns, depth = shape
    x = torch.randn(rows, depth)
    weight, scale, _ = random_linear(columns, depth)
    q, x_scale = fastattn.quantize_int8(x)
    expected = (q.float() @ weight.float().T) if depth < 1000 else (q.double() @ weight.double().T).float()
    expected = torch.addcmul(torch.zeros(columns), expected * x_scale.unsqueeze(1), scale.expand(rows, -1))
    before = torch.get_num_threads()
    for threads in (1, 3):
        torch.set_num_threads(threads)
        out = fastattn.int8_linear(x, weight, scale, backend="cpu")
        torch.set_num_threads(before)
        torch.testing.assert_close(out, expected, rtol=3e-7, atol=0)


def test_linear_is_close_to_the_float_layer(backend):
    x, weight, bias = torch.randn(64, 512), torch.randn(300, 512) / 512**0.5, torch.randn(300) * 0.1
    out = fastattn.int8_linear(x, *fastattn.quantize_int8(weight), bias, backend=backend)
    exact = F.linear(x, weight, bias)
    assert 20 * torch.log10(exact.norm() / (out - exact).norm()) > 35


@pytest.mark.parametrize("changed", ["weight_in_place", "other_weight", "header", "length"])
def test_a_packed_form_of_another_weight_is_not_used(changed, cpu_isa):
    weight, scale, bias = random_linear(33, 21)
    x = torch.randn(4, 21)
    packed = pack_weight(weight)
    if changed == "weight_in_place":
        weight.neg_()
    elif changed == "other_weight":
        packed = pack_weight(random_int8(33, 21))
    elif changed == "header":
        packed[3] = 77
    else:
        packed = packed[:100]
    expected = fastattn.int8_linear(x, weight, scale, bias, backend="cpu")
    assert torch.equal(torch.ops.fastattn.int8_linear_packed(x, packed, weight, scale, bias, "none"), expected)


@pytest.mark.skipif(fastattn.available_backends()["emulated"] is not None, reason="no emulated CUDA kernels")
@pytest.mark.parametrize("rows", [1, 70, 130])
@pytest.mark.parametrize("capability", [80, 89, 90, 100, 120])
def test_every_card_gives_the_same_integers(capability, rows):
    """Launchers are told of different cards, with two multiprocessors, so that persistent blocks take several tiles."""
    a, b = random_int8(rows, 208), random_int8(300, 208)
    Mode().apply(compute_capability=capability, multiprocessors=2)
    try:
        for left in (a, a[:1].expand(rows, -1), a[:, 3:]):
            right = b[:, : left.shape[1]]
            out = fastattn.int8_matmul(left, right, torch.ones(rows), torch.ones(300), backend="emulated")
            assert torch.equal(out, exact_product(left, right))
    finally:
        Mode().apply()


@pytest.mark.skipif(fastattn.available_backends()["emulated"] is not None, reason="no emulated CUDA kernels")
@pytest.mark.parametrize("rows, depth", [(1, 32600), (2, 16200), (3, 10700), (4, 8000)])
def test_quantised_rows_that_just_fit_unasked_shared_memory(rows, depth):
    """They and the sums leave less than 1 KiB of 48, which static shared memory does not fit in."""
    x, weight, scale = torch.randn(rows, depth).half(), random_int8(64, depth), torch.ones(64)
    Mode().apply(multiprocessors=1)
    try:
        out = fastattn.int8_linear(x, weight, scale, backend="emulated")
    finally:
        Mode().apply()
    assert torch.equal(out, fastattn.int8_linear(x, weight, scale, backend="eager"))


# --- Gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_are_as_accurate_as_eager(activation, dtype, backend):
    x, dout = torch.randn(3, 5, 40, dtype=dtype), torch.randn(3, 5, 37, dtype=dtype)
    weight, scale, bias = random_linear(37, 40, dtype)

    def gradients(by):
        inputs = x.clone().requires_grad_(), bias.clone().requires_grad_()
        out = fastattn.int8_linear(inputs[0], weight, scale, inputs[1], activation=activation, backend=by)
        return torch.autograd.grad(out, inputs, dout)

    # The straight-through gradient in float64: the derivative at the quantised input's pre-activation.
    preactivation = linear_in_float64(x, weight, scale, bias, None).requires_grad_()
    (dpre,) = torch.autograd.grad(activation_in_float64(preactivation, activation), preactivation, dout.double())
    references = dpre @ (weight.double() * scale.double().unsqueeze(1)), dpre.sum((0, 1))
    names = "dinput", "dbias"
    for name, actual, eager, reference in zip(names, gradients(backend), gradients("eager"), references, strict=True):
        assert_as_accurate_as_eager(actual, eager, reference, name)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_of_gradients_are_eagers(activation, backend):
    """The gradient of an activation depends on what it was applied to, and so on input and bias."""
    weight, scale, bias = random_linear(37, 40)
    x = torch.randn(3, 5, 40)

    def second_derivatives(by):
        inputs = x.clone().requires_grad_(), bias.clone().requires_grad_()
        out = fastattn.int8_linear(inputs[0], weight, scale, inputs[1], activation=activation, backend=by)
        gradients = torch.autograd.grad(out.square().sum(), inputs, create_graph=True)
        return torch.autograd.grad(sum(gradient.square().sum() for gradient in gradients), inputs)

    for actual, expected in zip(second_derivatives(backend), second_derivatives("eager"), strict=True):
        assert (actual - expected).norm() <= 1e-4 * expected.norm()


@pytest.mark.parametrize("packed", [False, True])
def test_gradient_of_input_or_bias_alone(packed, cpu_isa):
    weight, scale, bias = random_linear(6, 8)
    op = torch.ops.fastattn.int8_linear_packed if packed else torch.ops.fastattn.int8_linear

    def run(x, bias):
        return op(x, *([pack_weight(weight)] if packed else []), weight, scale, bias, "relu")

    x = torch.randn(8, requires_grad=True)
    run(x, bias).sum().backward()
    assert x.grad is not None and x.grad.shape == (8,)
    bias = bias.requires_grad_()
    out = run(x.detach(), bias)
    out.sum().backward()
    assert torch.equal(bias.grad, (out > 0).float())
    with torch.no_grad():
        assert not run(x, bias).requires_grad
