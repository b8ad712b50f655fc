"""What the CUDA glue refuses, by name and before anything is launched, and what it takes that kernels cannot address.

Tensors that are too large for a grid are expanded from one element: they take no memory, and neither may their refusal.
"""

from __future__ import annotations

import math
from contextlib import contextmanager

import pytest
import torch
from devices import device_for

import fastattn
from fastattn._extension import extension
from fastattn.ops.attention import attention_and_weights

BACKEND = "cuda" if fastattn.available_backends()["cuda"] is None else "emulated"
DEVICE = device_for(BACKEND)
ELSEWHERE = "cpu" if DEVICE == "cuda" else "meta"
pytestmark = pytest.mark.skipif(
    fastattn.available_backends()[BACKEND] is not None,
    reason=f"no CUDA kernels: {fastattn.available_backends()[BACKEND]}",
)
HALF, BF16, FLOAT, DOUBLE = torch.float16, torch.bfloat16, torch.float32, torch.float64


def zeros(*shape, dtype=HALF, device=DEVICE):
    """Of one element, however large."""
    return torch.zeros((1,) * len(shape), dtype=dtype, device=device).expand(shape)


def int8(*shape, device=DEVICE):
    return zeros(*shape, dtype=torch.int8, device=device)


@contextmanager
def nothing_launched():
    """On a device nobody counts; but there, what is refused takes no memory either."""
    before = extension.emulated_launches()
    allocated = torch.cuda.memory_allocated() if DEVICE == "cuda" else 0
    yield
    assert extension.emulated_launches() == before
    assert (torch.cuda.memory_allocated() if DEVICE == "cuda" else 0) <= allocated + 1024


# --- Refused by the public functions ---------------------------------------------------------------------------------

# More rows than a grid has blocks, each so long that no machine could allocate what the refusal has to come before.
MANY, WIDE = 2**31, 2**16
FUNCTIONS = {
    "attention": fastattn.attention,
    "weights": attention_and_weights,
    "layer_norm": fastattn.layer_norm,
    "rms_norm": fastattn.rms_norm,
    "add_layer_norm": fastattn.add_layer_norm,
    "add_rms_norm": fastattn.add_rms_norm,
    "quantize_int8": fastattn.quantize_int8,
    "int8_matmul": fastattn.int8_matmul,
    "int8_linear": fastattn.int8_linear,
}


def attention_arguments():
    return {"query": zeros(2, 4, 6, 8), "key": zeros(2, 4, 7, 8), "value": zeros(2, 4, 7, 8)}


def norm_arguments():
    return {"input": zeros(3, 8), "normalized_shape": 8, "weight": zeros(8)}


def add_norm_arguments():
    return {"input": zeros(3, 8), "residual": zeros(3, 8), "normalized_shape": 8, "weight": zeros(8)}


def matmul_arguments():
    return {"a": int8(3, 8), "b": int8(5, 8), "a_scale": zeros(3, dtype=FLOAT), "b_scale": zeros(5, dtype=FLOAT)}


def linear_arguments():
    return {"input": zeros(3, 8), "weight": int8(5, 8), "weight_scale": zeros(5, dtype=FLOAT)}


ARGUMENTS = {
    "attention": attention_arguments,
    "weights": attention_arguments,
    "layer_norm": norm_arguments,
    "rms_norm": norm_arguments,
    "add_layer_norm": add_norm_arguments,
    "add_rms_norm": add_norm_arguments,
    "quantize_int8": lambda: {"input": zeros(3, 8)},
    "int8_matmul": matmul_arguments,
    "int8_linear": linear_arguments,
}


def qkv(*shape, dtype=HALF, **others):
    return {name: zeros(*others.get(name, shape), dtype=dtype) for name in ("query", "key", "value")}


