"""What attention means: eager against a loop over rows, then the promises that every backend keeps."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from attention_cases import DTYPES, FEATURES, KERNEL_BACKENDS, Case, dtype_id, run
from devices import device_for, generator_state, moved_for, set_generator_state

import fastattn
from fastattn.ops.attention import attention_and_weights
from fastattn.ops.philox import draw_rng_state, dropout_mask

pytestmark = pytest.mark.usefixtures("tensors_where_the_backend_runs")
BACKENDS = [*KERNEL_BACKENDS, "eager"]
each_backend = pytest.mark.parametrize("backend", BACKENDS)
INF = float("inf")


# --- Eager is right --------------------------------------------------------------------------------------------------


def attention_by_loops(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, window=None,
                       alignment="top_left", softcap=0.0, alibi_slopes=None, sinks=None):  # fmt: skip
    """The definition, one score at a time in Python's floats."""
    batch, heads, seqlen_q, head_dim = query.shape
    seqlen_k, group = key.shape[2], heads // key.shape[1]
    diagonal = seqlen_k - seqlen_q if alignment == "bottom_right" else 0
    left, right = (INF if side == -1 else side for side in window or (-1, -1))
    mask = None if attn_mask is None else attn_mask.expand(batch, heads, seqlen_q, seqlen_k)
    kept = None
    if dropout_p:
        kept = dropout_mask(draw_rng_state(query.device), batch, heads, seqlen_q, seqlen_k, dropout_p)
    out = torch.zeros(batch, heads, seqlen_q, value.shape[3], dtype=query.dtype)
    lse = torch.full((batch, heads, seqlen_q), -INF, dtype=query.dtype)
    for b in range(batch):
        for h in range(heads):
            for i in range(seqlen_q):
                scores = {}
                for j in range(seqlen_k):
                    at = i + diagonal
                    s = (head_dim**-0.5 if scale is None else scale) * float(query[b, h, i] @ key[b, h // group, j])
                    s = softcap * math.tanh(s / softcap) if softcap else s
                    if alibi_slopes is not None:
                        s -= float(alibi_slopes.expand(batch, heads)[b, h]) * abs(at - j)
                    if mask is not None and mask.dtype != torch.bool:
                        s += float(mask[b, h, i, j])
                    hidden = (mask is not None and mask.dtype == torch.bool and not mask[b, h, i, j]) or s == -INF
                    if not hidden and not (is_causal and j > at) and at - left <= j <= at + right:
                        scores[j] = s
                logits = [*scores.values(), *([] if sinks is None else [float(sinks[h])])]
                if logits:
                    lse[b, h, i] = max(logits) + math.log(sum(math.exp(s - max(logits)) for s in logits))
                for j, s in scores.items():
                    p = math.exp(s - float(lse[b, h, i]))
                    if kept is not None:
                        p = p / (1 - dropout_p) if kept[b, h, i, j] else 0.0
                    out[b, h, i] += p * value[b, h // group, j]
    return out, lse


@pytest.mark.parametrize("feature", [name for name in FEATURES if name != "dropout_everything"])
def test_eager_matches_a_loop_over_scores(feature):
    case = FEATURES[feature]
    case = Case(**{**vars(case), "seqlen_q": 5 + case.seqlen_q % 3, "seqlen_k": 6 + case.seqlen_k % 5, "head_dim": 4})
    inputs = {name: t.double() if t.is_floating_point() else t for name, t in case.inputs(torch.float64).items()}
    torch.manual_seed(0)
    expected = attention_by_loops(**inputs, **case.options)
    torch.manual_seed(0)
    actual = fastattn.attention(**inputs, **case.options, enable_gqa=True, return_lse=True, backend="eager")
    torch.testing.assert_close(actual, expected)


@each_backend
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"scale": 0.7}, {"attn_mask": torch.rand(20, 30) > 0.5},
                                     {"attn_mask": torch.randn(3, 1, 30)}, {"enable_gqa": True}])  # fmt: skip
