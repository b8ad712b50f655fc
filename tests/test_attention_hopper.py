"""The forward attention kernel of Hopper, emulated: every feature and tile under harsh schedules, persistent blocks."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from accuracy import assert_as_accurate_as_eager
from attention_cases import FEATURES, Case, dtype_id
from emulated import MODES, Mode, emulated_library, hopper

import fastattn

pytestmark = [
    pytest.mark.skipif(
        fastattn.available_backends()["emulated"] is not None, reason=str(fastattn.available_backends()["emulated"])
    ),
    pytest.mark.usefixtures("plain_mode_afterwards"),
]
HALF = [torch.bfloat16, torch.float16]
HEAD_DIMS = (40, 64, 96, 128, 192, 256)
each_harsh_mode = pytest.mark.parametrize("mode", MODES[1:], ids=str)


def forward(case: Case, inputs: dict[str, torch.Tensor], backend: str, wide: bool = False) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(2)
    inputs = {name: t.double() if wide and t.is_floating_point() else t for name, t in inputs.items()}
    return fastattn.attention(
        **inputs, enable_gqa=case.heads_kv is not None, return_lse=True, backend=backend, **case.options
    )


def check_forward(case: Case, dtype: torch.dtype, inputs: dict[str, torch.Tensor] | None = None) -> None:
    inputs = case.inputs(dtype) if inputs is None else inputs
    actual, eager = forward(case, inputs, "emulated"), forward(case, inputs, "eager")
    reference = forward(case, inputs, "eager", wide=True)
    for name, *results in zip(("out", "lse"), actual, eager, reference, strict=True):
        assert_as_accurate_as_eager(*results, name)


# --- Features --------------------------------------------------------------------------------------------------------


@each_harsh_mode
@pytest.mark.parametrize("feature", FEATURES)
def test_feature_under_harsh_schedules(feature, mode):
    """Head dims, dtypes and lengths take turns: one row tile or two, and several key tiles."""
    hopper(mode)
    case, turn = FEATURES[feature], list(FEATURES).index(feature) + mode.seed
    seqlens = {"seqlen_q": max(case.seqlen_q, 65) + 70 * (turn % 2), "seqlen_k": case.seqlen_k + 100}
    heads = {"heads": 2, "heads_kv": None if case.heads_kv is None else 1}
    case = dataclasses.replace(case, head_dim=HEAD_DIMS[turn % len(HEAD_DIMS)], **seqlens, **heads)
    check_forward(case, HALF[turn // 2 % 2])


SEES_NOTHING = {
    "mask": Case(tensors={"attn_mask": lambda case: torch.zeros(1, 1, dtype=torch.bool)}),
    "causal": Case(seqlen_k=20, options={"is_causal": True, "alignment": "bottom_right"}),
    "window": Case(seqlen_k=40, options={"window": (8, 8)}),
}


@each_harsh_mode
@pytest.mark.parametrize("head_dim", [64, 256])
@pytest.mark.parametrize("kind", SEES_NOTHING)
def test_row_tiles_that_see_nothing(kind, head_dim, mode):
    """Between row tiles that see something: they take no stage of the rings, and give q back all the same."""
    hopper(mode)
    check_forward(dataclasses.replace(SEES_NOTHING[kind], heads=2, seqlen_q=300, head_dim=head_dim), torch.float16)


# --- Tiles -----------------------------------------------------------------------------------------------------------

KINDS = {
    "plain": ({}, {}),
    "mask": ({}, {"attn_mask": lambda case: torch.randn(case.seqlen_q, case.seqlen_k)}),
    "everything": ({"softcap": 5.0, "dropout_p": 0.2}, {}),
}


@pytest.mark.parametrize("dims", [(64, 64), (96, 88), (72, 128), (192, 128), (256, 256)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_every_tile(dims, kind, is_causal):
    """More key tiles than the rings have stages, lengths that leave parts of the tiles empty."""
    hopper(MODES[1 + sum(dims) // 8 % 3])
    options, tensors = KINDS[kind]
    case = Case(batch=1, heads=1, seqlen_q=150, seqlen_k=400, head_dim=dims[0], head_dim_v=dims[1],
                options={"is_causal": is_causal, "alignment": "bottom_right", **options}, tensors=tensors)  # fmt: skip
    check_forward(case, HALF[is_causal])


@pytest.mark.parametrize("dtype", HALF, ids=dtype_id)
@pytest.mark.parametrize("options", [{}, {"softcap": 60.0}], ids=["plain", "everything"])
def test_scores_that_grow_from_tile_to_tile(options, dtype):
    """The running maximum rises by more than its slack in every tile, so that all that was summed is rescaled."""
    hopper(MODES[2])
    case = Case(batch=1, heads=1, seqlen_q=70, seqlen_k=400, head_dim=64, options={"scale": 1.0, **options})
    inputs = case.inputs(dtype)
    inputs["query"].abs_()
    inputs["key"] = (inputs["key"].abs() * torch.linspace(0, 1, 400)[:, None]).to(dtype)
    check_forward(case, dtype, inputs)


# --- Masks in shared memory ------------------------------------------------------------------------------------------

MASK_SHAPES = {"each": (2, 2, 70, 272), "heads": (1, 2, 70, 272), "row": (2, 1, 1, 272)}


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.float32, *HALF], ids=dtype_id)
@pytest.mark.parametrize("head_dim", [64, 96, 128, 192, 256])
def test_masks_copied_ahead_match_masks_read_in_place(head_dim, mask_dtype):
    """TMA copies masks whose rows start at multiples of 16 bytes; the same mask in longer rows is read where it lies.
    Whole tiles that are hidden or change nothing take no stage."""
    hopper(MODES[1 + head_dim // 32 % 3])
    for shape in MASK_SHAPES.values():
        torch.manual_seed(4)
        noise = torch.randn(shape)
        tiles = torch.arange(272) // 128
        mask = ((noise > 0) | (tiles == 0)) & (tiles != 2) if mask_dtype == torch.bool else noise.to(mask_dtype)
        odd_rows = torch.zeros(*shape[:-1], 273, dtype=mask_dtype)[..., :272].copy_(mask)
        case = Case(batch=2, heads=2, seqlen_q=70, seqlen_k=272, head_dim=head_dim, options={"is_causal": True,
                    "alignment": "bottom_right"}, tensors={"attn_mask": lambda case, mask=mask: mask})  # fmt: skip
        dtype = torch.float16 if mask_dtype == torch.float16 else torch.bfloat16
        inputs = case.inputs(dtype)
        copied, read = (forward(case, {**inputs, "attn_mask": each}, "emulated") for each in (mask, odd_rows))
        assert all(map(torch.equal, copied, read)), shape
    check_forward(case, dtype, inputs)


# --- Heads packed into rows ------------------------------------------------------------------------------------------

PACKED = {
    "plain": ({"is_causal": True, "alignment": "bottom_right"}, {}),
    "sinks": ({"window": (60, 90)}, {"sinks": lambda case: torch.randn(case.heads)}),
    "mask": ({}, {"attn_mask": lambda case: torch.randn(case.heads, case.seqlen_q, case.seqlen_k)}),
    "padding": ({}, {"attn_mask": lambda case: torch.arange(case.seqlen_k) < torch.tensor([[[[40]]], [[[101]]]])}),
    "everything": ({"softcap": 4.0, "dropout_p": 0.2}, {"alibi_slopes": lambda case: torch.rand(case.heads)}),
}


@each_harsh_mode
@pytest.mark.parametrize("kind", PACKED)
@pytest.mark.parametrize("group, seqlen_q", [(2, 35), (4, 33), (8, 20), (32, 5), (64, 3)])
def test_packed_heads(group, seqlen_q, kind, mode):
    """Heads that share k and v become rows of a tile unless a mask has rows; then they do in the other kernel."""
    hopper(mode)
    options, tensors = PACKED[kind]
    case = Case(batch=2, heads=2 * group, heads_kv=2, seqlen_q=seqlen_q, seqlen_k=112,
                head_dim=HEAD_DIMS[(group + mode.seed) % len(HEAD_DIMS)], options=options, tensors=tensors)  # fmt: skip
    check_forward(case, HALF[mode.seed % 2])


# --- Persistent blocks -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_blocks_schedules_and_seeds_change_no_bit(head_dim):
    """Each row tile is computed once, by whichever block: the rings, their phases and the turns carry over."""
    case = Case(batch=2, heads=3, heads_kv=1, seqlen_q=210, seqlen_k=230, head_dim=head_dim,
                options={"is_causal": True})  # fmt: skip
    inputs = case.inputs(torch.bfloat16)
    hopper()
    expected = forward(case, inputs, "emulated")
    for seed, multiprocessors in enumerate((1, 2, 5, 7, 12)):
        hopper(dataclasses.replace(MODES[1 + seed % 3], seed=10 + seed), multiprocessors)
        assert all(map(torch.equal, forward(case, inputs, "emulated"), expected)), multiprocessors
    check_forward(case, torch.bfloat16, inputs)


@pytest.mark.parametrize("seqlen", [512, 1024, 2048, 4096, 8192, 16384])
@pytest.mark.parametrize("tokens, heads", [(16384, 16), (16384, 32), (32768, 12)])
def test_blocks_share_the_causal_triangle_evenly(seqlen, tokens, heads):
    """On the 132 multiprocessors of an H100, at head_dim 128. An order that jumps back to the longest row tiles from
    one section of heads to the next gives some blocks 1.7 times the mean at 16384."""
    batch, row_tiles = tokens // seqlen, seqlen // 128
    work, visits = torch.zeros(132, dtype=torch.int32), torch.zeros(batch * heads * row_tiles, dtype=torch.int32)
    emulated_library().call("attention_order", batch, heads, row_tiles, 128, 4 * seqlen * 128, 132, work, visits)
    assert visits.eq(1).all()
    assert work.max() <= 1.09 * work.float().mean()


# --- What the kernel leaves to others --------------------------------------------------------------------------------


def runs_as_on_sm80(case: Case, inputs: dict[str, torch.Tensor] | None = None) -> bool:
    """Whether a mask, for which all cards share one sm_80 tile, gives the same bits: Hopper's tiles are larger."""
    inputs = case.inputs(torch.float16) if inputs is None else inputs
    results = []
    for compute_capability in (80, 90):
        Mode().apply(compute_capability=compute_capability, multiprocessors=1)
        results.append(forward(case, inputs, "emulated")[0])
    check_forward(case, torch.float16, inputs)
    return torch.equal(*results)