REFUSED = [
    ("attention weights", lambda: qkv(2, 4, 6, 8, dtype=FLOAT), NotImplementedError, "dtype float32 is not bfloat16"),
    ("attention weights", lambda: qkv(2, 4, 6, 8, dtype=DOUBLE), NotImplementedError, "dtype float64 is not bfloat16"),
    ("attention weights", lambda: {"key": zeros(2, 4, 7, 8, dtype=BF16)}, TypeError, "query is float16 but key bfloat"),
    ("attention weights", lambda: qkv(2, 4, 6, 257), NotImplementedError, "head_dim 257 .* is not in 1 to 256"),
    ("attention", lambda: {"value": zeros(2, 4, 7, 264)}, NotImplementedError, r"value: 264\) is not in 1 to 256"),
    ("attention weights", lambda: {"key": zeros(2, 4, 7, 8, device=ELSEWHERE)}, ValueError, "but key on"),
    ("attention weights", lambda: {"attn_mask": zeros(6, 7, device=ELSEWHERE)}, ValueError, "but attn_mask on"),
    ("attention", lambda: {"alibi_slopes": zeros(4, device=ELSEWHERE)}, ValueError, "but alibi_slopes on"),
    ("attention", lambda: {"sinks": zeros(4, device=ELSEWHERE)}, ValueError, "but sinks on"),
    ("attention weights", lambda: qkv(MANY, 1, 1, 256), NotImplementedError, r"2\^31 - 1 tiles of 16 rows"),
    ("attention weights", lambda: qkv(2**13, 2**12, 2**10, 8, key=(2**13, 2**12, 7, 8), value=(2**13, 2**12, 7, 8)),
     NotImplementedError, r"got query \[8192, 4096, 1024, 8\]"),
    ("attention weights", lambda: qkv(2**13, 2**12, 2**10, 8, query=(2**13, 2**12, 7, 8)), NotImplementedError,
     r"key \[8192, 4096, 1024, 8\]"),
    ("attention weights", lambda: qkv(1, 1, 2**28 + 1, 256), NotImplementedError, r"seqlens up to 2\^28, got 268435"),
    ("layer_norm rms_norm", lambda: {"input": zeros(3, 8, dtype=DOUBLE)}, NotImplementedError, "float64, not float32"),
    ("layer_norm rms_norm", lambda: {"input": int8(3, 8)}, TypeError, "int8"),
    ("layer_norm rms_norm add_layer_norm add_rms_norm", lambda: {"weight": zeros(8, device=ELSEWHERE)}, ValueError,
     "weight"),
    ("add_layer_norm add_rms_norm", lambda: {"residual": zeros(3, 8, device=ELSEWHERE)}, ValueError, "residual"),
    ("add_layer_norm add_rms_norm", lambda: {"residual": zeros(3, 8, dtype=BF16)}, NotImplementedError,
     "residual has dtype torch.bfloat16 but input has torch.float16"),
    ("layer_norm rms_norm", lambda: {"input": zeros(MANY, WIDE), "normalized_shape": WIDE, "weight": None},
     NotImplementedError, r"2\^31 - 1 rows .* 2147483648"),
    ("add_layer_norm add_rms_norm", lambda: {"input": zeros(MANY, WIDE), "residual": zeros(MANY, WIDE),
                                               "normalized_shape": WIDE, "weight": None}, NotImplementedError,
     r"2\^31 - 1 rows .* 2147483648"),
    ("layer_norm rms_norm", lambda: {"input": zeros(1, 2**30 + 1), "normalized_shape": 2**30 + 1, "weight": None},
     NotImplementedError, "1073741825"),
    ("quantize_int8", lambda: {"input": int8(3, 8)}, TypeError, "input must be float32.* got torch.int8"),
    ("quantize_int8", lambda: {"input": zeros(MANY, WIDE)}, NotImplementedError, r"2\^31 - 1 rows, got input"),
    ("int8_matmul", lambda: {"a": zeros(3, 8)}, TypeError, "a must be int8, got torch.float16"),
    ("int8_matmul", lambda: {"a_scale": zeros(3)}, TypeError, "a_scale must be float32, got torch.float16"),
    ("int8_matmul", lambda: {"out_dtype": torch.int32}, TypeError, "out_dtype must be float32.* got torch.int32"),
    ("int8_matmul", lambda: {"b": int8(5, 8, device=ELSEWHERE)}, ValueError, "one device, got a on .* b on"),
    ("int8_matmul", lambda: {"bias": zeros(5, device=ELSEWHERE)}, ValueError, "one device, .* bias on"),
    ("int8_matmul", lambda: {"a": int8(3, 133145), "b": int8(5, 133145)}, NotImplementedError, "K is 133145"),
    ("int8_matmul", lambda: {"a": int8(MANY, WIDE), "b": int8(5, WIDE), "a_scale": zeros(MANY, dtype=FLOAT)},
     NotImplementedError, r"2\^31 - 1 rows, got a \[2147483648, 65536\]"),
    ("int8_matmul", lambda: {"a": int8(3, WIDE), "b": int8(MANY, WIDE), "b_scale": zeros(MANY, dtype=FLOAT)},
     NotImplementedError, r"2\^31 - 1 rows, got weight \[2147483648, 65536\]"),
    ("int8_linear", lambda: {"input": int8(3, 8)}, TypeError, "input must be float32.* got torch.int8"),
    ("int8_linear", lambda: {"weight": zeros(5, 8)}, TypeError, "weight must be int8, got torch.float16"),
    ("int8_linear", lambda: {"weight": int8(5, 8, device=ELSEWHERE)}, ValueError, "one device, .* weight on"),
    ("int8_linear", lambda: {"bias": zeros(5, device=ELSEWHERE)}, ValueError, "one device, .* bias on"),
    ("int8_linear", lambda: {"input": zeros(3, 133145), "weight": int8(5, 133145)}, NotImplementedError, "K is 133145"),
    ("int8_linear", lambda: {"input": zeros(MANY, WIDE), "weight": int8(5, WIDE)}, NotImplementedError,
     r"got input \[2147483648, 65536\]"),
    ("int8_linear", lambda: {"input": zeros(3, WIDE), "weight": int8(MANY, WIDE),
                             "weight_scale": zeros(MANY, dtype=FLOAT)}, NotImplementedError,
     r"got weight \[2147483648"),
]  # fmt: skip
REFUSED_CALLS = [(name, *refusal) for names, *refusal in REFUSED for name in names.split()]