def test_means_what_torch_means(options, backend):
    heads_kv, options = 1 if "enable_gqa" in options else 3, moved_for(backend, options)
    q, k, v = torch.randn(2, 3, 20, 16), torch.randn(2, heads_kv, 30, 16), torch.randn(2, heads_kv, 30, 16)
    expected = F.scaled_dot_product_attention(q, k, v, **options)
    torch.testing.assert_close(fastattn.attention(q, k, v, **options, backend=backend), expected)


LEADING_DIMS = [
    ((20, 16), (30, 16), (30, 16)),
    ((3, 20, 16), (3, 30, 16), (3, 30, 16)),
    ((4, 2, 3, 20, 16), (4, 2, 3, 30, 16), (4, 2, 3, 30, 16)),
    ((2, 3, 20, 16), (1, 3, 30, 16), (1, 3, 30, 16)),
    ((2, 3, 20, 16), (2, 1, 30, 16), (2, 1, 30, 16)),
    ((3, 20, 16), (2, 3, 30, 16), (2, 3, 30, 16)),
    ((4, 2, 3, 20, 16), (4, 1, 3, 30, 16), (2, 3, 30, 16)),
    ((1, 20, 16), (3, 2, 30, 16), (30, 16)),
    ((0, 2, 3, 20, 16), (0, 2, 3, 30, 16), (0, 2, 3, 30, 16)),
]


@each_backend
@pytest.mark.parametrize("shapes", LEADING_DIMS, ids=str)
def test_leading_dims_broadcast_as_in_torch(shapes, backend):
    operands = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    expected = F.scaled_dot_product_attention(*operands, is_causal=True)
    out, lse = fastattn.attention(*operands, is_causal=True, return_lse=True, backend=backend)
    torch.testing.assert_close(out, expected)
    assert lse.shape == out.shape[:-1]
    weight = torch.randn_like(out)
    torch.testing.assert_close(
        torch.autograd.grad(out, operands, weight), torch.autograd.grad(expected, operands, weight)
    )


@each_backend
@pytest.mark.parametrize("mask_shape", [(5, 7), (3, 1, 7), (2, 1, 5, 7), (4, 2, 3, 5, 7), (4, 1, 1, 5, 1)], ids=str)
def test_masks_with_more_leading_dims(mask_shape, backend):
    q, k, v = (torch.randn(4, 2, 3, n, 8, dtype=torch.float64) for n in (5, 7, 7))
    mask = torch.randn(mask_shape, dtype=torch.float64)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.expand(4, 2, 3, 5, 7))
    torch.testing.assert_close(fastattn.attention(q, k, v, attn_mask=mask, backend=backend), expected)


# --- Gradients -------------------------------------------------------------------------------------------------------


@each_backend
@pytest.mark.parametrize("feature", ["plain", "float_mask_per_head", "sinks", "softcap", "alibi", "dropout",
                                     "causal_bottom_right_empty_rows", "sinks_empty_rows", "everything"])  # fmt: skip
def test_gradcheck(feature, backend):
    case = FEATURES[feature]
    case = Case(**{**vars(case), "batch": 1, "heads": 2, "heads_kv": 1, "seqlen_q": 4 + case.seqlen_q % 3,
                   "seqlen_k": 5, "head_dim": 3, "head_dim_v": 2})  # fmt: skip
    inputs = {name: t.double() if t.is_floating_point() else t for name, t in case.inputs(torch.float64).items()}
    if "attn_mask" in inputs:
        inputs["attn_mask"] = (
            inputs["attn_mask"].clamp(min=-5) if feature != "sinks_empty_rows" else inputs["attn_mask"]
        )
    names = [name for name, t in inputs.items() if t.is_floating_point() and name != "alibi_slopes"]

    def function(*leaves):
        torch.manual_seed(0)
        arguments = inputs | dict(zip(names, leaves, strict=True))
        out, lse = fastattn.attention(**arguments, **case.options, enable_gqa=True, return_lse=True, backend=backend)
        return out, lse.masked_fill(lse == -INF, 0.0)

    assert torch.autograd.gradcheck(function, [inputs[name].detach().requires_grad_() for name in names])


