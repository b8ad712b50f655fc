"""Attention's Triton kernels: as accurate as eager for every feature.

Without a GPU they run in Triton's interpreter, at shapes just large enough to have tiles of every kind: hidden, cut,
seen in full; its tiles are 32 x 32.
"""

from __future__ import annotations

import pytest
import torch
from attention_cases import FEATURES, Case, check, dtype_id, run, small_case
from attention_cases import TRITON_TILE as TILE

import fastattn
from fastattn import _triton
from fastattn.ops import attention_triton as face
from fastattn.ops.attention import attention_and_weights

pytestmark = pytest.mark.skipif(
    fastattn.available_backends()["triton"] is not None, reason=f"no triton: {fastattn.available_backends()['triton']}"
)
DEVICE = "cpu" if _triton.is_interpreted() else "cuda"
INF = float("inf")
HALF = [torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def on_the_device():
    with torch.device(DEVICE):
        yield


def _here(options: dict) -> dict:
    """Tensors that were made when this file was imported, on the device."""
    return {name: value.to(DEVICE) if isinstance(value, torch.Tensor) else value for name, value in options.items()}


# --- The matrix ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("feature", FEATURES)
def test_feature_matches_eager(feature):
    check(small_case(feature), torch.float32, "triton")


@pytest.mark.parametrize("dtype", HALF, ids=dtype_id)
@pytest.mark.parametrize("feature", ["plain", "causal_bottom_right_empty_rows", "float_mask_bfloat16", "everything"])
def test_half_precision(feature, dtype):
    check(small_case(feature), dtype, "triton")


@pytest.mark.parametrize(
    "seqlens", [(0, 5), (5, 0), (0, 0), (1, 1), (1, 65), (33, 1), (32, 64), (65, 31)], ids=lambda s: f"{s[0]}x{s[1]}"
)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_seqlens(seqlens, causal):
    options = {"is_causal": causal, "alignment": "bottom_right"}
    case = Case(batch=1, heads=2, seqlen_q=seqlens[0], seqlen_k=seqlens[1], head_dim=8, options=options)
    check(case, torch.float32, "triton")


@pytest.mark.parametrize("dims", [(1, 1), (7, 33), (64, 64), (80, 72), (128, 16), (256, 255)], ids=str)
def test_head_dims(dims):
    case = Case(batch=1, heads=1, seqlen_q=20, seqlen_k=40, head_dim=dims[0], head_dim_v=dims[1])
    check(case, torch.float16, "triton")


@pytest.mark.parametrize("dims", [(64, 33), (80, 72)], ids=str)
def test_head_dims_in_slices(dims):
    """float32 is multiplied 32 of head_dim at a time, forward and backward; (80, 72) ends inside a slice."""
    case = Case(
        batch=1, heads=1, seqlen_q=20, seqlen_k=40, head_dim=dims[0], head_dim_v=dims[1],
        tensors={"attn_mask": lambda _: torch.randn(20, 40)},
    )  # fmt: skip
    check(case, torch.float32, "triton")


@pytest.mark.parametrize(("batch", "heads"), [(0, 2), (2, 0), (3, 5)])
def test_batches_and_heads(batch, heads):
    check(Case(batch=batch, heads=heads, seqlen_q=9, seqlen_k=12, head_dim=8), torch.float32, "triton")


MASK_SHAPES = [("b", "h", "q", "k"), ("1", "h", "q", "k"), ("b", "1", "q", "k"), ("q", "k"), ("b", "h", "1", "k"),
               ("b", "1", "1", "k"), ("k",), ("h", "q", "1"), ("q", "1"), ("b", "1", "1", "1"), ()]  # fmt: skip


@pytest.mark.parametrize("shape", MASK_SHAPES, ids=lambda shape: "-".join(shape) or "scalar")
def test_mask_gradient_is_summed_over_what_the_mask_shares(shape):
    sizes = {"b": 2, "h": 2, "q": 33, "k": 65, "1": 1}
    case = Case(batch=2, heads=2, heads_kv=1, seqlen_q=33, seqlen_k=65, head_dim=4, options={"softcap": 3.0},
                tensors={"attn_mask": lambda case: torch.randn([sizes[name] for name in shape])})  # fmt: skip
    gradient = check(case, torch.float32, "triton")["dattn_mask"]
    assert gradient.shape == torch.Size([sizes[name] for name in shape]) and gradient.is_contiguous()


def test_few_mask_tiles_shared_by_many_heads_are_split_and_added(monkeypatch):
    from fastattn.ops import attention_triton_plan as plan

    case = Case(
        batch=5, heads=3, seqlen_q=5, seqlen_k=6, head_dim=4, tensors={"attn_mask": lambda _: torch.randn(5, 6)}
    )
    whole = check(case, torch.float32, "triton")["dattn_mask"]
    # 15 (batch, head) among 4 programs: 4, 4, 4 and 3.
    monkeypatch.setattr(plan, "_DMASK_PROGRAMS", 4)
    torch.testing.assert_close(check(case, torch.float32, "triton")["dattn_mask"], whole)
    monkeypatch.setattr(plan, "_DMASK_PROGRAMS", 1)
    torch.testing.assert_close(check(case, torch.float32, "triton")["dattn_mask"], whole)


@pytest.mark.parametrize("feature", ["plain", "causal", "gqa_dropout_mask", "wide_values", "everything"])
def test_dk_and_dv_in_two_launches(feature, monkeypatch):
    """As where the registers do not hold both sums: one launch writes dv, the other, in other tiles, dk."""
    from fastattn.ops import attention_triton_plan as plan
    from fastattn.ops.attention_triton_tiles import Tile

    planned = []
    plan_dkdv = plan.plan_dkdv

    def recorded(*arguments):
        planned.extend(launches := plan_dkdv(*arguments))
        return launches

    monkeypatch.setattr(plan.tiles, "dkdv", lambda *_: (Tile(32, 32, 4, 1), Tile(16, 64, 4, 1)))
    monkeypatch.setattr(plan, "plan_dkdv", recorded)
    check(small_case(feature), torch.float32, "triton")
    made = [(x.arguments["DK"], x.arguments["DV"]) for x in planned if x.kernel.__name__ == "attention_dkdv_kernel"]
    assert made == [(False, True), (True, False)]


# --- Tiles that are not visited --------------------------------------------------------------------------------------


def _poisoned(position: slice) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """NaN in the keys and values at ``position``: a tile that is visited, even with probability 0, shows."""
    q, k, v = torch.randn(1, 2, 40, 16), torch.randn(1, 2, 5 * TILE, 16), torch.randn(1, 2, 5 * TILE, 16)
    k[:, :, position] = v[:, :, position] = float("nan")
    return tuple(tensor.requires_grad_() for tensor in (q, k, v))


KEY_PADDING = torch.arange(5 * TILE) < 2 * TILE + 6
FLOAT_PADDING = torch.zeros(5 * TILE).masked_fill(~KEY_PADDING, -INF)
SKIPPED = {
    # The keys that no tile of the visible ones reaches; tiles start at multiples of their size.
    "causal": ({"is_causal": True}, slice(2 * TILE, None)),
    "window": ({"window": (8, 8), "alignment": "bottom_right"}, slice(0, 3 * TILE)),
    "window_right": ({"window": (-1, 8)}, slice(2 * TILE, None)),
    "bool_padding_right": ({"attn_mask": KEY_PADDING}, slice(3 * TILE, None)),
    "bool_padding_left": ({"attn_mask": ~KEY_PADDING}, slice(0, 2 * TILE)),
    "float_padding": ({"attn_mask": FLOAT_PADDING}, slice(3 * TILE, None)),
    "causal_padding": ({"attn_mask": ~KEY_PADDING, "is_causal": True, "alignment": "bottom_right"}, slice(0, 2 * TILE)),
}


@pytest.mark.parametrize("name", SKIPPED)
def test_hidden_tiles_are_not_visited(name):
    options, hidden = _here(SKIPPED[name][0]), SKIPPED[name][1]
    q, k, v = _poisoned(hidden)
    out = fastattn.attention(q, k, v, **options, backend="triton")
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), torch.randn_like(out))
    assert out.isfinite().all() and dq.isfinite().all()
    assert (dk[:, :, hidden] == 0).all() and (dv[:, :, hidden] == 0).all()
    assert dk.isfinite().all() and dv.isfinite().all()


