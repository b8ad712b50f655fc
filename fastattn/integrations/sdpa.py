"""PyTorch's own attention function through fastattn::

    with fastattn.integrations.sdpa.patch():
        model(input)  # every F.scaled_dot_product_attention, nn.MultiheadAttention's too

or, for the rest of the program, by torch's registry of implementations::

    fastattn.integrations.sdpa.register()
    torch.nn.attention.activate_flash_attention_impl("fastattn")
"""

from __future__ import annotations

import threading
from contextlib import ContextDecorator
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.nn.parameter import Parameter

from fastattn.ops.attention import attention

NAME = "fastattn"
_FUNCTION = "scaled_dot_product_attention"

# Where torch keeps the function. Code that has bound it to a name of its own before is not reached.
_PLACES: tuple[Any, ...] = (torch.nn.functional, torch._C._nn)
_TORCHS = torch._C._nn.scaled_dot_product_attention


class patch(ContextDecorator):
    """Within the block ``F.scaled_dot_product_attention`` is fastattn's, on every device. Also a decorator.

    - It is exchanged for the whole process: while any thread is in a block, it counts in all threads. (The backward
      pass of a GPU runs in threads of its own, and activation checkpointing calls the forward pass again there: keep
      the backward pass of a checkpointed model in the block.) Blocks may be nested and overlap; the last to end, also
      by an exception, restores what was there.
    - ``nn.MultiheadAttention`` and ``nn.TransformerEncoderLayer`` compute inference in an op of their own, which is
      switched off in the block: they call the function. With ``need_weights=True`` they do not; for that, and for more
      speed, use ``fastattn.accelerate``.
    - A compiled function notices, and is compiled again.
    - ``torch.nn.attention.bias`` masks are read as what they say, never made. Nested tensors and other subclasses of
      Tensor, such as DTensor, keep torch's function. ``attn_mask`` together with ``is_causal`` is an error for torch;
      here both apply.
    - ``fastattn.use_backend`` chooses the kernel as always.
    """

    def __enter__(self) -> patch:
        _exchange.begin()
        return self

    def __exit__(self, *exc_info: object) -> None:
        _exchange.end()


def register() -> None:
    """Adds "fastattn" to ``torch.nn.attention.list_flash_attention_impls()``. Activates nothing.

    ``torch.nn.attention.activate_flash_attention_impl("fastattn")`` then does what entering ``patch()`` does, until
    ``restore_flash_attention_impl()`` or the activation of another.

    Raises: NotImplementedError if this version of torch has no such registry.
    """
    if not hasattr(torch.nn.attention, "register_flash_attention_impl"):
        raise NotImplementedError(
            f"sdpa.register: torch {torch.__version__} has no registry of attention implementations (2.11 has). "
            "Use fastattn.integrations.sdpa.patch()."
        )
    torch.nn.attention.register_flash_attention_impl(NAME, register_fn=_Activation)


class _Activation:
    """What torch's registry keeps while "fastattn" is active."""

    def __init__(self) -> None:
        _exchange.begin()

    def remove(self) -> None:
        _exchange.end()


class _Exchange:
    """Counts the blocks that are open; the first exchanges the function and the last restores it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._blocks = 0
        self._before: list[Any] = []
        self._fast_path_before = True

    def begin(self) -> None:
        with self._lock:
            self._blocks += 1
            if self._blocks == 1:
                self._before = [getattr(place, _FUNCTION) for place in _PLACES]
                self._fast_path_before = torch.backends.mha.get_fastpath_enabled()
                torch.backends.mha.set_fastpath_enabled(False)
                for place in _PLACES:
                    setattr(place, _FUNCTION, scaled_dot_product_attention)

    def end(self) -> None:
        with self._lock:
            self._blocks -= 1
            if self._blocks == 0:
                for place, before in zip(_PLACES, self._before, strict=True):
                    setattr(place, _FUNCTION, before)
                torch.backends.mha.set_fastpath_enabled(self._fast_path_before)


_exchange = _Exchange()


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """``F.scaled_dot_product_attention`` computed by ``fastattn.attention``; ``patch`` says what differs."""
    alignment = "top_left"
    if attn_mask is not None and type(attn_mask) not in _PLAIN:
        attn_mask, is_causal, alignment = _read_causal_bias(query, key, attn_mask, is_causal)
    for tensor in (query, key, value, attn_mask):
        if tensor is not None and (type(tensor) not in _PLAIN or tensor.is_nested):
            return _TORCHS(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    out = attention(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, alignment=alignment)
    assert isinstance(out, Tensor)
    return out


# A parameter is a tensor, and so are the stand-ins of tracing.
_PLAIN = (Tensor, Parameter, FakeTensor, FunctionalTensor)


def _read_causal_bias(query: Tensor, key: Tensor, mask: Any, is_causal: bool) -> tuple[Tensor | None, bool, str]:
    """(attn_mask, is_causal, alignment) of a mask that is a subclass of Tensor."""
    # It takes seconds to import, and there is no such mask before somebody has.
    from torch.nn.attention.bias import CausalBias, CausalVariant

    if not isinstance(mask, CausalBias):
        return mask, is_causal, "top_left"
    if (mask.seq_len_q, mask.seq_len_kv) != (query.shape[-2], key.shape[-2]):
        raise ValueError(
            f"scaled_dot_product_attention: the causal bias is for lengths {mask.seq_len_q} and {mask.seq_len_kv}, but "
            f"query and key have {query.shape[-2]} and {key.shape[-2]}."
        )
    return None, True, "bottom_right" if mask.variant == CausalVariant.LOWER_RIGHT else "top_left"