def test_slopes_that_require_grad_get_it_from_eager():
    q, k, v = (torch.randn(1, 2, 5, 4, dtype=torch.float64) for _ in range(3))
    slopes = torch.rand(2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: fastattn.attention(q, k, v, alibi_slopes=s), (slopes,))
    with pytest.raises(NotImplementedError, match=r"alibi_slopes requires grad.*detach"):
        fastattn.attention(q, k, v, alibi_slopes=slopes, backend="cpu")


def test_second_derivatives_and_function_transforms_run_on_eager():
    q, k, v = (torch.randn(2, 2, 5, 4, dtype=torch.float64) for _ in range(3))
    mapped = torch.func.vmap(fastattn.attention)(q[:, None], k[:, None], v[:, None])
    torch.testing.assert_close(mapped[:, 0], fastattn.attention(q, k, v))
    gradient = torch.func.grad(lambda q: fastattn.attention(q, k, v).sum())(q)
    leaf = q.clone().requires_grad_()
    torch.testing.assert_close(gradient, torch.autograd.grad(fastattn.attention(leaf, k, v).sum(), leaf)[0])
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    assert torch.autograd.gradgradcheck(lambda *leaves: fastattn.attention(*leaves, backend="eager"), leaves)


# --- Rows that may attend to nothing ---------------------------------------------------------------------------------

EMPTY_ROWS = {
    "bool_mask": {"attn_mask": (torch.arange(9) > 2)[:, None]},
    "float_mask": {"attn_mask": torch.zeros(9, 1).masked_fill(torch.arange(9)[:, None] <= 2, -INF)},
    "window": {"window": (-1, -1), "attn_mask": (torch.arange(9) > 2)[:, None].expand(9, 12), "is_causal": True},
    "causal": {"is_causal": True, "alignment": "bottom_right"},
}


@each_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("name", EMPTY_ROWS)
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_rows_that_see_nothing_are_zero(dropout_p, name, dtype, backend):
    seqlen_k = 6 if name == "causal" else 12
    q, k, v = (torch.randn(2, 2, n, 8).to(dtype).requires_grad_() for n in (9, seqlen_k, seqlen_k))
    out, lse = fastattn.attention(
        q, k, v, dropout_p=dropout_p, return_lse=True, backend=backend, **moved_for(backend, EMPTY_ROWS[name])
    )
    assert (out[:, :, :3] == 0).all() and (lse[:, :, :3] == -INF).all()
    assert (lse[:, :, 3:] > -INF).all()
    # Whatever reaches such a row from above, it passes on nothing.
    gradients = torch.autograd.grad((out, lse), (q, k, v), (torch.full_like(out, 1e2), torch.ones_like(lse)))
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert (gradients[0][:, :, :3] == 0).all()


@each_backend
def test_rows_that_see_only_a_sink(backend):
    q, k, v = (torch.randn(1, 2, 4, 8) for _ in range(3))
    sinks = torch.tensor([1.5, -2.0], requires_grad=True)
    out, lse = fastattn.attention(q, k, v, torch.zeros(4, 4).bool(), sinks=sinks, return_lse=True, backend=backend)
    assert (out == 0).all()
    torch.testing.assert_close(lse, sinks[None, :, None].expand(1, 2, 4))
    torch.testing.assert_close(torch.autograd.grad(lse.sum(), sinks)[0], torch.tensor([4.0, 4.0]))