@pytest.mark.parametrize(
    "name, changes, error, message", REFUSED_CALLS, ids=[f"{call[0]}-{call[3][:32]}" for call in REFUSED_CALLS]
)
def test_refuses_by_name_and_launches_nothing(name, changes, error, message):
    arguments = ARGUMENTS[name]() | changes()
    with nothing_launched(), pytest.raises(error, match=message):
        FUNCTIONS[name](**arguments, backend=BACKEND)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_the_refusals_change_is_taken_and_launched(name):
    before = extension.emulated_launches()
    FUNCTIONS[name](**ARGUMENTS[name](), backend=BACKEND)
    assert BACKEND == "cuda" or extension.emulated_launches() > before


# --- Refused by the ops, past the checks in Python -------------------------------------------------------------------

SCORING = (0.0, False, 1.0, -1, -1, False, 0.0)  # dropout_p, is_causal, scale, window, bottom_right, softcap


def backward_arguments():
    out = {"dout": zeros(2, 4, 6, 8), "dlse": None}
    saved = {"out": zeros(2, 4, 6, 8), "lse": zeros(2, 4, 6, dtype=FLOAT)}
    optional = dict.fromkeys(("attn_mask", "alibi_slopes", "sinks", "rng_state"))
    return out | attention_arguments() | saved | optional


def norm_backward_arguments():
    statistics = {"mean": zeros(3, dtype=FLOAT), "rstd": zeros(3, dtype=FLOAT)}
    return {"dout": zeros(3, 8), "input": zeros(3, 8)} | statistics | {"weight": zeros(8)}


