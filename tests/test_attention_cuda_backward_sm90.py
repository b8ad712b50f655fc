"""The backward of attention on an emulated Hopper: the fused kernel of attention_bwd_sm90.cuh, its order of additions,
and which calls it leaves to the kernels of sm_80."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from attention_cases import FEATURES, Case, assert_views_match_contiguous, check, run
from emulated import MODES, AsyncMode, Mode, Schedule

import fastattn
from fastattn._extension import extension

pytestmark = pytest.mark.skipif(
    fastattn.available_backends()["emulated"] is not None, reason=str(fastattn.available_backends()["emulated"])
)
HALF = [torch.bfloat16, torch.float16]
HEAD_DIMS = [64, 96, 128, 192, 256]
ADVERSARIAL = MODES[1:]


def on_hopper(mode: Mode, multiprocessors: int = 4) -> None:
    mode.apply(compute_capability=90, multiprocessors=multiprocessors)


@pytest.fixture(autouse=True)
def plain_mode_afterwards():
    yield
    torch.use_deterministic_algorithms(False)
    Mode().apply(compute_capability=80, multiprocessors=108)


def resized(name: str, head_dim: int, **changes: int) -> Case:
    case = FEATURES[name]
    narrower = head_dim - 8 if case.head_dim_v is not None else None
    return dataclasses.replace(case, batch=1, heads=2, head_dim=head_dim, head_dim_v=narrower, **changes)


# --- Every variant under every schedule ------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("name", ["causal", "float_mask", "everything"])
def test_every_variant(name, head_dim, mode):
    """Plain, with a mask, with everything; tiles whole, cut by the diagonal, past the end of both lengths."""
    on_hopper(mode)
    case = resized(name, head_dim, seqlen_q=150, seqlen_k=140, heads_kv=None if name == "float_mask" else 1)
    check(case, HALF[mode.seed % 2], "emulated")


@pytest.mark.parametrize("seed", [3, 7, 15, 19])
def test_warps_of_large_heads_race_ahead(seed):
    """Within the warpgroup that multiplies dX, a warp may be a step ahead of another until a barrier holds it."""
    on_hopper(Mode(Schedule.PRIORITY, AsyncMode.RANDOM, seed=seed))
    check(Case(batch=1, heads=1, seqlen_q=400, seqlen_k=64, head_dim=256), torch.float16, "emulated")


@pytest.mark.parametrize("name", FEATURES)
def test_features(name):
    index = list(FEATURES).index(name)
    on_hopper(ADVERSARIAL[index % 3])
    case = dataclasses.replace(FEATURES[name], batch=min(FEATURES[name].batch, 1 + index % 2))
    check(case, HALF[index % 2], "emulated")


@pytest.mark.parametrize(
    "seqlen_q, seqlen_k", [(1, 1), (1, 129), (129, 1), (64, 128), (65, 127), (128, 256), (300, 40)]
)
@pytest.mark.parametrize("head_dim", [40, 72, 128, 136, 256])
def test_odd_lengths(seqlen_q, seqlen_k, head_dim):
    on_hopper(ADVERSARIAL[head_dim % 3])
    case = Case(batch=1, heads=2, seqlen_q=seqlen_q, seqlen_k=seqlen_k, head_dim=head_dim, options={"is_causal": True})
    check(case, HALF[seqlen_q % 2], "emulated")


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_keys_past_the_end_do_not_disturb(head_dim):
    """Scores far below 0: without a mask, exp(0 - lse) of a key that does not exist would be infinite."""
    on_hopper(MODES[1])
    case = Case(batch=1, heads=1, seqlen_q=40, seqlen_k=70, head_dim=head_dim)
    inputs = case.inputs(torch.bfloat16)
    inputs["query"] = torch.full_like(inputs["query"], 8.0)
    inputs["key"] = inputs["key"] - 8.0
    for name, result in run(case, inputs, "emulated").items():
        assert result.isfinite().all(), name


# --- Masks in shared memory ------------------------------------------------------------------------------------------

MASK_SHAPES = {"each": (1, 2, 150, 272), "row": (1, 1, 1, 272)}


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_masks_copied_ahead_match_masks_read_in_place(head_dim, mask_dtype):
    """TMA copies masks whose rows start at multiples of 16 bytes; in longer rows the same mask is read in place."""
    torch.use_deterministic_algorithms(True)
    on_hopper(ADVERSARIAL[head_dim // 32 % 3])
    for shape in MASK_SHAPES.values():
        torch.manual_seed(4)
        noise, tiles = torch.randn(shape), torch.arange(272) // 128
        mask = ((noise > 0) | (tiles == 0)) & (tiles != 2) if mask_dtype == torch.bool else noise.to(mask_dtype)
        odd_rows = torch.zeros(*shape[:-1], 273, dtype=mask_dtype)[..., :272].copy_(mask)
        case = Case(batch=1, heads=2, seqlen_q=150, seqlen_k=272, head_dim=head_dim, options={"is_causal": True,
                    "alignment": "bottom_right"}, tensors={"attn_mask": lambda case, mask=mask: mask})  # fmt: skip
        inputs = case.inputs(torch.float16)
        copied, read = (run(case, {**inputs, "attn_mask": each}, "emulated") for each in (mask, odd_rows))
        for name, result in copied.items():
            assert torch.equal(result, read[name]), (name, shape)
    check(case, torch.float16, "emulated", inputs)


# --- The order of additions to dq ------------------------------------------------------------------------------------

ORDERED = {
    "plain": Case(batch=1, heads=2, seqlen_q=150, seqlen_k=700, head_dim=64),
    "causal_grouped": Case(batch=1, heads=2, heads_kv=1, seqlen_q=300, seqlen_k=300, head_dim=128,
                           options={"is_causal": True}),
    # Both warpgroups' columns of dq, added by six blocks.
    "plain_128": Case(batch=1, heads=2, seqlen_q=150, seqlen_k=700, head_dim=128),
    "window": Case(batch=1, heads=1, seqlen_q=300, seqlen_k=500, head_dim=96, options={"window": (140, 60)}),
    # Four pieces of dq a step, one turn for all.
    "plain_256": Case(batch=1, heads=2, seqlen_q=150, seqlen_k=400, head_dim=256),
    "causal_192": Case(batch=1, heads=2, heads_kv=1, seqlen_q=200, seqlen_k=200, head_dim=192,
                       options={"is_causal": True}),
    # Sums of rows, too, and what is made of them.
    "sinks_96": Case(batch=1, heads=2, seqlen_q=150, seqlen_k=700, head_dim=96,
                     tensors={"sinks": lambda case: torch.randn(case.heads)}),
    "sinks_192": Case(batch=1, heads=2, seqlen_q=100, seqlen_k=400, head_dim=192,
                      tensors={"sinks": lambda case: torch.randn(case.heads)}),
    # Tiles that the mask hides have no turn.
    "hidden_tiles": Case(batch=1, heads=2, seqlen_q=100, seqlen_k=650, head_dim=64,
                         tensors={"attn_mask": lambda case: torch.arange(650) // 128 % 2 == 0}),
}  # fmt: skip


@pytest.mark.parametrize("name", ORDERED)
def test_a_fixed_order_on_request(name):
    """In fp16, whose rounding hides another order of fp32 sums less often than that of bf16."""
    case = ORDERED[name]
    inputs = case.inputs(torch.float16)
    torch.use_deterministic_algorithms(True)
    on_hopper(Mode())
    expected = run(case, inputs, "emulated")
    for mode in (
        Mode(Schedule.PRIORITY, AsyncMode.LAZY, seed=11, os_threads=2),
        Mode(Schedule.UNIFORM, AsyncMode.RANDOM, seed=12, os_threads=3),
    ):
        on_hopper(mode)
        for key, result in run(case, inputs, "emulated").items():
            assert torch.equal(result, expected[key]), f"{key} in {mode}"
    check(case, torch.float16, "emulated")


# --- Few keys: blocks that share the queries of one block of keys ----------------------------------------------------

SHARED = {
    "mqa": Case(batch=1, heads=8, heads_kv=1, seqlen_q=70, seqlen_k=150, head_dim=64, head_dim_v=40),
    # The diagonal gives each block of keys other query tiles, and so other parts.
    "heads_and_queries": Case(batch=1, heads=2, heads_kv=1, seqlen_q=700, seqlen_k=200, head_dim=128,
                              options={"is_causal": True}),
    "dropout": Case(batch=1, heads=8, heads_kv=1, seqlen_q=70, seqlen_k=50, head_dim=96,
                    options={"dropout_p": 0.3, "softcap": 8.0}),
    "mask": Case(batch=1, heads=6, heads_kv=1, seqlen_q=130, seqlen_k=100, head_dim=256, head_dim_v=200,
                 tensors={"attn_mask": lambda case: torch.rand(130, 100) < 0.6}),
    # Most blocks of keys, and most parts of the others, see no query.
    "window": Case(batch=1, heads=16, heads_kv=1, seqlen_q=64, seqlen_k=300, head_dim=40, options={"window": (3, 3)}),
}  # fmt: skip


@pytest.mark.parametrize("name", SHARED)
def test_blocks_that_share_queries(name):
    """As accurate as one block, and in a fixed order on request; the sums of the parts are one more launch."""
    case, launches, results = SHARED[name], [], []
    inputs = case.inputs(torch.float16)
    torch.use_deterministic_algorithms(True)
    racing = Mode(Schedule.PRIORITY, AsyncMode.LAZY, seed=21, os_threads=3)
    for mode, multiprocessors in ((MODES[0], 1), (MODES[0], 40), (racing, 40)):
        on_hopper(mode, multiprocessors)
        before = extension.emulated_launches()
        results.append(check(case, torch.float16, "emulated", inputs))
        launches.append(extension.emulated_launches() - before)
    assert launches[1] == launches[2] == launches[0] + 1
    for key in ("dquery", "dkey", "dvalue"):
        assert torch.equal(results[1][key], results[2][key]), key


# --- What is left to the kernels of sm_80 ----------------------------------------------------------------------------


@pytest.mark.parametrize("head_dim", [64, 136])
def test_expanded_operands(head_dim):
    """TMA takes no rows that coincide: the result is what other cards give."""
    torch.manual_seed(0)
    leaves = [torch.randn(1, 2, 70, head_dim, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]

    def gradients() -> tuple[torch.Tensor, ...]:
        out = fastattn.attention(*leaves, backend="emulated")
        return torch.autograd.grad(out, leaves, torch.ones(1, 1, 1, head_dim, dtype=out.dtype).expand_as(out))

    Mode().apply(compute_capability=80)
    expected = gradients()
    on_hopper(Mode())
    for actual, wanted in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=2e-2, atol=2e-2)


def test_strided_operands_match_contiguous_ones():
    on_hopper(MODES[1])
    torch.manual_seed(0)
    base = torch.randn(2, 65, 3, 3, 64, dtype=torch.float16)
    views = [t.transpose(1, 2) for t in base.unbind(2)]
    dout = torch.randn(2, 65, 3, 64, dtype=torch.float16).transpose(1, 2)
    assert_views_match_contiguous(views, dout)