@each_backend
def test_no_keys_at_all(backend):
    q, k = torch.randn(1, 2, 4, 8, requires_grad=True), torch.randn(1, 2, 0, 8, requires_grad=True)
    sinks = torch.tensor([1.5, -2.0], requires_grad=True)
    for sink in (None, sinks):
        out, lse = fastattn.attention(q, k, k, sinks=sink, return_lse=True, backend=backend)
        assert (out == 0).all() and out.shape == (1, 2, 4, 8)
        assert (lse == (-INF if sink is None else sink.detach()[None, :, None])).all()
        assert (torch.autograd.grad(out.sum() + lse.exp().sum(), q)[0] == 0).all()


@each_backend
def test_hidden_keys_with_nan_scores_leave_the_output_alone(backend):
    """A hidden key may hold NaN (its value may not): the score of a hidden key is -inf whatever it was."""
    q, k, v = (torch.randn(1, 2, 70, 16) for _ in range(3))
    mask = torch.arange(70) < 37
    expected = fastattn.attention(q, k, v, mask, backend=backend)
    k[:, :, 37:] = float("nan")
    torch.testing.assert_close(fastattn.attention(q, k, v, mask, backend=backend), expected, rtol=0, atol=0)


# --- Dropout ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
@pytest.mark.parametrize("shape", [(2, 3, 65, 97), (1, 2, 130, 300), (3, 1, 1, 33)], ids=str)
@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 0.999])
def test_drops_exactly_the_elements_that_eager_drops(dropout_p, shape, backend):
    """With value = identity the output is the probabilities: dropped ones are exactly 0."""
    batch, heads, seqlen_q, seqlen_k = shape
    q, k = torch.randn(batch, heads, seqlen_q, 8), torch.randn(batch, heads, seqlen_k, 8)
    for start in range(0, seqlen_k, 256):
        v = torch.eye(seqlen_k)[:, start : start + 256].expand(batch, heads, seqlen_k, -1)
        torch.manual_seed(7)
        kept = fastattn.attention(q, k, v, dropout_p=dropout_p, backend=backend) != 0
        torch.manual_seed(7)
        assert torch.equal(kept, fastattn.attention(q, k, v, dropout_p=dropout_p, backend="eager") != 0)


@each_backend
def test_dropout_uses_the_generator_only_when_it_drops(backend):
    q = torch.randn(1, 2, 5, 8)
    state = generator_state(backend)
    fastattn.attention(q, q, q, dropout_p=0.0, backend=backend)
    fastattn.explain(fastattn.attention, q, q, q, dropout_p=0.5)
    assert torch.equal(generator_state(backend), state)
    first = fastattn.attention(q, q, q, dropout_p=0.5, backend=backend)
    assert not torch.equal(generator_state(backend), state)
    assert not torch.equal(fastattn.attention(q, q, q, dropout_p=0.5, backend=backend), first)
    set_generator_state(backend, state)
    assert torch.equal(fastattn.attention(q, q, q, dropout_p=0.5, backend=backend), first)


@pytest.mark.parametrize("backend", ["cpu", "eager"])
def test_dropout_that_drops_nothing_still_scales(backend):
    """A p below 2^-17 is rounded to a threshold of 0; what is kept, all of it, is divided by 1 - p everywhere."""
    if fastattn.available_backends()[backend] is not None:
        pytest.skip(fastattn.available_backends()[backend])
    p, (q, k, v, dout) = 7e-6, (torch.randn(1, 2, 65, 8, dtype=torch.float64, requires_grad=True) for _ in range(4))
    results = []
    for dropout_p, factor in ((p, 1.0), (0.0, 1 / (1 - p))):
        each = attention_and_weights(q, k, v, None, dropout_p, average_heads=False, backend=backend)
        out, weights = (factor * x for x in each)
        dweights = torch.autograd.grad(weights.square().sum(), (q, k), retain_graph=True)
        results.append((out, weights, *torch.autograd.grad(out, (q, k, v), dout), *dweights))
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