OPS = {
    "attention_backward": (backward_arguments, (*SCORING, False, False)),
    "layer_norm_backward": (norm_backward_arguments, (1, False, True, True, HALF)),
    "int8_matmul": (lambda: matmul_arguments() | {"bias": None}, ("none", FLOAT)),
}
REFUSED_BY_OPS = [
    ("attention_backward", lambda: qkv(2, 4, 6, 8, dtype=FLOAT), NotImplementedError, "take float16 and bfloat16"),
    ("attention_backward", lambda: {"dout": zeros(2, 4, 6, 8, dtype=FLOAT)}, TypeError, "dout must be Half"),
    ("attention_backward", lambda: {"dout": zeros(2, 4, 6, 7)}, ValueError, r"dout must be \[2, 4, 6, 8\]"),
    ("attention_backward", lambda: {"out": zeros(2, 4, 5, 8)}, ValueError, r"out must be \[2, 4, 6, 8\]"),
    ("attention_backward", lambda: {"lse": zeros(2, 4, 6)}, TypeError, "lse must be Float, got Half"),
    ("attention_backward", lambda: {"lse": zeros(2, 4, 5, dtype=FLOAT)}, ValueError, r"lse must be \[2, 4, 6\]"),
    ("attention_backward", lambda: {"dlse": zeros(2, 4, 6)}, TypeError, "dlse must be Float, got Half"),
    ("attention_backward", lambda: {"alibi_slopes": zeros(4)}, TypeError, "alibi_slopes must be Float, got Half"),
    ("attention_backward", lambda: {"sinks": zeros(5)}, ValueError, r"sinks must be \[4\]"),
    ("attention_backward", lambda: {"attn_mask": zeros(5, 7)}, ValueError, "attn_mask .* does not broadcast"),
    ("attention_backward", lambda: {"dout": zeros(2, 4, 6, 264), "out": zeros(2, 4, 6, 264),
                                    "value": zeros(2, 4, 7, 264)}, NotImplementedError, "1 to 256, got 8 and 264"),
    ("attention_backward", lambda: qkv(MANY, 1, 1, 256), NotImplementedError, r"2\^31 - 1 tiles of 16 rows"),
    ("layer_norm_backward", lambda: {"dout": zeros(3, 8, dtype=FLOAT)}, TypeError, "dout must be Half, got Float"),
    ("layer_norm_backward", lambda: {"rstd": zeros(3)}, TypeError, "rstd must be Float, got Half"),
    ("layer_norm_backward", lambda: {"mean": zeros(4, dtype=FLOAT)}, ValueError, r"mean must be \[3\]"),
    ("layer_norm_backward", lambda: {"weight": zeros(7)}, ValueError, r"weight must be \[8\]"),
    ("layer_norm_backward", lambda: {"input": zeros(3, 8, dtype=DOUBLE)}, NotImplementedError, "kernels take float32"),
    ("layer_norm_backward", lambda: {"input": zeros(MANY, WIDE)}, NotImplementedError, r"2\^31 - 1 rows"),
    ("int8_matmul", lambda: {"a": zeros(3, 8)}, TypeError, "a must be Char, got Half"),
    ("int8_matmul", lambda: {"b": int8(5, 9)}, ValueError, "weight has shape .* must be"),
    ("int8_matmul", lambda: {"b_scale": zeros(6, dtype=FLOAT)}, ValueError, "weight_scale has shape"),
    ("int8_matmul", lambda: {"bias": zeros(5, dtype=torch.int32)}, TypeError, "bias must be float32"),
    ("int8_matmul", lambda: {"a": int8(3, 133145), "b": int8(5, 133145)}, NotImplementedError, "K is 133145"),
]  # fmt: skip


@pytest.mark.parametrize(
    "name, changes, error, message", REFUSED_BY_OPS, ids=[f"{call[0]}-{call[3][:32]}" for call in REFUSED_BY_OPS]
)
def test_the_op_itself_refuses_by_name(name, changes, error, message):
    make_arguments, options = OPS[name]
    arguments = make_arguments() | changes()
    with extension.Emulation(BACKEND == "emulated"), nothing_launched(), pytest.raises(error, match=message):
        getattr(torch.ops.fastattn, name)(*arguments.values(), *options)


@pytest.mark.parametrize("name", OPS)
def test_what_the_ops_refusals_change_is_taken(name):
    make_arguments, options = OPS[name]
    with extension.Emulation(BACKEND == "emulated"):
        getattr(torch.ops.fastattn, name)(*make_arguments().values(), *options)


# --- Taken although no kernel can address it -------------------------------------------------------------------------