MASK = {"attn_mask": lambda case: torch.randn(case.seqlen_q, case.seqlen_k)}
MASKED = Case(batch=2, heads=2, seqlen_q=65, seqlen_k=200, head_dim=64, tensors=MASK)


def test_which_calls_the_kernel_serves():
    assert not runs_as_on_sm80(MASKED)
    assert not runs_as_on_sm80(dataclasses.replace(MASKED, head_dim=33, head_dim_v=40)), "copied to aligned rows"
    assert runs_as_on_sm80(dataclasses.replace(MASKED, seqlen_q=64)), "half of its tile would be idle"
    assert runs_as_on_sm80(dataclasses.replace(MASKED, head_dim_v=33)), "TMA cannot write such rows"


def test_views_are_read_where_they_lie():
    inputs = MASKED.inputs(torch.float16)
    packed = torch.randn(2, 200, 3, 2, 64).half()
    query, key, value = packed.permute(2, 0, 3, 1, 4)
    assert not runs_as_on_sm80(MASKED, {**inputs, "query": query[:, :, 3:68], "key": key, "value": value})
    expanded = {**inputs, "key": inputs["key"][:, :1].expand(-1, 2, -1, -1)}
    assert runs_as_on_sm80(MASKED, expanded), "a stride of 0"


def test_keys_are_split_by_the_other_kernel():
    """Where row tiles are few, filling the card is worth more than the Hopper kernel."""
    case = Case(batch=1, heads=1, seqlen_q=65, seqlen_k=600, head_dim=64)
    inputs = case.inputs(torch.bfloat16)
    results = []
    for multiprocessors in (1, 32):
        hopper(multiprocessors=multiprocessors)
        results.append(forward(case, inputs, "emulated")[0])
        check_forward(case, torch.bfloat16, inputs)
    assert not torch.equal(*results)
