"""Tiny Hugging Face models with random weights, large enough that a wrong mask, scale or sink shows in the output."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

_TEXT = {
    "vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
    "attention_dropout": 0.0,
}  # fmt: skip
_GROUPED = _TEXT | {"num_key_value_heads": 2, "head_dim": 12}


def _bert() -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM

    return BertForMaskedLM(BertConfig(**_TEXT, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))


def _gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=61, n_positions=64, n_embd=32, n_layer=2, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        scale_attn_by_inverse_layer_idx=True, pad_token_id=0, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def _llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**_GROUPED))


def _mistral() -> nn.Module:
    from transformers import MistralConfig, MistralForCausalLM

    return MistralForCausalLM(MistralConfig(**_GROUPED, sliding_window=5))


def _gemma2() -> nn.Module:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        **_GROUPED, sliding_window=5, query_pre_attn_scalar=7, attn_logit_softcapping=1.5, final_logit_softcapping=20.0
    )
    return Gemma2ForCausalLM(config)


def _qwen3() -> nn.Module:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(Qwen3Config(**_GROUPED))


def _gpt_oss() -> nn.Module:
    from transformers import GptOssConfig, GptOssForCausalLM

    config = GptOssConfig(**_GROUPED, sliding_window=5, num_local_experts=4, num_experts_per_tok=2)
    return GptOssForCausalLM(config)


def _t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=61, d_model=32, d_kv=12, d_ff=40, num_layers=2, num_heads=4, relative_attention_num_buckets=8,
        relative_attention_max_distance=12, dropout_rate=0.0, pad_token_id=0, decoder_start_token_id=0,
        eos_token_id=None,
    )  # fmt: skip
    return T5ForConditionalGeneration(config)


def _whisper() -> nn.Module:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig(
        vocab_size=61, num_mel_bins=8, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=40, decoder_ffn_dim=40, max_source_positions=12,
        max_target_positions=32, dropout=0.0, attention_dropout=0.0, activation_dropout=0.0, pad_token_id=0,
        bos_token_id=1, eos_token_id=None, decoder_start_token_id=1, suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    return WhisperForConditionalGeneration(config)


def _vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        image_size=16, patch_size=4, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40,
        num_labels=7, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return ViTForImageClassification(config)


_MODELS: dict[str, Callable[[], nn.Module]] = {
    "bert": _bert, "gpt2": _gpt2, "llama": _llama, "mistral": _mistral, "gemma2": _gemma2, "qwen3": _qwen3,
    "gpt_oss": _gpt_oss, "t5": _t5, "whisper": _whisper, "vit": _vit,
}  # fmt: skip
MODELS = tuple(_MODELS)
DECODERS = ("gpt2", "llama", "mistral", "gemma2", "qwen3", "gpt_oss")


def make_model(name: str, attn_implementation: str) -> Any:
    """The model in eval mode; the same weights whatever the implementation."""
    generator = torch.Generator().manual_seed(5)
    model = _MODELS[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            # Weights of a trained model's size: with the usual initial ones all probabilities are about equal.
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * (1.5 / parameter.shape[-1] ** 0.5) if parameter.dim() > 1 else 1 + noise / 4)
    model.set_attn_implementation(attn_implementation)
    return model.eval()


def make_inputs(name: str, padding: str = "left") -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """(what the model takes, which positions of its logits mean something): two sequences, one of them padded."""
    generator = torch.Generator().manual_seed(6)
    if name == "vit":
        return {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator)}, torch.ones(2, dtype=torch.bool)
    ids = torch.randint(2, 61, (2, 11), generator=generator)
    mask = torch.ones_like(ids)
    if padding == "left":
        mask[1, :4] = 0
    elif padding == "right":
        mask[1, -4:] = 0
    ids = ids.masked_fill(mask == 0, 0)
    if name == "t5":
        decoder_ids = torch.randint(2, 61, (2, 7), generator=generator)
        return {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": decoder_ids}, torch.ones(2, 7) > 0
    if name == "whisper":
        features = torch.randn(2, 8, 24, generator=generator)
        return {"input_features": features, "decoder_input_ids": ids, "decoder_attention_mask": mask}, mask.bool()
    return {"input_ids": ids, "attention_mask": mask}, mask.bool()
