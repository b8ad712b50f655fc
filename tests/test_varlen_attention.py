"""Packed sequences against one call of eager attention for each of them."""

from __future__ import annotations

import contextlib

import pytest
import torch
from accuracy import assert_as_accurate_as_eager
from attention_cases import DTYPES, KERNEL_BACKENDS, dtype_id, rounding_of_probabilities
from devices import moved_for

import fastattn

pytestmark = pytest.mark.usefixtures("tensors_where_the_backend_runs")
INF = float("inf")
TRITON_RUNS = fastattn.available_backends()["triton"] is None
# Triton also where it is interpreted: most shapes are small enough.
MATRIX_BACKENDS = list(dict.fromkeys([*KERNEL_BACKENDS, *(["triton"] if TRITON_RUNS else [])]))
# Interpreted, one half precision does for both.
MATRIX = [
    (backend, dtype)
    for backend in (*MATRIX_BACKENDS, "eager")
    for dtype in DTYPES
    if backend != "triton" or backend in KERNEL_BACKENDS or dtype != torch.bfloat16
]
# Those whose ops are called directly; the one of emulated and CUDA is the CPU's.
OPS_BACKENDS = ["cpu", *(["triton"] if TRITON_RUNS else [])]
HEADS, HEADS_KV, HEAD_DIM, HEAD_DIM_V = 4, 2, 24, 16
# Empty sequences of either kind, more queries than keys and fewer, one token.
LENGTHS_Q, LENGTHS_K = (5, 0, 33, 1, 17, 4), (5, 7, 20, 65, 40, 0)

OPTIONS = {
    "plain": {},
    "causal": {"is_causal": True},
    "causal_top_left": {"is_causal": True, "alignment": "top_left"},
    "window": {"window": (9, 3)},
    "window_top_left": {"window": (9, 3), "alignment": "top_left"},
    "softcap_scale": {"softcap": 2.0, "scale": 0.4, "is_causal": True},
    "alibi": {"alibi_slopes": torch.tensor([0.1, 0.2, 0.4, 0.8])},
    "alibi_causal_top_left": {
        "alibi_slopes": torch.tensor([0.1, 0.2, 0.4, 0.8]), "is_causal": True, "alignment": "top_left"
    },
    "alibi_per_batch": {"alibi_slopes": torch.arange(24).view(6, 4) / 20, "window": (20, -1)},
    "sinks": {"sinks": torch.tensor([0.5, -1.0, 2.0, 0.0]), "is_causal": True},
}  # fmt: skip


def cu_seqlens(lengths, dtype=torch.int32):
    return torch.tensor([0, *lengths]).cumsum(0).to(dtype)


def inputs(dtype, lengths_q=LENGTHS_Q, lengths_k=LENGTHS_K, tail=0):
    torch.manual_seed(1)
    total_q, total_k = sum(lengths_q) + tail, sum(lengths_k) + tail
    shapes = (total_q, HEADS, HEAD_DIM), (total_k, HEADS_KV, HEAD_DIM), (total_k, HEADS_KV, HEAD_DIM_V)
    return [torch.randn(shape).to(dtype) for shape in shapes]


def packed(operands, lengths_q, lengths_k, backend, **options):
    """out, lse and gradients of one varlen call."""
    leaves = [operand.clone().requires_grad_() for operand in operands]
    out, lse = fastattn.varlen_attention(
        *leaves, cu_seqlens(lengths_q), cu_seqlens(lengths_k), max(lengths_q), max(lengths_k), return_lse=True,
        backend=backend, **options
    )  # fmt: skip
    return [out, lse, *torch.autograd.grad((out, lse), leaves, _cotangents(out, lse))]