@pytest.mark.parametrize("keys", [1, 33, 65])
@pytest.mark.parametrize("side", ["right", "left"])
def test_key_padding_that_ends_one_key_into_a_tile(side, keys):
    visible = torch.arange(97) < keys
    mask = visible if side == "right" else visible.flip(0)
    case = Case(batch=1, heads=1, seqlen_q=5, seqlen_k=97, head_dim=8, tensors={"attn_mask": lambda _: mask})
    check(case, torch.float32, "triton")


# --- Rows that see nothing, dropout, weights -------------------------------------------------------------------------

EMPTY_ROWS = {
    "bool_mask": {"attn_mask": (torch.arange(9) > 2)[:, None].expand(9, 12)},
    "float_mask": {"attn_mask": torch.zeros(9, 1).masked_fill(torch.arange(9)[:, None] <= 2, -INF)},
    "causal": {"is_causal": True, "alignment": "bottom_right"},
}


@pytest.mark.parametrize("name", EMPTY_ROWS)
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_rows_that_see_nothing_are_zero(dropout_p, name):
    seqlen_k = 6 if name == "causal" else 12
    q, k, v = (torch.randn(2, 2, n, 8).half().requires_grad_() for n in (9, seqlen_k, seqlen_k))
    out, lse = fastattn.attention(
        q, k, v, dropout_p=dropout_p, return_lse=True, backend="triton", **_here(EMPTY_ROWS[name])
    )  # fmt: skip
    assert (out[:, :, :3] == 0).all() and (lse[:, :, :3] == -INF).all() and (lse[:, :, 3:] > -INF).all()
    gradients = torch.autograd.grad((out, lse), (q, k, v), (torch.full_like(out, 1e2), torch.ones_like(lse)))
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert (gradients[0][:, :, :3] == 0).all()


