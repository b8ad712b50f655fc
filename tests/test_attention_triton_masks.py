"""Masks of several rows on Triton: their hidden tiles are not visited, and the lists that say so are right."""

from __future__ import annotations

import pytest
import torch
from attention_cases import TRITON_TILE as TILE
from attention_cases import Case, check
from devices import device_for

import fastattn

pytestmark = pytest.mark.skipif(
    fastattn.available_backends()["triton"] is not None, reason=f"no triton: {fastattn.available_backends()['triton']}"
)
DEVICE = device_for("triton")
INF = float("inf")


@pytest.fixture(autouse=True)
def on_the_device():
    with torch.device(DEVICE):
        yield


def documents(seqlen: int, length: int) -> torch.Tensor:
    document = torch.arange(seqlen) // length
    return document[:, None] == document[None, :]


DOCUMENTS = documents(3 * TILE, TILE)
FAR_APART = DOCUMENTS.clone()
FAR_APART[:TILE, 2 * TILE :] = True
AFTER_THE_FIRST, SECOND = slice(TILE, 3 * TILE), slice(TILE, 2 * TILE)
LISTED = {
    # The positions of three tiles that the first tile of rows does not see; the mask's tiles lie in between, too.
    "documents": ({"attn_mask": DOCUMENTS}, AFTER_THE_FIRST),
    "hidden_in_between": ({"attn_mask": FAR_APART}, SECOND),
    "float": ({"attn_mask": torch.zeros(FAR_APART.shape).masked_fill(~FAR_APART, -INF)}, SECOND),
    "float_per_head": ({"attn_mask": torch.randn(2, *FAR_APART.shape).masked_fill(~FAR_APART, -INF)}, SECOND),
    "causal": ({"attn_mask": DOCUMENTS, "is_causal": True}, AFTER_THE_FIRST),
    "window": ({"attn_mask": FAR_APART, "window": (5 * TILE // 2, 5 * TILE // 2)}, SECOND),
    "several_features": ({"attn_mask": FAR_APART, "softcap": 3.0, "dropout_p": 0.3}, SECOND),
    "per_head": ({"attn_mask": torch.stack([FAR_APART] * 2)}, SECOND),
}


# dk and dv of 160 are two launches, each with its own way through the list.
@pytest.mark.parametrize(
    "name, head_dim",
    [*((name, 16) for name in LISTED), *((name, 160) for name in ("float_per_head", "causal", "several_features"))],
)
def test_tiles_that_a_mask_hides_are_not_visited(name, head_dim, monkeypatch):
    """Neither the keys, by the first rows, nor the rows behind them, by the first keys: all of those are NaN."""
    from fastattn.ops import attention_triton_mask as masks

    monkeypatch.setattr(masks, "_LISTED_ELEMENTS", 0)  # small masks have lists, too
    options, hidden = LISTED[name]
    options = {n: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for n, x in options.items()}
    q, k, v, dout = (torch.randn(1, 2, 3 * TILE, head_dim) for _ in range(4))
    expected = _first_rows(q, k, v, dout, options)
    for tensor in (q, k, v, dout):
        tensor[:, :, hidden] = float("nan")
    for actual, wanted in zip(_first_rows(q, k, v, dout, options), expected, strict=True):
        assert torch.equal(actual, wanted)
        assert wanted.isfinite().all()


def _first_rows(q, k, v, dout, options) -> list[torch.Tensor]:
    """The first tile's rows of the output and of the gradients."""
    torch.manual_seed(1)
    leaves = [tensor.clone().requires_grad_() for tensor in (q, k, v)]
    out = fastattn.attention(*leaves, **options, backend="triton")
    return [tensor[:, :, :TILE] for tensor in (out, *torch.autograd.grad(out, leaves, dout))]


def _block_sparse(shape: tuple[int, ...]) -> torch.Tensor:
    """A third of the 16 x 32 tiles, with holes; the second quarter of the rows sees nothing."""
    blocks = torch.rand(*shape[:-2], -(-shape[-2] // 16), -(-shape[-1] // 32)) < 0.33
    mask = blocks.repeat_interleave(16, -2).repeat_interleave(32, -1)[..., : shape[-2], : shape[-1]]
    mask = mask & (torch.rand(shape) < 0.8)
    mask[..., shape[-2] // 4 : shape[-2] // 2, :] = False
    return mask


SPARSE = {
    "plain": {},
    "causal": {"is_causal": True},
    "window": {"window": (60, 20), "alignment": "bottom_right"},
    "window_past_the_end": {"window": (5, 5)},
    "dropout_softcap": {"dropout_p": 0.3, "softcap": 3.0},
}


@pytest.mark.parametrize("options", SPARSE.values(), ids=SPARSE)
def test_block_sparse_masks(options):
    case = Case(batch=2, heads=2, heads_kv=1, seqlen_q=110, seqlen_k=70, head_dim=8, options=options,
                tensors={"attn_mask": lambda case: _block_sparse((2, 1, 110, 70))})  # fmt: skip
    check(case, torch.float32, "triton")


@pytest.mark.parametrize("shape", [(), (1, 1), (1, 2), (2, 2)], ids=str)
def test_block_sparse_masks_of_any_shape(shape):
    case = Case(batch=2, heads=2, seqlen_q=70, seqlen_k=110, head_dim=8,
                tensors={"attn_mask": lambda case: _block_sparse((*shape, 70, 110))})  # fmt: skip
    check(case, torch.float32, "triton")


def test_block_sparse_float_masks():
    def mask(case):
        return torch.randn(70, 110).masked_fill(~_block_sparse((70, 110)), -INF)

    case = Case(batch=2, heads=2, seqlen_q=70, seqlen_k=110, head_dim=8, tensors={"attn_mask": mask})
    check(case, torch.float32, "triton")


@pytest.mark.parametrize("tile", [(16, 32), (64, 64), (128, 32), (32, 128)], ids=str)
def test_lists_of_visible_tiles(tile):
    """Every list, by rows and by keys, names what plain PyTorch finds."""
    from fastattn.ops import attention_triton_mask as masks
    from fastattn.ops.attention_triton_tiles import INTERPRETER, Tile

    q, k = torch.empty(2, 3, 300, 8), torch.empty(2, 3, 5000, 8)
    mask = _block_sparse((2, 1, 300, 5000)) & _block_sparse((2, 1, 300, 5000))
    # What the first of 16 rows hides, another may show.
    mask[..., ::16, 1000:3000] = False
    launches, states = masks.plan_mask_states(q, k, mask, INTERPRETER)
    for launch in launches:
        launch.run(mask)
    for by_keys in (False, True):
        (launch,), arguments = masks.plan_lists(states, Tile(*tile, 4, 1), (300, 5000), by_keys)
        launch.run(mask)
        lists = arguments["lists_ptr"]
        padded = torch.nn.functional.pad(mask, (0, -5000 % tile[1], 0, -300 % tile[0]))
        visible = padded.unflatten(-1, (-1, tile[1])).unflatten(-3, (-1, tile[0])).any(-1).any(-2)
        visible = visible.mT if by_keys else visible
        tiles = visible.shape[-1]
        assert lists.shape == (*visible.shape[:-1], 2 * tiles + 1)
        before = torch.nn.functional.pad(visible.cumsum(-1), (1, 0))
        assert torch.equal(lists[..., : tiles + 1].long(), before)
        for row, which in zip(lists.flatten(0, -2), visible.flatten(0, -2), strict=True):
            found = which.nonzero().flatten() * tile[0 if by_keys else 1]
            assert torch.equal(row[tiles + 1 :][: len(found)].long(), found)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32], ids=str)
def test_tiles_that_a_long_mask_of_one_row_hides_are_not_visited(dtype, monkeypatch):
    from fastattn.ops import attention_triton_mask as masks

    monkeypatch.setattr(masks, "_LISTED_ELEMENTS_OF_ONE_ROW", 0)
    q, k, v, dout = torch.randn(4, 2, 2, 3 * TILE, 16)
    visible = torch.ones(2, 1, 1, 3 * TILE, dtype=torch.bool)
    visible[..., SECOND] = False
    mask = visible if dtype == torch.bool else torch.zeros(visible.shape).masked_fill(~visible, -INF)

    def gradients(k, v):
        leaves = [tensor.clone().requires_grad_() for tensor in (q, k, v)]
        out = fastattn.attention(*leaves, mask, backend="triton")
        dq, dk, dv = torch.autograd.grad(out, leaves, dout)
        assert not dk[:, :, SECOND].any() and not dv[:, :, SECOND].any()
        return out, dq, dk, dv

    expected = gradients(k, v)
    k[:, :, SECOND] = v[:, :, SECOND] = float("nan")
    for actual, wanted in zip(gradients(k, v), expected, strict=True):
        assert torch.equal(actual, wanted) and wanted.isfinite().all()


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("head_dim", [64, 256])
@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.float32], ids=str)
def test_every_kernel_of_every_gpu_skips_hidden_tiles(mask_dtype, head_dim, dtype, capability):
    from fastattn.ops import attention_triton_plan as plan
    from fastattn.ops.attention_triton_mask import plan_mask_states
    from fastattn.ops.attention_triton_tiles import Gpu

    with torch.device("meta"):
        operand = torch.empty(2, 4, 512, head_dim, dtype=dtype)
        lse = torch.empty(2, 4, 512)
        mask = torch.empty(2, 4, 512, 512, dtype=mask_dtype)
    gpu, scoring = Gpu(capability), plan.Scoring(mask, None, None, None, 0.0, False, 0.1, -1, -1, False, 0.0)
    _, states = plan_mask_states(operand, operand, mask, gpu)
    inputs = plan.BackwardInputs(operand, operand, operand, operand, lse, lse, states)
    launches = plan.plan_forward(operand, operand, operand, operand, lse, scoring, states, gpu)
    launches += plan.plan_dq(inputs, operand, scoring, gpu)
    launches += plan.plan_dkdv(inputs, operand, operand, scoring, gpu)
    visits = [launch.arguments["LISTED"] for launch in launches if "q_ptr" in launch.arguments]
    assert len(visits) >= 3 and all(visits)


def test_small_masks_are_not_looked_at_before():
    from fastattn.ops.attention_triton_mask import plan_mask_states
    from fastattn.ops.attention_triton_tiles import Gpu

    def looks(mask, seqlen=1024, batch=1):
        q = torch.empty(batch, 4, seqlen, 64, device="meta")
        return plan_mask_states(q, q, mask.to("meta"), Gpu((9, 0)))[1] is not None

    visible = torch.ones(1024, 1024, dtype=torch.bool)
    assert looks(visible) and looks(visible.float())
    assert not looks(visible[:1]) and not looks(visible[:256, :256], seqlen=256)
    assert looks(torch.ones(1, 2048, dtype=torch.bool), seqlen=2048)
    # Of many batches and heads they are, where there are tiles to skip.
    assert looks(visible[:256, :256], seqlen=256, batch=256) and not looks(visible[:256, :256], seqlen=256, batch=255)
    assert not looks(visible[:128, :128], seqlen=128, batch=1024)