def one_by_one(operands, lengths_q, lengths_k, backend="eager", **options):
    """The same from attention of each sequence on its own."""
    leaves = [operand.clone().requires_grad_() for operand in operands]
    options = {"alignment": "bottom_right"} | options
    slopes = options.pop("alibi_slopes", None)
    outs, lses = [], []
    splits = (leaves[0].split(lengths_q), leaves[1].split(lengths_k), leaves[2].split(lengths_k))
    for b, (q, k, v) in enumerate(zip(*splits, strict=True)):
        slope = slopes[b] if slopes is not None and slopes.dim() == 2 else slopes
        out, lse = fastattn.attention(
            *(x.transpose(0, 1)[None] for x in (q, k, v)), enable_gqa=True, return_lse=True, backend=backend,
            alibi_slopes=slope, **options
        )  # fmt: skip
        outs.append(out[0].transpose(0, 1))
        lses.append(lse[0])
    out, lse = torch.cat(outs), torch.cat(lses, dim=1)
    return [out, lse, *torch.autograd.grad((out, lse), leaves, _cotangents(out, lse))]


def _cotangents(out, lse):
    torch.manual_seed(2)
    return torch.randn(out.shape).to(torch.bfloat16).to(out.dtype), torch.randn(lse.shape).to(lse.dtype)


@pytest.mark.parametrize(("backend", "dtype"), MATRIX, ids=lambda x: x if isinstance(x, str) else dtype_id(x))
@pytest.mark.parametrize("options", OPTIONS)
def test_matches_one_call_for_each_sequence(options, dtype, backend):
    check(inputs(dtype), LENGTHS_Q, LENGTHS_K, backend, **moved_for(backend, OPTIONS[options]))


def check(operands, lengths_q, lengths_k, backend, **options):
    """Results and gradients of one varlen call against one call of eager attention for each sequence."""
    actual = packed(operands, lengths_q, lengths_k, backend, **options)
    eager = one_by_one(operands, lengths_q, lengths_k, **options)
    reference = one_by_one([operand.double() for operand in operands], lengths_q, lengths_k, **options)
    rounding = rounding_of_probabilities(reference[1], actual[1].dtype)
    for name, result, other, exact in zip(("out", "lse", "dq", "dk", "dv"), actual, eager, reference, strict=True):
        allowed = {} if name == "out" else {"terms": 1.0 if name.startswith("d") else 0.0, "rounding": rounding}
        assert_as_accurate_as_eager(result, other, exact, name, **allowed)