def misaligned(tensor, elements=1):
    """The same numbers in memory that starts ``elements`` after an aligned address, with NaN around them."""
    fill = 77 if not tensor.is_floating_point() else float("nan")
    storage = torch.full((tensor.numel() + 2 * elements,), fill, dtype=tensor.dtype, device=tensor.device)
    return storage[elements : elements + tensor.numel()].view(tensor.shape).copy_(tensor)


def assert_any_address_gives_the_same_bits(function, arguments, offset=1):
    """All operands misaligned, and each alone: one that is may hide that another one was not asked."""
    expected = function(**arguments)
    moved = {name: misaligned(tensor, offset) for name, tensor in arguments.items()}
    for changes in (moved, *({name: tensor} for name, tensor in moved.items())):
        for plain, other in zip(expected, function(**arguments | changes), strict=True):
            assert torch.equal(plain, other), list(changes)


@pytest.mark.parametrize("head_dim", [16, 64])
@pytest.mark.parametrize("additive", [True, False], ids=["additive", "bool"])
def test_attention_of_misaligned_operands(head_dim, additive):
    """Queries, keys and values are copied; masks, slopes, sinks, gradients and statistics are read where they are."""
    shapes = {"query": (1, 4, 33, head_dim), "key": (1, 2, 40, head_dim), "value": (1, 2, 40, head_dim)}
    tensors = {name: torch.randn(shape, device=DEVICE).half() for name, shape in shapes.items()}
    mask = torch.randn(33, 40, device=DEVICE)
    tensors |= {
        "attn_mask": mask.half() if additive else mask > -1,
        "alibi_slopes": torch.rand(4, device=DEVICE),
        "sinks": torch.randn(4, device=DEVICE),
        "dout": torch.randn(1, 4, 33, head_dim, device=DEVICE).half(),
        "dlse": torch.randn(1, 4, 33, device=DEVICE),
    }

    def results(dout, dlse, **tensors):
        leaves = {name: t.detach().requires_grad_(t.is_floating_point() and name != "alibi_slopes")
                  for name, t in tensors.items()}  # fmt: skip
        out, lse = fastattn.attention(**leaves, enable_gqa=True, return_lse=True, backend=BACKEND)
        wanted = [leaf for leaf in leaves.values() if leaf.requires_grad]
        return [out, lse, *torch.autograd.grad((out, lse), wanted, (dout, dlse))]

    assert_any_address_gives_the_same_bits(results, tensors)


def with_odd_strides(tensor):
    """The same elements; where a dimension has one, its stride is odd, as it may be in a view of a larger tensor."""
    strides = (33 + 2 * dim if size == 1 else tensor.stride(dim) for dim, size in enumerate(tensor.shape))
    return tensor.as_strided(tensor.shape, tuple(strides))


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("seqlen_q, seqlen_k", [(1, 40), (40, 1), (1, 1)])
def test_strides_of_single_elements_do_not_matter(seqlen_q, seqlen_k, heads):
    """A device faults at a misaligned address, perhaps also at one that it is told not to read."""
    shapes = {"query": seqlen_q, "key": seqlen_k, "value": seqlen_k, "dout": seqlen_q}
    tensors = {name: torch.randn(1, heads, seqlen, 64, device=DEVICE).half() for name, seqlen in shapes.items()}

    def results(query, key, value, dout):
        leaves = [t.detach().requires_grad_() for t in (query, key, value)]
        out, lse = fastattn.attention(*leaves, return_lse=True, backend=BACKEND)
        weights = attention_and_weights(query, key, value, backend=BACKEND)[1]
        return [out, lse, weights, *torch.autograd.grad(out, leaves, dout)]

    odd = {name: with_odd_strides(t) for name, t in tensors.items()}
    for plain, other in zip(results(**tensors), results(**odd), strict=True):
        assert torch.equal(plain, other)