@each_backend
def test_dropout_of_everything_is_zero_and_leaves_the_lse(backend):
    q, k, v = (torch.randn(1, 2, 5, 8, requires_grad=True) for _ in range(3))
    out, lse = fastattn.attention(q, k, v, dropout_p=1.0, return_lse=True, backend=backend)
    assert (out == 0).all()
    torch.testing.assert_close(lse, fastattn.attention(q, k, v, return_lse=True, backend=backend)[1])
    assert all((gradient == 0).all() for gradient in torch.autograd.grad(out.sum(), (q, k, v)))


# --- Weights, layouts, autocast --------------------------------------------------------------------------------------


@each_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("average_heads", [False, True])
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"dropout_p": 0.3}, {"window": (4, 4)},
                                     {"attn_mask": torch.randn(4, 33, 40)}])  # fmt: skip
def test_weights_belong_to_the_output(options, average_heads, dtype, backend):
    q, k, v = (torch.randn(2, h, n, 16).to(dtype).requires_grad_() for h, n in ((4, 33), (2, 40), (2, 40)))
    options = moved_for(backend, options)
    torch.manual_seed(3)
    _, weights = attention_and_weights(q, k, v, **options, average_heads=average_heads, backend=backend)
    torch.manual_seed(3)
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    expected, exact = attention_and_weights(*wide, **options, average_heads=average_heads, backend="eager")
    assert weights.dtype == dtype
    tolerance = 4 * torch.finfo(dtype).eps if dtype != torch.float64 else 1e-12
    torch.testing.assert_close(weights.double(), exact, rtol=tolerance, atol=tolerance)
    if not average_heads:
        torch.testing.assert_close(exact @ wide[2].repeat_interleave(2, dim=1), expected)
    cotangent = torch.randn(weights.shape)
    gradients = torch.autograd.grad(weights, (q, k), cotangent.to(dtype))
    exact_gradients = torch.autograd.grad(exact, wide[:2], cotangent.to(dtype).double())
    for gradient, exact_gradient in zip(gradients, exact_gradients, strict=True):
        torch.testing.assert_close(gradient.double(), exact_gradient, rtol=8 * tolerance, atol=16 * tolerance)


@each_backend
def test_heads_of_a_transposed_query_merge_without_a_copy(backend):
    q = torch.randn(2, 20, 4, 8).transpose(1, 2)
    out = fastattn.attention(q, q, q, backend=backend)
    if backend != "eager":
        assert out.transpose(1, 2).is_contiguous()


@each_backend
def test_autocast_converts_operands_as_torch_does(backend):
    q, k, v = (torch.randn(1, 2, 9, 16) for _ in range(3))
    with torch.autocast(device_for(backend), torch.bfloat16):
        out = fastattn.attention(q, k.bfloat16(), v, backend=backend)
        assert F.scaled_dot_product_attention(q, k.bfloat16(), v).dtype == out.dtype == torch.bfloat16
        wide = fastattn.attention(q.double(), k.double(), v.double(), backend=backend)
    expected = fastattn.attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), backend=backend)
    assert torch.equal(out, expected) and wide.dtype == torch.float64


def test_large_head_dims_run_on_eager():
    q = torch.randn(1, 1, 5, 257)
    torch.testing.assert_close(fastattn.attention(q, q, q), F.scaled_dot_product_attention(q, q, q))
    with pytest.raises(
        NotImplementedError, match=r"'cpu' cannot run this: head_dim 257 \(value: 257\) is not in 1 to 256"
    ):
        fastattn.attention(q, q, q, backend="cpu")


def test_use_backend_and_names_choose_what_runs():
    case = Case(seqlen_q=5, seqlen_k=6)
    inputs = case.inputs(torch.float32)
    with fastattn.use_backend("eager"):
        preferred = run(case, inputs, "auto")["out"]
    assert torch.equal(preferred, run(case, inputs, "eager")["out"])
