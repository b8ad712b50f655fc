"""The CUDA backward of attention, emulated: what only it can get wrong. Features, schedules and tiles with all their
gradients are in test_attention.py and test_attention_cuda.py."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from attention_cases import FEATURES, INF, Case, assert_views_match_contiguous, check, dtype_id, run
from emulated import MODES, AsyncMode, Mode, Schedule
from test_attention_backward import MASK_SHAPES, SIZES

import fastattn
from fastattn._extension import extension

pytestmark = [
    pytest.mark.skipif(
        fastattn.available_backends()["emulated"] is not None, reason=str(fastattn.available_backends()["emulated"])
    ),
    pytest.mark.usefixtures("plain_mode_afterwards"),
]
HALF = [torch.bfloat16, torch.float16]
each_dtype = pytest.mark.parametrize("dtype", HALF, ids=dtype_id)


# --- The gradient of a mask ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("multiprocessors", [1, 64], ids=["whole", "split"])
@pytest.mark.parametrize("shape", MASK_SHAPES, ids="-".join)
def test_mask_gradient_of_every_shape(shape, multiprocessors):
    """Summed by one block a place of the mask, or by several whose sums are added."""
    MODES[1 + len(shape) % 3].apply(multiprocessors=multiprocessors)
    options = [{}, {"is_causal": True}, {"softcap": 3.0, "window": (20, 30)}, {"dropout_p": 0.3}][
        sum(map(len, shape)) % 4
    ]
    case = Case(batch=3, heads=4, heads_kv=2, seqlen_q=70, seqlen_k=131, head_dim=8, options=options,
                tensors={"attn_mask": lambda case: torch.randn([SIZES[name] for name in shape])})  # fmt: skip
    gradient = check(case, HALF[len(shape) % 2], "emulated")["dattn_mask"]
    assert gradient.shape == torch.Size([SIZES[name] for name in shape]) and gradient.is_contiguous()


@pytest.mark.parametrize("dims", [(40, 100), (130, 70), (256, 8)], ids=str)
def test_mask_gradient_at_any_head_dim(dims):
    """Dot products go through 64 columns at a time: one, two, three or four times, and less than 64."""
    case = Case(batch=2, heads=1, seqlen_q=65, seqlen_k=63, head_dim=dims[0], head_dim_v=dims[1],
                tensors={"attn_mask": lambda case: torch.randn(case.seqlen_q, case.seqlen_k)})  # fmt: skip
    check(case, torch.float16, "emulated")


# --- The order of sums -----------------------------------------------------------------------------------------------

ORDER = {
    "causal": dataclasses.replace(FEATURES["causal"], seqlen_q=200, seqlen_k=200),
    "mqa": Case(heads=4, heads_kv=1, seqlen_q=70, seqlen_k=131),
    "everything": FEATURES["everything"],
    "shared_mask": FEATURES["float_mask_2d"],
    "mask_per_key": FEATURES["float_mask_per_key"],
    "sinks": FEATURES["sinks"],
}  # fmt: skip


@pytest.mark.parametrize("name", ORDER)
def test_gradients_are_bitwise_equal_in_every_run(name):
    """Whatever the schedule of threads, and the order in which blocks run."""
    case = ORDER[name]
    inputs = case.inputs(torch.bfloat16)
    Mode().apply()
    expected = run(case, inputs, "emulated")
    for mode in (
        Mode(Schedule.PRIORITY, AsyncMode.LAZY, seed=11, os_threads=2),
        Mode(Schedule.UNIFORM, AsyncMode.RANDOM, seed=12, os_threads=3),
    ):
        mode.apply()
        for key, result in run(case, inputs, "emulated").items():
            assert torch.equal(result, expected[key]), f"{key} in {mode}"


# --- Few keys: blocks that share the queries of one block of keys ----------------------------------------------------

SHARED = {
    "mqa": Case(batch=1, heads=12, heads_kv=1, seqlen_q=70, seqlen_k=150, head_dim=41, head_dim_v=24),
    "gqa_causal": Case(batch=1, heads=14, heads_kv=2, seqlen_q=140, seqlen_k=140, head_dim=16,
                       options={"is_causal": True, "window": (70, 0)}),
    "largest_tile": Case(batch=1, heads=12, heads_kv=1, seqlen_q=70, seqlen_k=100, head_dim=72),
    # The largest tile of this head_dim does not share queries, and another takes its place.
    "another_tile": Case(batch=1, heads=12, heads_kv=1, seqlen_q=70, seqlen_k=100, head_dim=104),
    "one_head": Case(batch=1, heads=1, seqlen_q=1100, seqlen_k=20, head_dim=8, head_dim_v=16),
    "heads_and_queries": Case(batch=1, heads=3, heads_kv=1, seqlen_q=600, seqlen_k=40, head_dim=16,
                              options={"is_causal": True}),
    "dropout_mask": Case(batch=1, heads=10, heads_kv=1, seqlen_q=100, seqlen_k=70, head_dim=16,
                         options={"dropout_p": 0.3}, tensors={"attn_mask": lambda case: torch.rand(100, 70) < 0.6}),
}  # fmt: skip


@each_dtype
@pytest.mark.parametrize("name", SHARED)
def test_blocks_that_share_queries(name, dtype):
    """As accurate as one block, and the same bits in any schedule; the sums of the parts are one more launch."""
    case, launches, results = SHARED[name], [], []
    inputs = case.inputs(dtype)
    for mode, multiprocessors in ((MODES[0], 1), (MODES[0], 40), (MODES[2], 40)):
        mode.apply(multiprocessors=multiprocessors)
        before = extension.emulated_launches()
        results.append(check(case, dtype, "emulated", inputs))
        launches.append(extension.emulated_launches() - before)
    assert launches[1] == launches[2] == launches[0] + 1
    assert all(torch.equal(results[1][key], results[2][key]) for key in ("dquery", "dkey", "dvalue"))


@pytest.mark.parametrize("parts", [2, 40])
def test_parts_without_a_visible_query_are_zero(parts):
    """The band leaves the last keys to no query at all, and of the others one part has every query."""
    Mode().apply(multiprocessors=parts)
    case = Case(batch=1, heads=16, heads_kv=1, seqlen_q=64, seqlen_k=300, head_dim=8, options={"window": (3, 3)})
    results = check(case, torch.float16, "emulated")
    assert not results["dkey"][:, :, 70:].any() and not results["dvalue"][:, :, 70:].any()


# --- Shapes, strides, rows without keys ------------------------------------------------------------------------------


@pytest.mark.parametrize("heads_kv", [1, 3])
@pytest.mark.parametrize("seqlen_q, seqlen_k", [(1, 1), (1, 97), (97, 1), (63, 65), (64, 128), (65, 63), (129, 193)])
def test_odd_lengths_of_grouped_heads(seqlen_q, seqlen_k, heads_kv):
    MODES[1].apply()
    case = Case(batch=1, heads=3, heads_kv=heads_kv, seqlen_q=seqlen_q, seqlen_k=seqlen_k, options={"is_causal": True})
    check(case, HALF[seqlen_q % 2], "emulated")


@pytest.mark.parametrize("seqlen_q, seqlen_k", [(0, 5), (5, 0), (0, 0)])
def test_no_rows_or_no_keys_give_zero_gradients(seqlen_q, seqlen_k):
    case = Case(seqlen_q=seqlen_q, seqlen_k=seqlen_k, tensors={"attn_mask": lambda case: torch.randn(1)})
    results = run(case, case.inputs(torch.float16), "emulated")
    for name in ("dquery", "dkey", "dvalue", "dattn_mask"):
        assert torch.equal(results[name], torch.zeros_like(results[name])), name


def test_strided_operands_match_contiguous_ones():
    torch.manual_seed(0)
    base = torch.randn(2, 65, 3, 3, 24, dtype=torch.float16)
    views = [t.transpose(1, 2) for t in base.unbind(2)]
    views[2] = views[2].transpose(2, 3).contiguous().transpose(2, 3)  # the last dim is not contiguous
    dout = torch.randn(1, 1, 1, 24, dtype=torch.float16).expand(2, 3, 65, 24)
    assert_views_match_contiguous(views, dout)


@pytest.mark.parametrize("additive", [False, True])
def test_rows_that_see_nothing_have_zero_gradients(additive):
    torch.manual_seed(0)
    mask = torch.ones(70, 80, dtype=torch.bool)
    mask[::2] = False
    attn_mask = torch.zeros(70, 80).masked_fill(~mask, -INF).requires_grad_() if additive else mask
    leaves = [torch.randn(1, 2, n, 16, dtype=torch.bfloat16, requires_grad=True) for n in (70, 80, 80)]
    out, lse = fastattn.attention(*leaves, attn_mask, return_lse=True, backend="emulated")
    gradients = torch.autograd.grad(out.sum() + lse.sum(), [*leaves, attn_mask] if additive else leaves)
    assert all(gradient.isfinite().all() for gradient in gradients)
    for gradient in gradients[:: len(leaves)]:  # of queries, and of the mask
        assert torch.equal(gradient[..., ::2, :], torch.zeros_like(gradient[..., ::2, :]))
    assert gradients[0][..., 1::2, :].any()


SKIPS = {
    "key_padding": {"attn_mask": torch.arange(320) < 100},
    "additive_padding": {"attn_mask": torch.zeros(320).masked_fill(torch.arange(320) >= 100, -INF)},
    "dense_mask": {"attn_mask": (torch.arange(320) < 100).expand(320, 320).contiguous()},
}  # fmt: skip


@pytest.mark.parametrize("kind", SKIPS)
def test_tiles_without_visible_keys_are_not_read(kind):
    """NaN in hidden keys would reach every dq, since 0 * NaN is NaN, if their tile were visited."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 4, 320, 64, dtype=torch.bfloat16) for _ in range(3))
    k[:, :, 128:] = v[:, :, 128:] = float("nan")
    leaves = [t.requires_grad_() for t in (q, k, v)]
    out = fastattn.attention(*leaves, **SKIPS[kind], backend="emulated")
    for gradient in torch.autograd.grad(out, leaves, torch.ones_like(out)):
        assert gradient.isfinite().all()
    assert torch.equal(gradient[:, :, 128:], torch.zeros_like(gradient[:, :, 128:]))
