"""The linear layer of few rows: every build against float64, when it runs, and what it leaves to PyTorch."""

from __future__ import annotations

import copy
import ctypes
import mmap
import os
import pickle
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_as_accurate_as_eager
from torch import nn

import fastattn
from fastattn._extension import extension, missing_reason
from fastattn.modules import Linear
from fastattn.ops.linear import ACTIVATION_FUNCTIONS, gather_weight, linear

pytestmark = pytest.mark.skipif(extension is None, reason=str(missing_reason))

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def kernel(x, weight, bias=None, activation="none"):
    return torch.ops.fastattn.linear(x, weight, bias, activation)


def operands(rows, depth, columns, dtype=torch.float32):
    weight = torch.randn(columns, depth) / max(depth, 1) ** 0.5
    return torch.randn(rows, depth).to(dtype), weight.to(dtype), torch.randn(columns).to(dtype)


def check(x, weight, bias, activation="none"):
    exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    eager = F.linear(x, weight, bias)
    function = ACTIVATION_FUNCTIONS[activation]
    assert_as_accurate_as_eager(kernel(x, weight, bias, activation), function(eager), function(exact))


# --- Where weights lie -----------------------------------------------------------------------------------------------


def huge_kilobytes(tensor):
    """Of the mapping that holds ``tensor``, as /proc has it."""
    address, found = tensor.data_ptr(), False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if "-" in first and not first.endswith(":"):
            begin, end = (int(part, 16) for part in first.split("-"))
            found = begin <= address < end
        elif found and first == "AnonHugePages:":
            return int(line.split()[1])
    raise AssertionError("the tensor lies in no mapping")