def test_a_gradient_of_lse_stops_at_rows_that_see_nothing():
    """Their lse is -inf, and what is made of that often has a gradient of NaN."""
    q, k, v = (torch.randn(1, 2, n, 8, requires_grad=True) for n in (9, 12, 12))
    out, lse = fastattn.attention(q, k, v, **_here(EMPTY_ROWS["bool_mask"]), return_lse=True, backend="triton")
    dlse = torch.randn_like(lse)
    cotangents = torch.randn_like(out), dlse
    expected = torch.autograd.grad((out, lse), (q, k, v), cotangents, retain_graph=True)
    dlse[:, :, :3] = float("nan")
    for gradient, other in zip(torch.autograd.grad((out, lse), (q, k, v), cotangents), expected, strict=True):
        assert torch.equal(gradient, other)


@pytest.mark.parametrize("seqlen_k", [0, 4], ids=["no_keys", "hidden_keys"])
def test_rows_that_see_only_a_sink(seqlen_k):
    q = torch.randn(1, 2, 4, 8, requires_grad=True)
    k = torch.randn(1, 2, seqlen_k, 8)
    sinks = torch.tensor([1.5, -INF], requires_grad=True)
    mask = torch.zeros(4, seqlen_k, dtype=torch.bool)
    out, lse = fastattn.attention(q, k, k, mask, sinks=sinks, return_lse=True, backend="triton")
    assert (out == 0).all() and torch.equal(lse, sinks.detach()[None, :, None].expand(1, 2, 4))
    dq, dsinks = torch.autograd.grad((out, lse), (q, sinks), (torch.ones_like(out), torch.ones_like(lse)))
    assert (dq == 0).all() and torch.equal(dsinks, torch.tensor([4.0, 0.0]))