@pytest.mark.parametrize("op", ["layer_norm", "add_layer_norm", "add_rms_norm"])
def test_norms_of_misaligned_operands(op):
    tensors = {name: torch.randn(5, 64, device=DEVICE).half() for name in ("input", "residual", "dout")}
    tensors |= {name: torch.randn(64, device=DEVICE) for name in ("weight", "bias")}
    for name in ("residual",) * (not op.startswith("add")) + ("bias",) * ("rms" in op):
        del tensors[name]

    def results(dout, **tensors):
        leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()}
        outputs = getattr(fastattn, op)(normalized_shape=64, **leaves, backend=BACKEND)
        out = outputs[0] if isinstance(outputs, tuple) else outputs
        return [out, *torch.autograd.grad(out, list(leaves.values()), dout)]

    assert_any_address_gives_the_same_bits(results, tensors)


@pytest.mark.parametrize("rows", [3, 20])
@pytest.mark.parametrize("offset", [1, 2])
def test_int8_of_misaligned_operands(rows, offset):
    x = torch.randn(rows, 64, device=DEVICE).half()
    weight, weight_scale = fastattn.quantize_int8(torch.randn(48, 64, device=DEVICE), backend="eager")
    a, a_scale = fastattn.quantize_int8(x, backend="eager")
    bias = torch.randn(48, device=DEVICE).half()
    calls = [
        (fastattn.quantize_int8, {"input": x}),
        (fastattn.int8_matmul, {"a": a, "b": weight, "a_scale": a_scale, "b_scale": weight_scale, "bias": bias}),
        (fastattn.int8_linear, {"input": x, "weight": weight, "weight_scale": weight_scale, "bias": bias}),
    ]
    for function, tensors in calls:

        def results(function=function, **tensors):
            result = function(**tensors, backend=BACKEND)
            return result if isinstance(result, tuple) else (result,)

        assert_any_address_gives_the_same_bits(results, tensors, offset)


# --- Nothing to do ---------------------------------------------------------------------------------------------------

EMPTY = [
    ("attention weights", lambda: qkv(0, 4, 6, 8)),
    ("attention", lambda: qkv(2, 0, 6, 8)),
    ("attention weights", lambda: qkv(2, 4, 0, 8, key=(2, 4, 7, 8), value=(2, 4, 7, 8))),
    ("layer_norm rms_norm quantize_int8", lambda: {"input": zeros(0, 8)}),
    ("add_layer_norm add_rms_norm", lambda: {"input": zeros(0, 8), "residual": zeros(0, 8)}),
    ("int8_matmul", lambda: {"a": int8(0, 8), "a_scale": zeros(0, dtype=FLOAT)}),
    ("int8_matmul", lambda: {"b": int8(0, 8), "b_scale": zeros(0, dtype=FLOAT)}),
    ("int8_linear", lambda: {"input": zeros(0, 8)}),
    ("int8_linear", lambda: {"weight": int8(0, 8), "weight_scale": zeros(0, dtype=FLOAT)}),
]
EMPTY_CALLS = [(name, changes) for names, changes in EMPTY for name in names.split()]


@pytest.mark.parametrize("name, changes", EMPTY_CALLS, ids=[name for name, _ in EMPTY_CALLS])
def test_empty_results_need_no_launch(name, changes):
    arguments = ARGUMENTS[name]() | changes()
    with nothing_launched():
        results = FUNCTIONS[name](**arguments, backend=BACKEND)
    expected = FUNCTIONS[name](**arguments, backend="eager")
    for result, other in zip(*(r if isinstance(r, tuple) else (r,) for r in (results, expected)), strict=True):
        assert result.shape == other.shape and result.dtype == other.dtype and math.prod(result.shape) == 0


@pytest.mark.parametrize("name", ["attention", "weights", "int8_matmul", "int8_linear"])
def test_nothing_to_sum_is_zero(name):
    """No keys, or K = 0: the result has elements, and all are 0."""
    changes = {
        "int8_matmul": lambda: {"a": int8(3, 0), "b": int8(5, 0)},
        "int8_linear": lambda: {"input": zeros(3, 0), "weight": int8(5, 0)},
    }.get(name, lambda: {"key": zeros(2, 4, 0, 8), "value": zeros(2, 4, 0, 8)})
    result = FUNCTIONS[name](**ARGUMENTS[name]() | changes(), backend=BACKEND)
    result = result[0] if isinstance(result, tuple) else result
    assert result.numel() > 0 and result.eq(0).all()