def why_no_huge_pages():
    if not Path("/proc/self/smaps").exists():
        return "not Linux"
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not setting.exists() or "[never]" in setting.read_text():
        return "this system has huge pages switched off"
    page = 2 << 20
    memory = mmap.mmap(-1, 2 * page, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory[:] = bytes(2 * page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    call = ctypes.CDLL(None, use_errno=True).madvise
    if call(ctypes.c_void_p(-(-address // page) * page), ctypes.c_size_t(page), 25):
        return f"this system cannot collapse pages: {os.strerror(ctypes.get_errno())}"
    return None


@pytest.mark.parametrize("int8", [False, True], ids=["float32", "int8"])
def test_weights_move_onto_huge_pages_and_stay_where_and_what_they_are(int8):
    reason = why_no_huge_pages()
    if reason is not None:
        pytest.skip(reason)
    # Wherever they lie, 4.5 MiB have a whole page; how many they get, is up to the memory that is there in one piece.
    model = nn.Sequential(nn.Linear(1536, 3072))
    weight, address = model[0].weight.detach().clone(), model[0].weight.data_ptr()
    fastattn.accelerate(model, linear=not int8, int8=int8, verbose=False)
    if int8:
        assert huge_kilobytes(model[0]._packed) >= 2048
    else:
        assert huge_kilobytes(model[0].weight) >= 2048
        assert model[0].weight.data_ptr() == address and torch.equal(model[0].weight, weight)


@pytest.mark.parametrize(
    "change",
    [lambda x: x[:0], lambda x: x[:4, :4], lambda x: x.to("meta"), lambda x: x[:, ::2], lambda x: x.to_sparse()],
    ids=["empty", "small", "meta", "strided", "sparse"],
)
def test_other_weights_are_left_where_they_are(change):
    gather_weight(change(torch.ones(512, 512)))


# --- Numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 7, 8, 33])
def test_is_as_accurate_as_eager(rows, dtype, cpu_isa):
    # Depths and columns that end inside a vector, a tile, a block of 48; 1025 is a slice and one element.
    for depth, columns in ((1, 48), (17, 47), (63, 97), (64, 145), (1025, 51)):
        check(*operands(rows, depth, columns, dtype))


def test_a_long_sum_loses_nothing(cpu_isa):
    check(*operands(4, 20000, 50))


def test_many_rows_are_panels(cpu_isa):
    check(*operands(517, 40, 60))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATION_FUNCTIONS)
def test_applies_bias_and_activation(activation, dtype, cpu_isa):
    x, weight, bias = operands(6, 70, 53, dtype)
    check(x, weight, bias, activation)
    check(3 * x, weight, None, activation)


def test_keeps_leading_dims_and_reads_strided_rows():
    x, weight, bias = operands(24, 30, 20)
    expected = kernel(x, weight, bias)
    assert torch.equal(kernel(x.view(2, 3, 4, 30), weight, bias), expected.view(2, 3, 4, 20))
    assert torch.equal(kernel(x[0], weight, bias), kernel(x[:1], weight, bias)[0])
    wide_x, wide_weight = torch.randn(24, 41), torch.randn(20, 37)
    wide_x[:, 5:35], wide_weight[:, 2:32] = x, weight
    assert torch.equal(kernel(wide_x[:, 5:35], wide_weight[:, 2:32], bias), expected)
    assert torch.equal(kernel(x.T.contiguous().T, weight.T.contiguous().T, bias), expected)
    assert torch.equal(kernel(x[:1].expand(7, 30), weight, bias), kernel(x[:1].repeat(7, 1), weight, bias))
    spread = torch.stack([bias, bias], 1)[:, 0]
    assert torch.equal(kernel(x, weight, spread), expected)


@pytest.mark.parametrize("rows, depth, columns", [(0, 5, 7), (3, 0, 7), (3, 5, 0)])
def test_empty_operands(rows, depth, columns):
    x, weight, bias = operands(rows, depth, columns)
    assert torch.equal(kernel(x, weight, bias), F.linear(x, weight, bias))


def test_nan_and_infinity_stay_in_their_row_and_column():
    x, weight, _ = operands(5, 33, 50)
    x[1, 32], weight[7, 0] = torch.nan, torch.inf
    out = kernel(x, weight, None, "gelu_tanh")
    assert out[1].isnan().all()
    others = torch.ones(5, 50, dtype=torch.bool)
    others[1], others[:, 7] = False, False
    assert out[others].isfinite().all() and not out[:, 7].isfinite().all()


def test_gives_the_same_bits_at_every_thread_count(cpu_isa):
    threads = torch.get_num_threads()
    for rows in (1, 5, 40):
        x, weight, bias = operands(rows, 800, 1000)
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(kernel(x, weight, bias))
        torch.set_num_threads(threads)
        assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


# --- The op ----------------------------------------------------------------------------------------------------------


def test_op_is_well_formed():
    x, weight, bias = operands(3, 20, 10)
    torch.library.opcheck(torch.ops.fastattn.linear.default, (x, weight, bias, "gelu"))
    torch.library.opcheck(torch.ops.fastattn.linear.default, (x.view(1, 3, 20), weight, None, "none"))


def test_names_what_is_wrong():
    x, weight, bias = operands(3, 20, 10)
    with pytest.raises(ValueError, match="the last dim of input must be 20"):
        kernel(x[:, :19], weight)
    with pytest.raises(ValueError, match="weight must have 2 dimensions"):
        kernel(x, weight[0])
    with pytest.raises(ValueError, match=r"bias has shape \[9\]; it must be \(10,\)"):
        kernel(x, weight, bias[:9])
    with pytest.raises(TypeError, match="weight must be Float like input, got BFloat16"):
        kernel(x, weight.bfloat16())
    with pytest.raises(TypeError, match="must be float32, bfloat16 or float16, got float64"):
        kernel(x.double(), weight.double())
    with pytest.raises(ValueError, match="linear: activation must be 'none'"):
        kernel(x, weight, bias, "cube")


# --- Gradients -------------------------------------------------------------------------------------------------------


def gradients(function, operands, dout, wanted):
    leaves = [x.detach().requires_grad_(i in wanted) for i, x in enumerate(operands)]
    return torch.autograd.grad(function(*leaves), [leaves[i] for i in wanted], dout)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 1, 2)], ids=["input", "weight", "bias", "all"])
@pytest.mark.parametrize("activation", ACTIVATION_FUNCTIONS)
def test_gradients_are_as_accurate_as_eagers(activation, wanted):
    x, weight, bias = operands(6, 33, 20)
    given, dout = (x.view(2, 3, 33), weight, bias), torch.randn(2, 3, 20)
    function = ACTIVATION_FUNCTIONS[activation]
    ours = gradients(lambda *each: kernel(*each, activation), given, dout, wanted)
    eager = gradients(lambda *each: function(F.linear(*each)), given, dout, wanted)
    exact = gradients(lambda *each: function(F.linear(*each)), [t.double() for t in given], dout.double(), wanted)
    for each in zip(ours, eager, exact, strict=True):
        assert_as_accurate_as_eager(*each)


def test_gradients_of_many_rows_are_as_accurate_as_eagers():
    """On processors that MKL is slow on they are the kernel's, of transposed copies."""
    x, weight, bias = operands(130, 97, 65)
    dout = torch.randn(65, 130).t()  # as a loss may give it, not contiguous
    ours = gradients(kernel, (x, weight, bias), dout, (0, 1, 2))
    eager = gradients(F.linear, (x, weight, bias), dout, (0, 1, 2))
    exact = gradients(F.linear, [t.double() for t in (x, weight, bias)], dout.double(), (0, 1, 2))
    for each in zip(ours, eager, exact, strict=True):
        assert_as_accurate_as_eager(*each)


@pytest.mark.parametrize("rows, depth, columns", [(3, 17, 5), (70, 66, 65)], ids=["few", "many"])
def test_gradients_of_gradients_are_pytorchs(rows, depth, columns):
    x, weight, _ = operands(rows, depth, columns)

    def penalty(product):
        leaves = x.detach().requires_grad_(), weight.detach().requires_grad_()
        (dx,) = torch.autograd.grad(product(*leaves).tanh().sum(), leaves[0], create_graph=True)
        return torch.autograd.grad(dx.square().sum(), leaves)

    for mine, theirs in zip(penalty(kernel), penalty(F.linear), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)


def test_a_frozen_weight_s_layer_keeps_no_input():
    x, weight, bias = operands(3, 17, 5)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.shape) or tensor, lambda x: x):
        kernel(x.requires_grad_(), weight, bias)
        assert kept == [weight.shape]
        kernel(x.detach(), weight.requires_grad_(), bias)
        assert kept == [weight.shape, x.shape]