@pytest.mark.parametrize("dropout_p", [0.1, 0.999])
def test_drops_exactly_the_elements_that_eager_drops(dropout_p):
    """With value = identity the output is the probabilities: dropped ones are exactly 0."""
    q, k = torch.randn(2, 3, 40, 8), torch.randn(2, 3, 97, 8)
    v = torch.eye(97).expand(2, 3, 97, 97)
    torch.manual_seed(7)
    kept = fastattn.attention(q, k, v, dropout_p=dropout_p, backend="triton") != 0
    torch.manual_seed(7)
    assert torch.equal(kept, fastattn.attention(q, k, v, dropout_p=dropout_p, backend="eager") != 0)


WEIGHTS = {
    "plain": {},
    "causal": {"is_causal": True, "dropout_p": 0.3},
    "window": {"window": (4, 4)},
    "mask": {"attn_mask": torch.randn(4, 33, 40)},
}


@pytest.mark.parametrize("average_heads", [False, True])
@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
def test_weights_belong_to_the_output(name, average_heads, dtype):
    options = _here(WEIGHTS[name])
    q, k, v = (torch.randn(2, h, n, 16).to(dtype).requires_grad_() for h, n in ((4, 33), (2, 40), (2, 40)))
    torch.manual_seed(3)
    _, weights = attention_and_weights(q, k, v, **options, average_heads=average_heads, backend="triton")
    torch.manual_seed(3)
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    _, exact = attention_and_weights(*wide, **options, average_heads=average_heads, backend="eager")
    assert weights.dtype == dtype
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(weights.double(), exact, rtol=tolerance, atol=tolerance)
    cotangent = torch.randn(weights.shape).to(dtype)
    gradients = torch.autograd.grad(weights, (q, k), cotangent)
    expected = torch.autograd.grad(exact, wide[:2], cotangent.double())
    for gradient, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient.double(), other, rtol=8 * tolerance, atol=16 * tolerance)


