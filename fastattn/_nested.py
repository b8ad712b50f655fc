"""Nested tensors as packed tokens: of layout torch.strided, which nn.TransformerEncoder makes of padded batches in
inference, and of layout torch.jagged, which users make.

Their storage is the sequences one after the other, without padding: layers that work token by token (projections,
norms) run on it as on one long sequence.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def is_packed(input: Any) -> bool:
    """Whether `packed_tokens` takes ``input``: a nested tensor, and if it is jagged, in its second dim."""
    if not isinstance(input, Tensor) or not input.is_nested:
        return False
    return input.layout is not torch.jagged or getattr(input, "_ragged_idx", None) == 1


def packed_tokens(nested: Tensor) -> Tensor:
    """The tokens of a nested (batch, seqlen, features) tensor: a view (tokens, features) of its storage."""
    if nested.layout is torch.jagged:
        return nested.values()
    return nested.contiguous().values().view(-1, nested.size(-1))


def nested_like(tokens: Tensor, nested: Tensor) -> Tensor:
    """The inverse: (tokens, features) as a nested tensor with the sequence lengths of ``nested``."""
    if nested.layout is torch.jagged:
        parts: Any = nested
        return torch.nested.nested_tensor_from_jagged(tokens, parts.offsets(), parts.lengths())
    features = tokens.shape[-1]
    sizes = nested._nested_tensor_size().clone()
    sizes[:, -1] = features
    strides = torch.tensor([features, 1]).expand_as(sizes).contiguous()
    lengths = sizes[:, 0]
    offsets = (lengths.cumsum(0) - lengths) * features
    return torch._nested_view_from_buffer(tokens.reshape(-1), sizes, strides, offsets)


def token_positions(nested: Tensor) -> Tensor:
    """(batch, longest) bool: where the padded form of ``nested`` holds tokens."""
    lengths = nested._nested_tensor_size()[:, 0].to(nested.device)
    return torch.arange(int(lengths.max()) if len(lengths) else 0, device=nested.device) < lengths[:, None]


def pad_tokens(tokens: Tensor, positions: Tensor) -> Tensor:
    """(tokens, features) -> (batch, longest, features), 0 where there is no token."""
    return tokens.new_zeros(*positions.shape, tokens.shape[-1]).masked_scatter(positions[..., None], tokens)
