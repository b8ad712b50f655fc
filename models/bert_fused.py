"""BERT's layers on fastattn's ops: the modules and numbers of nn.TransformerEncoder in fewer passes over memory.

Residual, dropout and norm are one op, and padding is left out: every layer sees real tokens only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastattn

Attend = Callable[[fastattn.MultiHeadAttention, Tensor], Tensor]


def is_swapped(encoder: nn.TransformerEncoder) -> bool:
    """Whether ``fastattn.accelerate`` has swapped the attention of every layer."""
    return all(isinstance(layer.self_attn, fastattn.MultiHeadAttention) for layer in encoder.layers)


def fused_encoder(encoder: nn.TransformerEncoder, x: Tensor, visible: Tensor | None) -> Tensor:
    """What ``encoder`` computes of (batch, seqlen, hidden), with 0 for padding.

    Args:
        visible: (batch, seqlen) bool, True where there is a token; None = no padding.
    """
    if visible is None or torch.compiler.is_compiling():
        # A number of tokens that depends on the data would break the compiled graph.
        ignored = None if visible is None else ~visible

        def attend(attention: fastattn.MultiHeadAttention, x: Tensor) -> Tensor:
            return attention(x, x, x, key_padding_mask=ignored, need_weights=False)[0]

        return _run(encoder, x, attend, visible is None)
    packing = Packing.of(visible)
    packed = _run(encoder, packing.pack(x), packing.attend)
    return packing.unpack(packed)


def _run(encoder: nn.TransformerEncoder, x: Tensor, attend: Attend, unmasked: bool = False) -> Tensor:
    for layer in encoder.layers:
        in_one_call = getattr(layer, "in_one_call", None) if unmasked else None  # INT8 layers have it
        out = None if in_one_call is None else in_one_call(x)
        if out is not None:
            x = out
            continue
        x = _add_norm(layer.norm1, attend(layer.self_attn, x), x, layer.dropout1)
        hidden = F.dropout(layer.activation(layer.linear1(x)), layer.dropout.p, layer.training)
        x = _add_norm(layer.norm2, layer.linear2(hidden), x, layer.dropout2)
    return x


def _add_norm(norm: nn.LayerNorm, branch: Tensor, x: Tensor, dropout: nn.Dropout) -> Tensor:
    """norm(x + dropout(branch)); under autocast the sum keeps the precision of ``x``."""
    p = dropout.p if dropout.training else 0.0
    out, _ = fastattn.add_layer_norm(
        branch.to(x.dtype), x, norm.normalized_shape, norm.weight, norm.bias, norm.eps, dropout_p=p
    )
    return out


@dataclass(frozen=True)
class Packing:
    """Where the tokens of a padded batch are."""

    shape: tuple[int, int]  # (batch, seqlen)
    tokens: Tensor  # (total,) int64, their rows in (batch * seqlen)
    starts: Tensor  # (batch + 1,) int32, where each sequence begins among them, and the total
    longest: int

    @classmethod
    def of(cls, visible: Tensor) -> Packing:
        lengths = visible.sum(1)
        starts = F.pad(lengths.cumsum(0), (1, 0)).int()
        return cls((visible.shape[0], visible.shape[1]), visible.flatten().nonzero()[:, 0], starts, int(lengths.max()))

    def pack(self, x: Tensor) -> Tensor:
        """(batch, seqlen, features) to (total, features)."""
        return x.flatten(0, 1).index_select(0, self.tokens)

    def unpack(self, x: Tensor) -> Tensor:
        """The inverse, 0 where there is no token."""
        batch, seqlen = self.shape
        return x.new_zeros(batch * seqlen, x.shape[1]).index_copy(0, self.tokens, x).view(batch, seqlen, -1)

    def attend(self, attention: fastattn.MultiHeadAttention, x: Tensor) -> Tensor:
        return attention.forward_packed(x, self.starts, self.longest)