@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_weights_can_be_put_into_a_loss(softcap):
    """Through lse as well: the softmax's derivative is the sum of the two."""
    q, k, v = (torch.randn(2, heads, 9, 8, requires_grad=True) for heads in (4, 2, 2))
    bias = torch.randn(4, 1, 9, requires_grad=True)
    shared = (0.0, False, 0.4, -1, -1, False, softcap)
    _, lse = torch.ops.fastattn.attention_triton(q, k, v, bias, None, None, None, *shared)
    weights = torch.ops.fastattn.attention_triton_weights(q, k, lse, bias, None, None, *shared, False)
    scores = 0.4 * q @ k.repeat_interleave(2, 1).mT
    expected = ((softcap * torch.tanh(scores / softcap) if softcap else scores) + bias).softmax(-1)
    torch.testing.assert_close(weights, expected)
    cotangent = torch.randn_like(weights)
    for a, b in zip(*(torch.autograd.grad(w, (q, k, bias), cotangent) for w in (weights, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# --- Magnitudes, strides, layouts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=dtype_id)
def test_scores_of_ten_thousand(dtype):
    """exp overflows at 89 in float32: only differences to the largest score may reach it."""
    q, k, v = ((2 * torch.randn(1, 2, n, 16)).round().clamp(-4, 4).to(dtype) for n in (40, 70, 70))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, lse = fastattn.attention(*leaves, scale=1000.0, return_lse=True, backend="triton")
    exact = fastattn.attention(*(x.detach().double() for x in leaves), scale=1000.0, return_lse=True, backend="eager")
    assert exact[1].abs().max() > 1e4
    torch.testing.assert_close(
        (out.double(), lse.double()), exact, rtol=1e-3 if dtype is torch.float16 else 1e-6, atol=0
    )
    cotangents = torch.randn_like(out), torch.randn_like(lse)
    assert all(x.isfinite().all() for x in torch.autograd.grad((out, lse), leaves, cotangents))


def test_masks_of_the_lowest_finite_number():
    """The other way to write -inf: hides a key, and a row that has nothing else attends to all keys equally."""
    mask = torch.zeros(30, 40)
    mask[:, 20:] = mask[7] = torch.finfo(torch.float32).min
    case = Case(batch=1, heads=2, seqlen_q=30, seqlen_k=40, head_dim=16, tensors={"attn_mask": lambda case: mask})
    inputs = case.inputs(torch.float32)
    out, lse = fastattn.attention(**inputs, return_lse=True, backend="triton")
    torch.testing.assert_close(out, run(case, inputs, "eager")["out"])
    torch.testing.assert_close(out[:, :, 7], inputs["value"].mean(dim=2))
    assert lse.isfinite().all() and all(result.isfinite().all() for result in run(case, inputs, "triton").values())


def test_hidden_keys_with_nan_scores_leave_the_output_alone():
    q, k, v = (torch.randn(1, 2, 70, 16) for _ in range(3))
    mask = torch.rand(70, 70) < 0.5
    mask[:, 37:] = False
    expected = fastattn.attention(q, k, v, mask, backend="triton")
    k[:, :, 37:] = float("nan")
    torch.testing.assert_close(fastattn.attention(q, k, v, mask, backend="triton"), expected, rtol=0, atol=0)


def _slice_of_packed(x):
    """One third of a packed (batch, seqlen, 3, heads, head_dim) projection."""
    packed = torch.full((x.shape[0], x.shape[2], 3, x.shape[1], x.shape[3]), float("nan"), dtype=x.dtype)
    packed[:, :, 1] = x.transpose(1, 2)
    return packed[:, :, 1].transpose(1, 2)


def _offset(x):
    """Starts one element into its memory, so that no row is aligned."""
    return torch.full((x.numel() + 1,), float("nan"), dtype=x.dtype)[1:].view(x.shape).copy_(x)


def _columns(x):
    return x.mT.contiguous().mT


@pytest.mark.parametrize("view", [_slice_of_packed, _offset, _columns])
def test_strides(view):
    case = small_case("float_mask")
    inputs = case.inputs(torch.float32)
    if view is _slice_of_packed:
        views = {name: view(tensor) if tensor.shape[1] == case.heads else tensor for name, tensor in inputs.items()}
    else:
        views = {name: view(tensor) for name, tensor in inputs.items()}
    assert all(torch.equal(views[name], inputs[name]) for name in inputs)
    check(case, torch.float32, "triton", views)


@pytest.mark.parametrize("slopes_shape", [(2,), (1, 2)], ids=["heads", "batch_heads"])
def test_slopes_and_sinks_in_the_columns_of_a_table(slopes_shape):
    inputs = {"alibi_slopes": lambda case: torch.rand(slopes_shape), "sinks": lambda case: torch.randn(2)}
    case = Case(batch=1, heads=2, seqlen_q=20, seqlen_k=40, head_dim=16, tensors=inputs)
    dense = case.inputs(torch.float32)
    views = {name: x if x.dim() == 4 else x[..., None].repeat_interleave(3, -1)[..., 0] for name, x in dense.items()}
    assert views["sinks"].stride(0) == views["alibi_slopes"].stride(-1) == 3
    check(case, torch.float32, "triton", views)


def test_rows_too_far_apart_for_32_bits_are_copied():
    near, far = (torch.empty_strided((1, 1, 2, 8), (1, 1, stride, 1)) for stride in (2**10, 2**24))
    assert face.rows_of(near) is near and face.rows_of(far).stride(2) == 8
    mask = torch.empty_strided((2, 8), (2**24, 1))
    assert face._addressable(mask).stride(0) == 8 and face._addressable(mask[0]).data_ptr() == mask.data_ptr()
    for one_row_or_key in (mask[:1], mask[:1].T):
        assert face._addressable(one_row_or_key) is one_row_or_key


def test_outputs_and_gradients_take_the_layout_of_their_inputs():
    inputs = [torch.randn(2, 33, 3, 16).transpose(1, 2).requires_grad_() for _ in range(3)]
    out = fastattn.attention(*inputs, backend="triton")
    assert out.transpose(1, 2).is_contiguous()
    # A gradient that arrives expanded, with strides 0.
    for gradient in torch.autograd.grad(out.sum(), inputs):
        assert gradient.transpose(1, 2).is_contiguous()


def test_results_are_bitwise_the_same_at_every_run():
    case = small_case("everything")
    inputs = case.inputs(torch.float16)
    first, second = run(case, inputs, "triton"), run(case, inputs, "triton")
    assert all(torch.equal(first[name], second[name]) for name in first)
