"""The CUDA kernels of attention, emulated: harsh schedules, every tile, split keys, packed heads, skipped tiles."""

from __future__ import annotations

import dataclasses
import mmap
import sys

import pytest
import torch
from accuracy import assert_as_accurate_as_eager
from attention_cases import FEATURES, Case, check, dtype_id
from emulated import MODES, Mode

import fastattn
from fastattn.ops.attention import attention_and_weights

pytestmark = [
    pytest.mark.skipif(
        fastattn.available_backends()["emulated"] is not None, reason=str(fastattn.available_backends()["emulated"])
    ),
    pytest.mark.usefixtures("plain_mode_afterwards"),
]
HALF = [torch.bfloat16, torch.float16]
each_dtype = pytest.mark.parametrize("dtype", HALF, ids=dtype_id)
each_harsh_mode = pytest.mark.parametrize("mode", MODES[1:], ids=str)


@each_harsh_mode
@pytest.mark.parametrize("feature", FEATURES)
def test_feature_under_harsh_schedules(feature, mode):
    mode.apply()
    # The dtypes take turns; test_attention.py has all of them in the plain schedule.
    check(FEATURES[feature], HALF[mode.seed % 2], "emulated")


SEES_NOTHING = {
    "no_keys": Case(batch=1, heads=2, seqlen_q=130, seqlen_k=0),
    "mask": Case(batch=1, heads=2, seqlen_q=130,
                 tensors={"attn_mask": lambda case: torch.zeros(1, 1, dtype=torch.bool)}),
    "causal": Case(batch=1, heads=2, seqlen_q=300, seqlen_k=20,
                   options={"is_causal": True, "alignment": "bottom_right"}),
}  # fmt: skip


@each_harsh_mode
@pytest.mark.parametrize("kind", SEES_NOTHING)
def test_row_tiles_that_see_nothing(kind, mode):
    """They skip the loop over the keys, and with it the barriers that other tiles rely on."""
    mode.apply(multiprocessors=1)
    check(SEES_NOTHING[kind], torch.float16, "emulated")


# --- Tiles -----------------------------------------------------------------------------------------------------------

KINDS = {"plain": {}, "mask": {}, "everything": {"softcap": 5.0, "dropout_p": 0.2}}
HEAD_DIMS = [(8, 32), (64, 64), (96, 80), (72, 128), (192, 128), (256, 256)]


