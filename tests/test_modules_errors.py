"""What MultiHeadAttention refuses, and the words it has for it."""

from __future__ import annotations

import pytest
import torch
from test_modules import EMBED, HEADS

import fastattn

pytestmark = pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype:UserWarning")


@pytest.mark.parametrize(
    "args, options, message",
    [
        ((0, 1), {}, "must be positive, got 0, 1, 1"),
        ((16, 3), {}, "num_heads must divide embed_dim, got 3 for 16"),
        ((16, 4), {"num_kv_heads": 3}, "num_kv_heads must divide num_heads, got 3 for 4"),
        ((16, 4), {"dropout": 1.5}, "dropout must be between 0 and 1, got 1.5"),
        (
            (16, 4),
            {"window": (-2, 0)},
            r"window must be .*, two integers >= -1, .*; got \(-2, 0\)",
        ),
        ((16, 4), {"backend": "tpu"}, "backend must be 'auto' or one of .*, got 'tpu'"),
        ((16, 4), {"kdim": -1}, "kdim must not be negative, got -1"),
        ((16, 4), {"vdim": -1}, "vdim must not be negative, got -1"),
    ],
)
def test_rejects_bad_configurations(args, options, message):
    with pytest.raises(ValueError, match=message):
        fastattn.MultiHeadAttention(*args, **options)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"kdim": 1.5}, "kdim must be an int or None, got 1.5"),
        ({"vdim": "16"}, "vdim must be an int or None, got '16'"),
        ({"dtype": torch.int8}, "dtype must be a floating-point torch.dtype, got torch.int8"),
    ],
)
def test_rejects_configurations_of_other_types(options, message):
    with pytest.raises(TypeError, match=message):
        fastattn.MultiHeadAttention(EMBED, HEADS, **options)


@pytest.mark.parametrize(
    "shapes, masks, error, message",
    [
        (((16,), (7, 16), (7, 16)), {}, ValueError, r"must all have 3 dimensions, or 2 if unbatched, got \(16,\)"),
        (((3, 5, 16), (7, 16), (7, 16)), {}, ValueError, "must all have 3 dimensions"),
        (((3, 5, 8), (3, 7, 16), (3, 7, 16)), {}, ValueError, "query must have embed_dim = 16 features, got"),
        (((3, 5, 16), (3, 7, 8), (3, 7, 16)), {}, ValueError, "key must have kdim = 16 features, got"),
        (((3, 5, 16), (3, 7, 16), (3, 7, 9)), {}, ValueError, "or make the module with vdim=9"),
        (((3, 5, 16), (3, 7, 16), (3, 6, 16)), {}, ValueError, "key and value must have the same"),
        (((3, 5, 16), (2, 7, 16), (2, 7, 16)), {}, ValueError, "same batch size, got .* With batch_first=True"),
        (((3, 5, 16),) * 3, {"key_padding_mask": torch.zeros(5, 3) > 0}, ValueError, r"here \(3, 5\), got \(5, 3\)"),
        (((3, 5, 16),) * 3, {"key_padding_mask": torch.zeros(3, 5).int()}, TypeError, "got torch.int32. If nonzero"),
        (((3, 5, 16),) * 3, {"attn_mask": torch.zeros(5, 6)}, ValueError, r"attn_mask must be .* here \(5, 5\), got"),
        (((3, 5, 16),) * 3, {"attn_mask": torch.zeros(3, 5, 5)}, ValueError, r"here \(12, 5, 5\), got \(3, 5, 5\)"),
        (((3, 5, 16),) * 3, {"attn_mask": torch.zeros(5)}, ValueError, r"here \(5, 5\), got \(5,\)"),
    ],
)
def test_rejects_inputs_that_do_not_fit(shapes, masks, error, message):
    module = fastattn.MultiHeadAttention(EMBED, HEADS, batch_first=True)
    with pytest.raises(error, match=message):
        module(*(torch.zeros(shape) for shape in shapes), **masks)


def test_rejects_a_dtype_that_is_not_the_weights():
    query = torch.zeros(3, 5, EMBED, dtype=torch.bfloat16)
    for options in ({}, {"num_kv_heads": 2}):
        with pytest.raises(TypeError, match=r"are .*bfloat16.* but the module's weights torch.float32"):
            fastattn.MultiHeadAttention(EMBED, HEADS, **options)(query, query, query)


def test_rejects_nested_input_that_it_cannot_take():
    rows = [torch.randn(3, EMBED), torch.randn(2, EMBED)]
    nested, jagged = torch.nested.nested_tensor(rows), torch.nested.nested_tensor(rows, layout=torch.jagged)
    module = fastattn.MultiHeadAttention(EMBED, HEADS, batch_first=True)
    for inputs in ((jagged, jagged, jagged), (nested, torch.randn(2, 3, EMBED), nested)):
        with pytest.raises(TypeError, match=r"must all be nested with layout torch.strided, or none"):
            module(*inputs)
    with pytest.raises(ValueError, match="take no masks: remove key_padding_mask"):
        module(nested, nested, nested, key_padding_mask=torch.zeros(2, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="set batch_first=True"):
        fastattn.MultiHeadAttention(EMBED, HEADS)(nested, nested, nested)