@pytest.mark.parametrize("options", [name for name in OPTIONS if name != "alibi_per_batch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
def test_cpu_kernels_treat_a_sequence_as_a_batch_of_one(dtype, options, cpu_isa):
    # Bit by bit; around the tiles of 64 keys and the blocks of 96 rows, and sequences of nothing between others. (Up to
    # four queries alone would be read in another order.)
    lengths_q, lengths_k = (97, 0, 5, 65, 63), (65, 1, 97, 63, 0)
    operands = inputs(dtype, lengths_q, lengths_k)
    actual = packed(operands, lengths_q, lengths_k, "cpu", **OPTIONS[options])
    expected = one_by_one(operands, lengths_q, lengths_k, "cpu", **OPTIONS[options])
    for name, x, y in zip(("out", "lse", "dq", "dk", "dv"), actual, expected, strict=True):
        assert torch.equal(x, y), name


@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=dtype_id)
@pytest.mark.parametrize("options", ["plain", "causal", "sinks"])
def test_a_few_queries_for_many_keys(options, dtype, backend):
    # Keys are split, and the last parts of the shorter sequences have none.
    lengths_q, lengths_k = (1, 4, 0, 2, 3), (700, 30, 5, 0, 260)
    torch.manual_seed(1)
    shapes = (10, HEADS, 32), (995, HEADS_KV, 32), (995, HEADS_KV, 32)
    check(
        [torch.randn(shape).to(dtype) for shape in shapes],
        lengths_q,
        lengths_k,
        backend,
        **moved_for(backend, OPTIONS[options]),
    )


def test_results_do_not_depend_on_the_number_of_threads():
    # Three sequences of one key head for two threads: the backward shares the keys of a head among them.
    lengths = (150, 70, 0, 140)
    torch.manual_seed(1)
    operands = [torch.randn(sum(lengths), heads, 16) for heads in (2, 1, 1)]
    threads, results = torch.get_num_threads(), [one_by_one(operands, lengths, lengths, "cpu", is_causal=True)]
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(packed(operands, lengths, lengths, "cpu", is_causal=True))
    finally:
        torch.set_num_threads(threads)
    for alone, one, two in zip(*results, strict=True):
        assert torch.equal(alone, one) and torch.equal(alone, two)


@pytest.mark.parametrize("backend", MATRIX_BACKENDS)
def test_slices_of_one_packed_tensor(backend):
    lengths = (30, 1, 65)
    dtype = torch.float32 if backend == "cpu" else torch.float16
    torch.manual_seed(1)
    qkv = torch.randn(96, 3, HEADS, 32).to(dtype).requires_grad_()
    cu = cu_seqlens(lengths)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        out = fastattn.varlen_attention(*qkv.unbind(1), cu, cu, 65, 65, backend=backend)
    called = called_on_operands(profile)
    assert not called & {"aten::copy_", "aten::clone", "aten::contiguous", "aten::index_copy"}, called
    assert out.is_contiguous()
    cotangent = torch.randn(out.shape).to(dtype)
    gradient = torch.autograd.grad(out, qkv, cotangent)[0]
    leaves = [x.detach().contiguous().requires_grad_() for x in qkv.unbind(1)]
    expected = fastattn.varlen_attention(*leaves, cu, cu, 65, 65, backend=backend)
    assert torch.equal(out, expected)
    assert torch.equal(gradient, torch.stack(torch.autograd.grad(expected, leaves, cotangent), dim=1))


@pytest.mark.parametrize("backend", MATRIX_BACKENDS)
def test_no_step_pads_or_copies(backend):
    lengths = (5, 70, 0, 3)
    dtype = torch.float32 if backend == "cpu" else torch.float16
    leaves = [operand.requires_grad_() for operand in of_head_dim(32, lengths, lengths, dtype)]
    cu, sinks = cu_seqlens(lengths), torch.zeros(HEADS, requires_grad=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        out = fastattn.varlen_attention(*leaves, cu, cu, 70, 70, is_causal=True, sinks=sinks, backend=backend)
        torch.autograd.grad(out, [*leaves, sinks], torch.ones_like(out))
    called = called_on_operands(profile)
    suffix = "_triton" if backend == "triton" else ""
    assert called >= {f"fastattn::varlen_attention{suffix}", f"fastattn::varlen_attention{suffix}_backward"}
    moves = {"aten::copy_", "aten::clone", "aten::constant_pad_nd", "aten::index_copy", "aten::index_select"}
    assert not called & {*moves, "fastattn::padded_rows", "fastattn::attention", "fastattn::attention_triton"}, called


def called_on_operands(profile):
    """The ops that got something of three dims or more. (Lengths are looked at, and Triton's interpreter copies.)"""
    return {
        event.key
        for event in profile.key_averages(group_by_input_shape=True)
        if any(isinstance(shape, list) and len(shape) >= 3 for shape in event.input_shapes)
    }


def of_head_dim(head_dim, lengths_q, lengths_k, dtype):
    torch.manual_seed(1)
    heads = (sum(lengths_q), HEADS), (sum(lengths_k), HEADS_KV), (sum(lengths_k), HEADS_KV)
    return [torch.randn(*shape, head_dim).to(dtype) for shape in heads]


@pytest.mark.parametrize("backend", MATRIX_BACKENDS)
def test_a_sequence_of_nan_stays_alone(backend):
    lengths = (20, 33, 11)
    dtype = torch.float32 if backend == "cpu" else torch.float16
    operands = inputs(dtype, lengths, lengths)
    clean = packed(operands, lengths, lengths, backend)
    for operand in operands:
        operand[20:53] = float("nan")
    spoilt = packed(operands, lengths, lengths, backend)
    for name, x, y in zip(("out", "lse", "dq", "dk", "dv"), clean, spoilt, strict=True):
        x, y = (x.T, y.T) if name == "lse" else (x, y)
        assert torch.equal(x[:20], y[:20]) and torch.equal(x[53:], y[53:]), name
        assert y[20:53].isnan().all(), name


@pytest.mark.parametrize("backend", [*MATRIX_BACKENDS, "eager"])
@pytest.mark.parametrize("lengths", [(), (0, 0)], ids=["no_sequence", "empty_sequences"])
def test_without_a_token_there_are_gradients_of_zero(backend, lengths):
    operands = [x.requires_grad_() for x in inputs(torch.float16, lengths, lengths, tail=3)]
    sinks = torch.zeros(HEADS, requires_grad=True)
    cu, options = cu_seqlens(lengths), {"sinks": sinks, "return_lse": True, "backend": backend}
    out, lse = fastattn.varlen_attention(*operands, cu, cu, 0, 0, **options)
    assert out.abs().sum() == 0 and (lse == -INF).all()
    (out.sum() + lse.masked_fill(lse == -INF, 0.0).sum()).backward()
    for leaf in (*operands, sinks):
        assert leaf.grad is None or leaf.grad.abs().sum() == 0
    assert operands[0].grad is not None


@pytest.mark.parametrize("backend", [*MATRIX_BACKENDS, "eager"])
def test_self_attention_with_one_tensor_of_lengths(backend):
    lengths = (7, 65, 0, 30)
    operands = inputs(torch.float64, lengths, lengths)
    cu = cu_seqlens(lengths)
    shared = fastattn.varlen_attention(*operands, cu, cu, 65, 65, is_causal=True, backend=backend)
    expected = one_by_one(operands, lengths, lengths, is_causal=True)[0]
    torch.testing.assert_close(shared, expected)
    # A longer maximum than needed changes nothing.
    torch.testing.assert_close(
        fastattn.varlen_attention(*operands, cu, cu, 80, 70, is_causal=True, backend=backend), expected
    )


@pytest.mark.parametrize("backend", [*MATRIX_BACKENDS, "eager"])
def test_drops_the_same_elements_as_a_padded_batch(backend):
    lengths = (30, 17, 40)
    q, k, v = inputs(torch.float64, lengths, lengths)
    padded = [torch.nn.utils.rnn.pad_sequence(x.split(lengths), batch_first=True).transpose(1, 2) for x in (q, k, v)]
    mask = (torch.arange(40) < torch.tensor(lengths)[:, None])[:, None, None, :]
    torch.manual_seed(9)
    batched = fastattn.attention(*padded, attn_mask=mask, dropout_p=0.4, enable_gqa=True, backend=backend)
    torch.manual_seed(9)
    cu = cu_seqlens(lengths)
    packed = fastattn.varlen_attention(q, k, v, cu, cu, 40, 40, dropout_p=0.4, backend=backend)
    expected = torch.cat([batched[b, :, :length].transpose(0, 1) for b, length in enumerate(lengths)])
    torch.testing.assert_close(packed, expected)


@pytest.mark.parametrize("backend", MATRIX_BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
def test_gradients_drop_the_same_elements_as_eager(dtype, backend):
    lengths_q, lengths_k = (30, 0, 17, 40), (37, 5, 70, 33)
    operands, results = inputs(dtype, lengths_q, lengths_k), []
    options = {"dropout_p": 0.3, "is_causal": True}
    for name, wide in ((backend, False), ("eager", False), ("eager", True)):
        torch.manual_seed(9)
        results.append(packed([x.double() if wide else x for x in operands], lengths_q, lengths_k, name, **options))
    for name, actual, eager, reference in zip(("out", "lse", "dq", "dk", "dv"), *results, strict=True):
        assert_as_accurate_as_eager(actual, eager, reference, name, terms=1.0 if name.startswith("d") else 0.0)


def ops_of(backend):
    name = "varlen_attention_triton" if backend == "triton" else "varlen_attention"
    return getattr(torch.ops.fastattn, name), getattr(torch.ops.fastattn, f"{name}_backward")


@pytest.mark.parametrize("backend", MATRIX_BACKENDS)
@pytest.mark.parametrize(
    ("cu", "longest"),
    [
        ([0, 50, 20, 40], 40),
        ([0, 9, 1 << 30, 40], 40),
        ([-7, -3, 20, 40], 40),
        ([0, 20, 30, 40], 4),
        ([3, 9, 9, 90], 9),
    ],
    ids=["falls", "past the end", "negative", "max_seqlen", "does not start with 0"],
)
def test_kernels_stay_inside_the_tensors(cu, longest, backend):
    # A GPU cannot look at the lengths first, nor does the backward. What lies before and behind the operands is NaN.
    dtype = torch.float32 if backend == "cpu" else torch.float16
    lengths = (15, 10, 15)
    whole = cu_seqlens(lengths)
    operands = [
        torch.cat((x[:5] * float("nan"), x, x[:5] * float("nan")))[5:-5] for x in inputs(dtype, lengths, lengths)
    ]
    options = (None, None, None, 0.0, True, 0.2, -1, -1, True, 0.0)
    wrong = torch.tensor(cu, dtype=torch.int32)
    forward, backward = ops_of(backend)
    out, lse = forward(*operands, whole, whole, 15, 15, *options)
    with fastattn._extension.extension.Emulation() if backend == "emulated" else contextlib.nullcontext():
        gradients = backward(out, lse, *operands, out, lse, wrong, wrong, longest, longest, *options, False)
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("backend", MATRIX_BACKENDS)
@pytest.mark.parametrize("cu", [[0], [0, 0, 0]], ids=["no sequence", "empty ones"])
def test_rows_without_any_sequence(cu, backend):
    dtype = torch.float32 if backend == "cpu" else torch.float16
    leaves = [operand.requires_grad_() for operand in inputs(dtype, (6,), (7,))]
    sinks = torch.zeros(HEADS, requires_grad=True)
    cu = torch.tensor(cu)
    out, lse = fastattn.varlen_attention(*leaves, cu, cu, 0, 0, sinks=sinks, return_lse=True, backend=backend)
    assert (out == 0).all() and (lse == -INF).all()
    gradients = torch.autograd.grad((out, lse), (*leaves, sinks), (torch.ones_like(out), torch.ones_like(lse)))
    assert all((gradient == 0).all() for gradient in gradients)


@pytest.mark.parametrize("backend", [*MATRIX_BACKENDS, "eager"])
def test_sequences_without_keys_between_rows_of_none(backend):
    leaves = [operand.requires_grad_() for operand in inputs(torch.float16, (3, 4), (5,))]
    cu_q, cu_k = cu_seqlens((3, 4)), torch.zeros(3, dtype=torch.int32)
    out, lse = fastattn.varlen_attention(*leaves, cu_q, cu_k, 4, 0, return_lse=True, backend=backend)
    assert (out == 0).all() and (lse == -INF).all()
    gradients = torch.autograd.grad((out, lse), leaves, (torch.ones_like(out), torch.ones_like(lse)))
    assert all((gradient == 0).all() for gradient in gradients)


@pytest.mark.parametrize("backend", [*MATRIX_BACKENDS, "eager"])
def test_rows_past_the_last_sequence_are_zero_and_get_no_gradient(backend):
    operands = inputs(torch.float32, (3, 5), (4, 6), tail=2)
    operands = [torch.cat((operand[:-2], torch.full_like(operand[-2:], float("nan")))) for operand in operands]
    out, lse, *gradients = packed(operands, (3, 5), (4, 6), backend)
    assert (out[-2:] == 0).all() and (lse[:, -2:] == -INF).all()
    assert out.isfinite().all() and lse[:, :-2].isfinite().all()
    for gradient in gradients:
        assert (gradient[-2:] == 0).all() and gradient.isfinite().all()


@pytest.mark.parametrize("backend", [*MATRIX_BACKENDS, "eager"])
@pytest.mark.parametrize("lengths", [(), (0,), (0, 0)])
def test_nothing_to_attend_to(lengths, backend):
    q, k, v = inputs(torch.float32, lengths, lengths)
    cu = cu_seqlens(lengths)
    out, lse = fastattn.varlen_attention(q, k, v, cu, cu, 0, 0, return_lse=True, backend=backend)
    assert out.shape == (0, HEADS, HEAD_DIM_V) and lse.shape == (HEADS, 0)


@pytest.mark.parametrize("backend", OPS_BACKENDS)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=dtype_id)
def test_compiles_without_a_graph_break(dtype, backend):
    lengths_q, lengths_k = (LENGTHS_Q, LENGTHS_K) if backend == "cpu" else ((5, 0, 4), (6, 3, 0))
    q, k, v = (x.requires_grad_() for x in inputs(torch.float32, lengths_q, lengths_k))
    lengths = (cu_seqlens(lengths_q, dtype), cu_seqlens(lengths_k, dtype), max(lengths_q), max(lengths_k))

    def step(q, k, v):
        return fastattn.varlen_attention(q, k, v, *lengths, is_causal=True, return_lse=True, backend=backend)

    expected = step(q, k, v)
    actual = torch.compile(step, fullgraph=True, backend="aot_eager")(q, k, v)
    torch.testing.assert_close(actual, expected)
    cotangents = _cotangents(*expected)
    torch.testing.assert_close(
        torch.autograd.grad(actual, (q, k, v), cotangents), torch.autograd.grad(expected, (q, k, v), cotangents)
    )


def test_opcheck():
    torch.library.opcheck(torch.ops.fastattn.padded_rows, (cu_seqlens((2, 0, 3)), 4, 6, "cu_seqlens_q"))


@pytest.mark.parametrize("backend", OPS_BACKENDS)
@pytest.mark.parametrize("layout", ["rows hold heads", "heads hold rows"])
def test_opcheck_of_the_kernels(layout, backend):
    forward, backward = ops_of(backend)
    lengths_q, lengths_k = (LENGTHS_Q, LENGTHS_K) if backend == "cpu" else ((5, 0, 4), (6, 3, 0))
    q, k, v = (x[:, : x.shape[1] // 2].clone() for x in inputs(torch.float32, lengths_q, lengths_k))
    if layout == "heads hold rows":
        q, k, v = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v))
    lengths = (cu_seqlens(lengths_q), cu_seqlens(lengths_k), max(lengths_q), max(lengths_k))
    sinks, rng_state = torch.randn(HEADS // 2), torch.tensor([3, 5])
    options = (None, sinks.requires_grad_(), rng_state, 0.1, True, 0.3, 9, -1, True, 0.0)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(forward, (*leaves, *lengths, *options))
    q, k, v, sinks = (x.detach() for x in (q, k, v, sinks))
    options = (None, sinks, *options[2:])
    out, lse = forward(q, k, v, *lengths, *options)
    arguments = (out, lse.nan_to_num(neginf=0.0), q, k, v, out, lse, *lengths, *options, True)
    torch.library.opcheck(backward, arguments)


def test_gradcheck():
    lengths_q, lengths_k = (3, 0, 5, 1), (4, 2, 3, 0)
    operands = inputs(torch.float64, lengths_q, lengths_k)
    leaves = [x[..., :4].clone().requires_grad_() for x in operands]
    sinks = torch.randn(HEADS, dtype=torch.float64, requires_grad=True)
    cu_q, cu_k = cu_seqlens(lengths_q), cu_seqlens(lengths_k)

    def attend(q, k, v, sinks):
        return fastattn.varlen_attention(
            q, k, v, cu_q, cu_k, 5, 4, window=(2, 1), softcap=3.0, sinks=sinks, return_lse=True, backend="cpu"
        )

    assert torch.autograd.gradcheck(attend, (*leaves, sinks))


_CU = torch.tensor([0, 3, 8], dtype=torch.int32)
BAD_INPUTS = [
    ({"cu_seqlens_q": torch.tensor([1, 3, 8])}, ValueError, "cu_seqlens_q must start with 0, got 1"),
    ({"cu_seqlens_k": torch.tensor([0, 5, 3])}, ValueError, "cu_seqlens_k must not fall, but sequence 1 has"),
    ({"cu_seqlens_q": torch.tensor([0, 3, 9])}, ValueError, "cu_seqlens_q ends at 9, but there are only 8 rows"),
    ({"max_seqlen_k": 4}, ValueError, "max_seqlen_k is 4, but sequence 1 of cu_seqlens_k has 5 rows"),
    ({"max_seqlen_q": torch.tensor(5)}, TypeError, r"max_seqlen_q must be an int >= 0.*\.item\(\)"),
    ({"max_seqlen_q": -1}, ValueError, "max_seqlen_q must be an int >= 0, got -1"),
    ({"max_seqlen_k": 2**63}, ValueError, r"max_seqlen_k must be an int >= 0 and below 2\^63, got 9223372036854775808"),
    ({"cu_seqlens_q": torch.tensor([0, 8])}, ValueError, "cu_seqlens_q has 2 entries but cu_seqlens_k has 3"),
    ({"cu_seqlens_q": torch.tensor([0.0, 3, 8])}, TypeError, "cu_seqlens_q must be an int32 or int64 Tensor, got fl"),
    ({"cu_seqlens_q": [0, 3, 8]}, TypeError, "cu_seqlens_q must be an int32 or int64 Tensor, got list"),
    ({"cu_seqlens_q": _CU[None]}, ValueError, r"cu_seqlens_q must be \(batch \+ 1,\), got shape \(1, 3\)"),
    ({"query": torch.zeros(8, 3, 24)}, ValueError, "query has 3 heads, which is not a multiple of the 2 heads of key"),
    ({"query": torch.zeros(8, 4, 20)}, ValueError, "query has head_dim 20 but key has head_dim 24"),
    ({"query": torch.zeros(2, 4, 4, 24)}, ValueError, r"query must be \(total, heads, head_dim\), got shape \(2"),
    ({"value": torch.zeros(7, 2, 24)}, ValueError, "key has 8 rows but value has 7"),
    ({"value": torch.zeros(8, 1, 24)}, ValueError, "key has 2 heads but value has 1"),
    ({"query": torch.zeros(8, 4, 24).half()}, TypeError, "query is float16 but key float32"),
    ({"alibi_slopes": torch.zeros(3)}, ValueError, r"alibi_slopes must be \(heads,\) = \(4,\) or .*\(2, 4\)"),
    ({"window": 3}, ValueError, "window must be"),
]  # fmt: skip


@pytest.mark.parametrize("backend", OPS_BACKENDS)
def test_second_derivatives_raise(backend):
    """Instead of an internal error of PyTorch, in the first backward, over the gradient of a mask that is not there."""
    cu_seqlens = torch.tensor([0, 2, 5])
    query = torch.randn(5, 2, 8, requires_grad=True)
    out = fastattn.varlen_attention(query, query, query, cu_seqlens, cu_seqlens, 3, 3, backend=backend)
    loss = out.square().sum()
    (gradient,) = torch.autograd.grad(loss, query, create_graph=True)
    assert torch.equal(gradient, torch.autograd.grad(loss, query)[0])
    with pytest.raises(NotImplementedError, match=r"^varlen_attention: .* Use backend='eager'"):
        gradient.sum().backward()


@pytest.mark.parametrize(("change", "error", "message"), BAD_INPUTS, ids=[case[2][:40] for case in BAD_INPUTS])
def test_rejects(change, error, message):
    arguments = {
        "query": torch.zeros(8, 4, 24), "key": torch.zeros(8, 2, 24), "value": torch.zeros(8, 2, 24),
        "cu_seqlens_q": _CU, "cu_seqlens_k": _CU.clone(), "max_seqlen_q": 5, "max_seqlen_k": 5,
    }  # fmt: skip
    fastattn.varlen_attention(**arguments)
    with pytest.raises(error, match=f"varlen_attention: {message}"):
        fastattn.varlen_attention(**arguments | change)


def test_explain_runs_nothing():
    q, k, v = inputs(torch.float32)
    state = torch.get_rng_state()
    text = fastattn.explain(
        fastattn.varlen_attention, q, k, v, cu_seqlens(LENGTHS_Q), cu_seqlens(LENGTHS_K), 33, 65, dropout_p=0.5
    )
    assert text.startswith("varlen_attention: ") and torch.equal(state, torch.get_rng_state())
