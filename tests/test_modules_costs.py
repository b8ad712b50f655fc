"""What a call of MultiHeadAttention costs: its products, the copies it spares, the shapes of its masks, its weights."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from test_modules import BATCH, EMBED, HEADS, SEQLEN_K, SEQLEN_Q, hidden_by, make_inputs, make_masks, make_pair
from torch import nn

import fastattn
from fastattn import multi_head_attention


@pytest.fixture
def attention_calls(monkeypatch) -> list[dict]:
    """What each call of ``fastattn.attention`` from the module was given."""
    calls = []

    def recorded(query, key, value, **options):
        calls.append({"query": query, "key": key, "value": value, **options})
        return fastattn.attention(query, key, value, **options)

    monkeypatch.setattr(multi_head_attention, "attention", recorded)
    return calls


@pytest.mark.parametrize("same, matmuls", [("all", 2), ("key_value", 3), ("query_key", 3), ("none", 4)])
def test_inputs_that_are_one_tensor_share_a_matmul(same, matmuls, monkeypatch):
    _, ours = make_pair()
    ours.backend = "eager"  # its products are PyTorch's
    calls = []
    linear = F.linear
    monkeypatch.setattr(F, "linear", lambda *args: calls.append(args) or linear(*args))
    ours(*make_inputs(same), need_weights=False)
    assert len(calls) == matmuls


@pytest.mark.parametrize("batch_first", [False, True])
def test_heads_are_views_of_the_projection(batch_first, attention_calls):
    _, ours = make_pair(batch_first=batch_first)
    inputs = make_inputs("all", batch_first)
    ours(*inputs, need_weights=False)
    (call,) = attention_calls
    storages = {call[name].untyped_storage().data_ptr() for name in ("query", "key", "value")}
    assert len(storages) == 1
    assert call["query"].untyped_storage().nbytes() == 3 * inputs[0].nbytes
    assert call["query"].stride(-1) == 1


@pytest.mark.parametrize(
    "attn, padding, causal, shape",
    [
        (None, "bool", False, (BATCH, 1, 1, SEQLEN_Q)),
        (None, "float", True, (BATCH, 1, 1, SEQLEN_Q)),
        ("bool2", None, False, (SEQLEN_Q, SEQLEN_Q)),
        ("float2", None, False, (SEQLEN_Q, SEQLEN_Q)),
        ("bool2", "bool", False, (BATCH, 1, SEQLEN_Q, SEQLEN_Q)),
        ("bool3", "bool", False, (BATCH, HEADS, SEQLEN_Q, SEQLEN_Q)),
        ("float2", "bool", True, (BATCH, 1, 1, SEQLEN_Q)),
        ("float2", None, True, None),
    ],
)
def test_masks_stay_in_the_smallest_shape(attn, padding, causal, shape, attention_calls):
    _, ours = make_pair(batch_first=True)
    masks = make_masks(attn, padding, SEQLEN_Q, unbatched=False)
    ours(*make_inputs("all", batch_first=True), need_weights=False, is_causal=causal, **masks)
    (call,) = attention_calls
    assert call["is_causal"] == causal
    assert shape is None if call["attn_mask"] is None else tuple(call["attn_mask"].shape) == shape


def test_causal_promise_does_not_drop_a_learned_or_rectangular_mask(attention_calls):
    _, ours = make_pair(batch_first=True)
    query, key, _ = make_inputs("key_value", batch_first=True)
    learned = torch.randn(SEQLEN_Q, SEQLEN_Q, requires_grad=True)
    ours(query, query, query, need_weights=False, attn_mask=learned, is_causal=True)
    rectangular = hidden_by(-1, 2, SEQLEN_Q, SEQLEN_K)
    ours(query, key, key, need_weights=False, attn_mask=rectangular, is_causal=True)
    assert [call["attn_mask"] is not None and not call["is_causal"] for call in attention_calls] == [True, True]


@pytest.mark.parametrize("name, kdim", [("in_proj_weight", EMBED), ("q_proj_weight", 12)])
def test_a_parametrized_weight_is_computed_once_a_call(name, kdim):
    """spectral_norm takes a step whenever it computes its weight, so that a second reading is another weight."""
    modules = make_pair(kdim=kdim, vdim=kdim)
    inputs = make_inputs(kdim=kdim)
    outs = []
    for module in modules:
        torch.manual_seed(1)
        nn.utils.parametrizations.spectral_norm(module, name)
        outs.append(module(*inputs)[0])
    torch.testing.assert_close(outs[1], outs[0])
    for ours, reference in zip(modules[1].buffers(), modules[0].buffers(), strict=True):
        torch.testing.assert_close(ours, reference)