def test_a_checkpointed_layer_computes_the_same_again():
    layer = fastattn.accelerate(nn.Linear(20, 10), linear=True, verbose=False).train()
    x = torch.randn(6, 20, requires_grad=True)
    with torch.no_grad():
        again = layer(x)
    assert torch.equal(layer(x), again)


# --- When it runs ----------------------------------------------------------------------------------------------------


@pytest.fixture
def kernel_only(monkeypatch):
    """Without PyTorch's product: what it would have computed raises."""
    from fastattn.ops import linear as module

    monkeypatch.setattr(module.F, "linear", None)


def runs_kernel(x, weight, bias=None, **options) -> bool:
    return extension.linear_if_faster(x, weight, bias, "none") is not None


def test_few_rows_run_on_the_kernel(kernel_only, cpu_isa):
    x, weight, bias = operands(8, 20, 10)
    if cpu_isa == "portable":
        assert not runs_kernel(x, weight, bias)
    else:
        for rows in (x, x[:1], x[0], x.bfloat16()):
            w, b = weight.to(rows.dtype), bias.to(rows.dtype)
            for backend in ("auto", "cpu"):
                actual = linear(rows, w, b, activation="silu", backend=backend)
                assert torch.equal(actual, kernel(rows, w, b, "silu"))


def test_the_rest_is_pytorchs():
    x, weight, bias = operands(8, 20, 10)
    many = torch.randn(400, 20)
    wanted = [
        (x.double(), weight.double(), bias.double()), (many.bfloat16(), weight.bfloat16(), bias.bfloat16()),
    ]  # fmt: skip
    for arguments in wanted:
        assert not runs_kernel(*arguments)
        assert torch.equal(linear(*arguments, activation="relu"), F.linear(*arguments).relu())
    assert runs_kernel(x, weight.requires_grad_(), bias) == ("avx" in extension.active_cpu_isa())
    with torch.no_grad():
        for backend in ("eager", "triton"):
            assert torch.equal(linear(x, weight, bias, backend=backend), F.linear(x, weight, bias))
        with fastattn.use_backend("eager"):
            assert torch.equal(linear(x, weight, bias), F.linear(x, weight, bias))
        with torch.autocast("cpu", torch.bfloat16):
            assert linear(x, weight, bias).dtype == torch.bfloat16
    weight.requires_grad_(False)
    batched = torch.vmap(lambda row: linear(row, weight, bias))(x)
    torch.testing.assert_close(batched, F.linear(x, weight, bias))
    with pytest.raises(RuntimeError, match="same dtype"):
        linear(x, weight.bfloat16())


def test_compiles():
    x, weight, bias = operands(3, 20, 10)
    compiled = torch.compile(lambda x: linear(x, weight, bias, activation="gelu"), fullgraph=True)
    for rows in (x, torch.randn(30, 20)):
        torch.testing.assert_close(compiled(rows), F.gelu(F.linear(rows, weight, bias)))


# --- Modules ---------------------------------------------------------------------------------------------------------


def make_encoder() -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()


def test_accelerate_swaps_linear_layers_when_asked():
    model = make_encoder()
    x, parameters = torch.randn(2, 3, 16), dict(model.named_parameters())
    with torch.no_grad():
        expected = model(x)
        fastattn.accelerate(model, verbose=False)
        assert not any(isinstance(module, Linear) for module in model.modules())
        fastattn.accelerate(model, linear=True, verbose=False)
        layer = model.layers[0]
        assert {type(m) for m in (layer.linear1, layer.linear2, layer.self_attn.out_proj)} == {Linear}
        torch.testing.assert_close(model(x), expected)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            torch.testing.assert_close(other(x), expected)
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    fastattn.restore(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in make_encoder().modules()]


def test_int8_takes_what_linear_took_and_restore_gives_it_back():
    model = make_encoder()
    fastattn.accelerate(model, linear=True, verbose=False)
    fastattn.accelerate(model, int8=True, verbose=False)
    assert type(model.layers[0].linear1) is fastattn.Int8Linear
    fastattn.restore(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in make_encoder().modules()]


def test_hooks_and_training_see_the_layer():
    layer = nn.Linear(20, 10)
    fastattn.accelerate(layer, linear=True, verbose=False)
    seen = []
    layer.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    layer(torch.randn(3, 20)).sum().backward()
    assert seen == [(3, 10)] and layer.weight.grad is not None
