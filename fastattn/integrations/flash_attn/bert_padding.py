"""Padded batches to packed sequences and back: the functions of ``flash_attn.bert_padding``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def index_first_axis(input: Tensor, indices: Tensor) -> Tensor:
    """``input[indices]``, differentiable."""
    return input.index_select(0, indices)


def index_put_first_axis(values: Tensor, indices: Tensor, first_axis_dim: int) -> Tensor:
    """(first_axis_dim, ...) with ``values`` in rows ``indices`` and 0 elsewhere, differentiable."""
    return values.new_zeros(first_axis_dim, *values.shape[1:]).index_copy(0, indices, values)


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """Packs the tokens that the masks keep.

    Args:
        hidden_states: (batch, seqlen, ...).
        attention_mask: (batch, seqlen), bool or integers, 1 = token.
        unused_mask: (batch, seqlen), 1 = also packed, but not counted in the last result.

    Returns:
        The tokens (total, ...); their indices in the flattened (batch * seqlen) batch; cu_seqlens (batch + 1,) int32;
        the length of the longest sequence, an int (which on a GPU waits for the device); and how many tokens
        ``attention_mask`` alone keeps of each sequence, (batch,) int32.
    """
    kept = attention_mask.bool() if unused_mask is None else attention_mask.bool() | unused_mask.bool()
    lengths = kept.sum(-1, dtype=torch.int32)
    indices = kept.flatten().nonzero().flatten()
    tokens = index_first_axis(hidden_states.flatten(0, 1), indices)
    longest = int(lengths.max()) if lengths.numel() else 0
    return tokens, indices, _cu_seqlens(lengths), longest, attention_mask.bool().sum(-1, dtype=torch.int32)


def unpad_input_for_concatenated_sequences(
    hidden_states: Tensor, attention_mask_in_length: Tensor
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Packs rows that hold several sequences each.

    Args:
        hidden_states: (batch, seqlen, ...).
        attention_mask_in_length: (batch, seqlen) integers: the lengths of a row's sequences, followed by 0.

    Returns: the tokens (total, ...), their indices, cu_seqlens (sequences + 1,) int32, the longest length.
    """
    length = attention_mask_in_length.sum(-1, keepdim=True)
    kept = torch.arange(attention_mask_in_length.shape[-1], device=length.device) < length
    indices = kept.flatten().nonzero().flatten()
    lengths = attention_mask_in_length[attention_mask_in_length > 0].to(torch.int32)
    longest = int(lengths.max()) if lengths.numel() else 0
    return index_first_axis(hidden_states.flatten(0, 1), indices), indices, _cu_seqlens(lengths), longest


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """(total, ...) back to (batch, seqlen, ...), 0 where there is no token; ``indices`` are from ``unpad_input``."""
    return index_put_first_axis(hidden_states, indices, batch * seqlen).unflatten(0, (batch, seqlen))


def _cu_seqlens(lengths: Tensor) -> Tensor:
    return F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
