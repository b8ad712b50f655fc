"""``attn_implementation="fastattn"`` in Hugging Face transformers::

    fastattn.integrations.transformers.register()
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="fastattn")  # or set_attn_implementation

Both halves of transformers' contract are registered: the attention function and the function that makes its mask (with
the first alone, models would drop the padding mask). Every feature of a model is computed (padding on either
side, custom masks, grouped heads, sliding windows, softcap, sinks, position bias, packed sequences, caches, dropout,
``output_attentions``) or refused with the name of the model; so are models that compute attention in code of their own
and take the mask for numbers to add.

Where ``eager`` gives a query that may attend to nothing, such as left padding, the mean of all values, this gives 0.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn

from fastattn.ops.attention import attention, attention_and_weights
from fastattn.ops.varlen_attention import varlen_attention

NAME = "fastattn"

# What models pass on to the attention function although it does not change attention itself.
_WITHOUT_EFFECT = (
    "cache_position", "deterministic", "logits_to_keep", "num_items_in_batch", "output_cross_attentions",
    "output_hidden_states", "output_router_logits", "past_key_values", "position_embeddings", "position_ids",
    "return_dict", "seq_idx", "use_cache",
)  # fmt: skip


def register(name: str = NAME) -> None:
    """Makes ``attn_implementation="fastattn"`` known to transformers. May be called again; changes no model.

    Raises: ImportError if transformers is not installed, or older than 4.53, which has no mask interface.
    """
    try:
        from transformers import AttentionInterface
        from transformers.masking_utils import AttentionMaskInterface
    except ImportError as error:
        raise ImportError(
            "fastattn.integrations.transformers needs transformers >= 4.53: pip install -U transformers"
        ) from error
    # It reads sys.modules, which compiled code need not follow.
    torch.compiler.assume_constant_result(_reader_of_masks)
    AttentionInterface.register(name, attention_forward)
    AttentionMaskInterface.register(name, attention_mask)


def attention_mask(
    batch_size: int, q_length: int, kv_length: int, *args: Any, mask_function: Callable[..., Any] | None = None,
    config: Any = None, **kwargs: Any,
) -> Tensor | None:  # fmt: skip
    """transformers' mask function: bool (batch, 1, q_length, kv_length), True = attend, or None where causality, or
    nothing, says it all. Padding without causality is one row that all queries share (stride 0).

    Raises: NotImplementedError for a model that computes attention in code of its own.
    """
    from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, eager_mask, sdpa_mask

    mask_function = causal_mask_function if mask_function is None else mask_function
    reader = _reader_of_masks(type(config).__module__.rpartition(".")[0])
    if reader == "model":
        raise NotImplementedError(
            f"fastattn in transformers: {getattr(config, 'model_type', None)!r} computes attention in code of its own, "
            "which cannot be exchanged. Use attn_implementation='eager' for this model."
        )
    if reader == "both":
        return eager_mask(batch_size, q_length, kv_length, *args, mask_function=mask_function, **kwargs)
    rows = 1 if mask_function is bidirectional_mask_function else q_length
    mask = sdpa_mask(batch_size, rows, kv_length, *args, mask_function=mask_function, **kwargs)
    return None if mask is None else mask.expand(-1, -1, q_length, -1)


_known_readers: dict[str, str] = {}


def _reader_of_masks(package: str) -> str:
    """Who reads the masks of the models in ``package``, such as "transformers.models.llama".

    "fastattn"; "model": code of its own, to which a boolean mask is ones to add, and None means no causality; "both":
    either of them, or attention modules that may not say that they are causal. All of them understand eager's numbers.
    """
    if package not in _known_readers:
        modules = [module for name, module in list(sys.modules.items()) if name.startswith(f"{package}.modeling_")]
        exchanging = [module for module in modules if hasattr(module, "ALL_ATTENTION_FUNCTIONS")]
        # Models that are made of other packages' models have neither.
        own = [module for module in modules if module not in exchanging and _classes(module, "Attention")]
        flags = ("_supports_sdpa", "_supports_attention_backend")
        declared = any(getattr(each, flag, False) for m in modules for each in _classes(m) for flag in flags)
        alone = "model" if own and not exchanging else "fastattn"
        _known_readers[package] = "both" if exchanging and (own or not declared) else alone
    return _known_readers[package]


def _classes(module: Any, ending: str = "") -> list[type]:
    """The classes that ``module`` defines whose names have this ending."""
    classes = [each for name, each in vars(module).items() if isinstance(each, type) and name.endswith(ending)]
    return [each for each in classes if each.__module__ == module.__name__]


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    *,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    output_attentions: bool | None = False,
    **others: Any,
) -> tuple[Tensor, Tensor | None]:
    """transformers' attention function, with the options that its models pass.

    Args:
        module: the attention module; ``module.is_causal`` counts if ``is_causal`` is None.
        query, key, value: (batch, heads, seqlen, head_dim), with any number of key heads that divides the heads.
        attention_mask: bool, True = attend, or float, added; None leaves causality to ``is_causal``.
        s_aux: (heads,), sinks.
        position_bias: (1 or batch, heads, seqlen_q, seqlen_k), added to the scores; differentiable.
        sliding_window: read only without a mask, because masks contain it.
        cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k: sequences packed in one row of the batch. Attention
            stays within each; without a mask it costs only what the sequences cost.
        output_attentions: also return the probabilities.

    Returns: (batch, seqlen_q, heads, head_dim_v), and the probabilities (batch, heads, seqlen_q, seqlen_k) or None.
    Raises: NotImplementedError, with the names of the model and the feature, for what is not supported.
    """
    for name, option in others.items():
        if option is not None and option is not False and name not in _WITHOUT_EFFECT:
            _refuse(module, f"passes {name!r} to attention, which fastattn does not know")
    is_causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    options: dict[str, Any] = {"dropout_p": dropout, "scale": scaling, "softcap": softcap or 0.0, "sinks": s_aux}
    window = None if sliding_window is None else (sliding_window - 1, sliding_window - 1)

    if cu_seq_lens_q is not None:
        cu_seq_lens_k = cu_seq_lens_q if cu_seq_lens_k is None else cu_seq_lens_k
        if attention_mask is None:
            if position_bias is not None or output_attentions:
                asked = "output_attentions" if position_bias is None else "position_bias"
                _refuse(module, f"asks for {asked!r} in packed sequences (cu_seq_lens_q) without a mask")
            if max_length_q is None or query.shape[0] != 1:
                _refuse(module, "packs sequences (cu_seq_lens_q) without max_length_q or in a batch of more than one")
            max_length_k = max_length_q if max_length_k is None else max_length_k
            lengths = cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k
            return _attend_packed(query, key, value, *lengths, is_causal=is_causal, window=window, **options), None
        attention_mask = _within_sequences(attention_mask, cu_seq_lens_q, cu_seq_lens_k)

    # As transformers' sdpa function has it: without a mask, several queries start at key 0, a single one is the last.
    if attention_mask is None:
        options["window"] = window
        if query.shape[2] > 1:
            options["is_causal"] = is_causal
        else:
            options["alignment"] = "bottom_right"
    options["attn_mask"] = _with_bias(attention_mask, position_bias)
    if output_attentions:
        out, weights = attention_and_weights(query, key, value, average_heads=False, **options)
        return out.transpose(1, 2).contiguous(), weights
    out = cast(Tensor, attention(query, key, value, enable_gqa=True, **options))
    return out.transpose(1, 2).contiguous(), None


def _attend_packed(query: Tensor, key: Tensor, value: Tensor, *lengths: Any, **options: Any) -> Tensor:
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    return cast(Tensor, varlen_attention(q, k, v, *lengths, **options)).unsqueeze(0)


def _with_bias(mask: Tensor | None, bias: Tensor | None) -> Tensor | None:
    if mask is None or bias is None:
        return bias if mask is None else mask
    return bias.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else bias + mask


def _within_sequences(mask: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> Tensor:
    """``mask`` with what it says about keys of other packed sequences overruled."""
    sequence_q, sequence_k = (
        torch.searchsorted(cu_seqlens[1:].contiguous(), torch.arange(length).to(cu_seqlens), right=True)
        for cu_seqlens, length in ((cu_seqlens_q, mask.shape[-2]), (cu_seqlens_k, mask.shape[-1]))
    )
    same = sequence_q[:, None] == sequence_k
    return mask & same if mask.dtype == torch.bool else mask.masked_fill(~same, float("-inf"))


def _refuse(module: nn.Module, what: str) -> NoReturn:
    model = getattr(getattr(module, "config", None), "model_type", None) or "unknown model"
    raise NotImplementedError(
        f"fastattn in transformers: {type(module).__name__} of {model!r} {what}. "
        "Use attn_implementation='eager' for this model or call."
    )
