"""Packed sequences against one call of eager attention for each of them."""

from __future__ import annotations

import pytest
import torch
from accuracy import assert_as_accurate_as_eager
from attention_cases import DTYPES, KERNEL_BACKENDS, dtype_id

import fastattn

INF = float("inf")
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


def one_by_one(operands, lengths_q, lengths_k, **options):
    """The same from eager attention of each sequence on its own."""
    leaves = [operand.clone().requires_grad_() for operand in operands]
    options = {"alignment": "bottom_right"} | options
    slopes = options.pop("alibi_slopes", None)
    outs, lses = [], []
    splits = (leaves[0].split(lengths_q), leaves[1].split(lengths_k), leaves[2].split(lengths_k))
    for b, (q, k, v) in enumerate(zip(*splits, strict=True)):
        slope = slopes[b] if slopes is not None and slopes.dim() == 2 else slopes
        out, lse = fastattn.attention(
            *(x.transpose(0, 1)[None] for x in (q, k, v)), enable_gqa=True, return_lse=True, backend="eager",
            alibi_slopes=slope, **options
        )  # fmt: skip
        outs.append(out[0].transpose(0, 1))
        lses.append(lse[0])
    out, lse = torch.cat(outs), torch.cat(lses, dim=1)
    return [out, lse, *torch.autograd.grad((out, lse), leaves, _cotangents(out, lse))]


def _cotangents(out, lse):
    torch.manual_seed(2)
    return torch.randn(out.shape).to(torch.bfloat16).to(out.dtype), torch.randn(lse.shape).to(lse.dtype)


@pytest.mark.parametrize("backend", [*KERNEL_BACKENDS, "eager"])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("options", OPTIONS)
def test_matches_one_call_for_each_sequence(options, dtype, backend):
    operands, options = inputs(dtype), OPTIONS[options]
    actual = packed(operands, LENGTHS_Q, LENGTHS_K, backend, **options)
    eager = one_by_one(operands, LENGTHS_Q, LENGTHS_K, **options)
    reference = one_by_one([operand.double() for operand in operands], LENGTHS_Q, LENGTHS_K, **options)
    for name, result, other, exact in zip(("out", "lse", "dq", "dk", "dv"), actual, eager, reference, strict=True):
        assert_as_accurate_as_eager(result, other, exact, name, terms=1.0 if name.startswith("d") else 0.0)


@pytest.mark.parametrize("backend", [*KERNEL_BACKENDS, "eager"])
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


@pytest.mark.parametrize("backend", [*KERNEL_BACKENDS, "eager"])
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


@pytest.mark.parametrize("backend", [*KERNEL_BACKENDS, "eager"])
def test_rows_past_the_last_sequence_are_zero_and_get_no_gradient(backend):
    operands = inputs(torch.float32, (3, 5), (4, 6), tail=2)
    operands = [torch.cat((operand[:-2], torch.full_like(operand[-2:], float("nan")))) for operand in operands]
    out, lse, *gradients = packed(operands, (3, 5), (4, 6), backend)
    assert (out[-2:] == 0).all() and (lse[:, -2:] == -INF).all()
    assert out.isfinite().all() and lse[:, :-2].isfinite().all()
    for gradient in gradients:
        assert (gradient[-2:] == 0).all() and gradient.isfinite().all()


@pytest.mark.parametrize("backend", [*KERNEL_BACKENDS, "eager"])
@pytest.mark.parametrize("lengths", [(), (0,), (0, 0)])
def test_nothing_to_attend_to(lengths, backend):
    q, k, v = inputs(torch.float32, lengths, lengths)
    cu = cu_seqlens(lengths)
    out, lse = fastattn.varlen_attention(q, k, v, cu, cu, 0, 0, return_lse=True, backend=backend)
    assert out.shape == (0, HEADS, HEAD_DIM_V) and lse.shape == (HEADS, 0)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=dtype_id)
def test_compiles_without_a_graph_break(dtype):
    q, k, v = (x.requires_grad_() for x in inputs(torch.float32))
    cu_q, cu_k = cu_seqlens(LENGTHS_Q, dtype), cu_seqlens(LENGTHS_K, dtype)

    def step(q, k, v):
        return fastattn.varlen_attention(q, k, v, cu_q, cu_k, 33, 65, is_causal=True, return_lse=True)

    expected = step(q, k, v)
    actual = torch.compile(step, fullgraph=True, backend="aot_eager")(q, k, v)
    torch.testing.assert_close(actual, expected)
    cotangents = _cotangents(*expected)
    torch.testing.assert_close(
        torch.autograd.grad(actual, (q, k, v), cotangents), torch.autograd.grad(expected, (q, k, v), cotangents)
    )


def test_opcheck():
    torch.library.opcheck(torch.ops.fastattn.padded_rows, (cu_seqlens((2, 0, 3)), 4, 6, "cu_seqlens_q"))


_CU = torch.tensor([0, 3, 8], dtype=torch.int32)
BAD_INPUTS = [
    ({"cu_seqlens_q": torch.tensor([1, 3, 8])}, ValueError, "cu_seqlens_q must start with 0, got 1"),
    ({"cu_seqlens_k": torch.tensor([0, 5, 3])}, ValueError, "cu_seqlens_k must not fall, but sequence 1 has"),
    ({"cu_seqlens_q": torch.tensor([0, 3, 9])}, ValueError, "cu_seqlens_q ends at 9, but there are only 8 rows"),
    ({"max_seqlen_k": 4}, ValueError, "max_seqlen_k is 4, but sequence 1 of cu_seqlens_k has 5 rows"),
    ({"max_seqlen_q": torch.tensor(5)}, TypeError, r"max_seqlen_q must be an int >= 0.*\.item\(\)"),
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