@pytest.mark.parametrize("compute_capability", [80, 86, 90, 120])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dims", HEAD_DIMS, ids=lambda dims: "x".join(map(str, dims)))
def test_every_tile(dims, kind, compute_capability):
    """Lengths that leave parts of the tiles empty, on cards with much and with little shared memory."""
    mode = MODES[1 + compute_capability % 3]
    mode.apply(compute_capability=compute_capability, multiprocessors=1)
    tensors = {} if kind == "plain" else {"attn_mask": lambda case: torch.randn(case.seqlen_q, case.seqlen_k)}
    case = Case(batch=1, heads=1, seqlen_q=131, seqlen_k=161, head_dim=dims[0], head_dim_v=dims[1],
                options={"is_causal": True, "alignment": "bottom_right", **KINDS[kind]}, tensors=tensors)  # fmt: skip
    check(case, HALF[sum(dims) // 8 % 2], "emulated")


@each_dtype
@pytest.mark.parametrize("options", [{}, {"softcap": 60.0}], ids=["plain", "everything"])
def test_scores_that_grow_from_tile_to_tile(options, dtype):
    """The running maximum rises by more than its slack in every tile, so that all that was summed is rescaled."""
    Mode().apply(multiprocessors=1)
    case = Case(batch=1, heads=1, seqlen_q=70, seqlen_k=400, head_dim=64, options={"scale": 1.0, **options})
    inputs = case.inputs(dtype)
    inputs["query"].abs_()
    inputs["key"] = (inputs["key"].abs() * torch.linspace(0, 1, 400)[:, None]).to(dtype)
    check(case, dtype, "emulated", inputs)


# --- Keys split over blocks ------------------------------------------------------------------------------------------


SPLIT = ["plain", "causal_bottom_right", "window", "key_padding", "sinks", "sinks_empty_rows",
         "causal_bottom_right_empty_rows", "dropout", "everything"]  # fmt: skip


@each_harsh_mode
@pytest.mark.parametrize("feature", SPLIT)
def test_split_keys(feature, mode):
    """More multiprocessors than blocks: several blocks share the keys of a row."""
    mode.apply(multiprocessors=32)
    case = FEATURES[feature]
    case = dataclasses.replace(case, batch=1, heads=2, heads_kv=None, seqlen_q=case.seqlen_q // 2, seqlen_k=300)
    check(case, torch.bfloat16, "emulated")


@each_dtype
@pytest.mark.parametrize("seqlen_k", [129, 256, 1025])
def test_split_keys_at_any_length(seqlen_k, dtype):
    Mode().apply(multiprocessors=64)
    check(Case(batch=1, heads=1, seqlen_q=1, seqlen_k=seqlen_k, head_dim=24, head_dim_v=37), dtype, "emulated")


def test_splitting_changes_no_more_than_a_rounding():
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 1, 3, 64), torch.randn(1, 1, 1000, 64), torch.randn(1, 1, 1000, 64)
    results = []
    for multiprocessors in (1, 100):
        Mode().apply(multiprocessors=multiprocessors)
        results.append(fastattn.attention(q.half(), k.half(), v.half(), return_lse=True, backend="emulated"))
    (out, lse), (split_out, split_lse) = results
    assert not torch.equal(lse, split_lse), "the keys were not split"
    torch.testing.assert_close(split_lse, lse, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(split_out, out, rtol=2e-3, atol=1e-4)


# --- Heads packed into a tile ----------------------------------------------------------------------------------------

PACKED = {
    "decode": Case(heads=8, heads_kv=2, seqlen_q=1),
    "mqa": Case(heads=5, heads_kv=1, seqlen_q=32),
    "causal": Case(heads=6, heads_kv=2, seqlen_q=17, options={"is_causal": True, "alignment": "bottom_right"}),
    "window": Case(heads=6, heads_kv=2, seqlen_q=30, options={"window": (9, 3)}),
    "alibi": Case(heads=6, heads_kv=2, seqlen_q=7, tensors={"alibi_slopes": lambda case: torch.rand(case.heads)}),
    "sinks": Case(heads=6, heads_kv=2, seqlen_q=7, tensors={"sinks": lambda case: torch.randn(case.heads)}),
    "dropout": Case(heads=6, heads_kv=2, seqlen_q=23, options={"dropout_p": 0.4}),
    "mask_per_head": Case(heads=6, heads_kv=3, seqlen_q=31, tensors={
        "attn_mask": lambda case: torch.rand(case.batch, case.heads, case.seqlen_q, case.seqlen_k) < 0.5}),
    "mask_per_key_and_head": Case(heads=6, heads_kv=3, seqlen_q=31, tensors={
        "attn_mask": lambda case: torch.rand(case.heads, 1, case.seqlen_k) < 0.5}),
    "everything": dataclasses.replace(FEATURES["everything"], heads=6, seqlen_q=21),
}  # fmt: skip


@pytest.mark.parametrize("multiprocessors", [1, 32], ids=["whole", "split"])
@pytest.mark.parametrize("feature", PACKED)
def test_packed_heads(feature, multiprocessors):
    MODES[2].apply(multiprocessors=multiprocessors)
    check(dataclasses.replace(PACKED[feature], seqlen_k=270), torch.float16, "emulated")


# --- Tiles that are skipped ------------------------------------------------------------------------------------------


def _document_mask(seqlen: int, boundary: int) -> torch.Tensor:
    document = torch.arange(seqlen) >= boundary
    return document[:, None] == document


# What rows of `rows` see lies in keys of `keys`, as tiles of 64 or 128 rows and keys have it.
SKIPS = {
    "causal": ({"is_causal": True}, slice(0, 64), slice(0, 128)),
    "window": ({"window": (10, 10)}, slice(256, 320), slice(128, 320)),
    "key_padding": ({"attn_mask": torch.arange(320) < 100}, slice(0, 320), slice(0, 128)),
    "left_padding": ({"attn_mask": torch.arange(320) >= 200}, slice(0, 320), slice(192, 320)),
    "additive_padding": (
        {"attn_mask": torch.zeros(320).masked_fill(torch.arange(320) >= 100, -float("inf"))},
        slice(0, 320), slice(0, 128)),
    "documents": ({"attn_mask": _document_mask(320, 128)}, slice(128, 320), slice(128, 320)),
}  # fmt: skip


@pytest.mark.parametrize("kind", SKIPS)
def test_tiles_without_visible_keys_are_not_read(kind):
    """NaN in values that the mask hides would spread, since 0 * NaN is NaN, if their tile were visited."""
    Mode().apply(multiprocessors=1)
    options, rows, keys = SKIPS[kind]
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 4, 320, 64, dtype=torch.bfloat16) for _ in range(3))
    expected = fastattn.attention(q, k, v, **options, backend="eager")[:, :, rows]
    hidden = torch.ones(320, dtype=torch.bool)
    hidden[keys] = False
    k[:, :, hidden] = v[:, :, hidden] = float("nan")
    actual = fastattn.attention(q, k, v, **options, backend="emulated")[:, :, rows]
    torch.testing.assert_close(actual, expected, rtol=2e-2, atol=2e-2)


# --- Attention weights -----------------------------------------------------------------------------------------------

WEIGHTS = {
    "plain": Case(),
    "causal": Case(seqlen_q=130, seqlen_k=131, options={"is_causal": True}),
    "gqa_dropout": Case(heads_kv=2, options={"dropout_p": 0.3}),
    "bool_mask": Case(tensors={"attn_mask": lambda case: torch.rand(case.seqlen_q, case.seqlen_k) < 0.4}),
    "empty_rows": Case(tensors={"attn_mask": lambda case: (torch.arange(case.seqlen_q) % 3 != 0)[:, None]}),
    "window": Case(options={"window": (10, 10)}),
    "head_dim_100": Case(head_dim=100),
    "head_dim_256": Case(batch=1, heads=2, head_dim=256, seqlen_q=1, seqlen_k=64),
}


@each_dtype
@pytest.mark.parametrize("average_heads", [False, True])
@pytest.mark.parametrize("feature", WEIGHTS)
def test_attention_weights(feature, average_heads, dtype):
    MODES[1].apply()
    case = WEIGHTS[feature]

    def weights(backend, wide=False):
        inputs = case.inputs(dtype)
        inputs = {name: t.double() if wide and t.is_floating_point() else t for name, t in inputs.items()}
        torch.manual_seed(5)
        return attention_and_weights(**inputs, **case.options, average_heads=average_heads, backend=backend)[1]

    assert_as_accurate_as_eager(weights("emulated"), weights("eager"), weights("eager", wide=True), feature)


# --- Inputs that the kernels cannot address as they are --------------------------------------------------------------


@pytest.mark.parametrize("offset", [1, 4, 8])
@pytest.mark.parametrize("head_dim", [36, 40, 41])
def test_misaligned_rows(head_dim, offset):
    """Rows cut out of longer ones: their starts and strides are no multiples of 16 bytes, or their ends are not."""
    case = Case(heads=2, head_dim=head_dim)
    inputs = case.inputs(torch.float16)
    for name in ("query", "key", "value"):
        tensor = inputs[name]
        rows = torch.full((*tensor.shape[:-1], 64), float("nan"), dtype=tensor.dtype)
        inputs[name] = rows[..., offset : offset + head_dim].copy_(tensor)
    check(case, torch.float16, "emulated", inputs)


@pytest.mark.parametrize("head_dim", [40, 60])
def test_heads_innermost(head_dim):
    """Heads are neighbours in memory, as in a channels-last image: a copy whose rows are padded must not keep that."""
    case = Case(heads=4, head_dim=head_dim)
    inputs = case.inputs(torch.float16)
    for name in ("query", "key", "value"):
        inputs[name] = inputs[name].permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    check(case, torch.float16, "emulated", inputs)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reserves memory with Linux's MAP_NORESERVE")
def test_offsets_beyond_32_bits():
    """Rows 2**31 elements apart, in memory that is reserved and, but for those rows, never touched."""
    stride, map_noreserve = 2**31 + 64, 0x4000
    memory = mmap.mmap(-1, 2 * (stride + 3 * 64), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | map_noreserve)
    elements = torch.frombuffer(memory, dtype=torch.float16)
    inputs = {}
    for i, name in enumerate(("query", "key", "value")):
        far = elements[64 * i :].as_strided((1, 1, 2, 64), (0, 0, stride, 1))
        inputs[name] = far.copy_(torch.randn(far.shape))
    near = {name: tensor.contiguous() for name, tensor in inputs.items()}
    out = fastattn.attention(**inputs, backend="emulated")
    torch.testing.assert_close(out, fastattn.attention(**near, backend="eager"), rtol=2e-3, atol=1e-3)


def test_refuses_what_it_cannot_run():
    q = torch.randn(1, 1, 4, 8)
    with pytest.raises(
        NotImplementedError, match=r"'emulated' cannot run this: dtype float32 is not bfloat16 or float16"
    ):
        fastattn.attention(q, q, q, backend="emulated")
    wide = torch.randn(1, 1, 4, 264, dtype=torch.float16)
    with pytest.raises(NotImplementedError, match=r"head_dim 264 \(value: 264\) is not in 1 to 256"):
        fastattn.attention(wide, wide, wide, backend="emulated")
