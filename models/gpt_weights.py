"""Hugging Face GPT-2 and Llama checkpoints as ``models.gpt`` names them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from models.gpt import Gpt, GptConfig

# Fields that change what a Llama computes, with the one value that this decoder knows.
_LLAMA_ONLY = {"attention_bias": False, "mlp_bias": False, "hidden_act": "silu", "quantization_config": None}
_GPT2_ONLY = {
    "quantization_config": None,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False,
    "add_cross_attention": False,
    "activation_function": "gelu_new",
}


def config_from_dict(values: dict[str, Any]) -> GptConfig:
    """The configuration that a Hugging Face config.json describes.

    Raises: ValueError if it is not a GPT-2 or Llama, or has a feature that this decoder lacks.
    """
    kind = values.get("model_type")
    if kind == "gpt2":
        _require(values, _GPT2_ONLY)
        dim = values["n_embd"]
        return GptConfig(
            vocab_size=values["vocab_size"], max_positions=values["n_positions"], dim=dim,
            num_layers=values["n_layer"], num_heads=values["n_head"], hidden_dim=values.get("n_inner") or 4 * dim,
            eps=values["layer_norm_epsilon"], dropout=values.get("resid_pdrop", 0.1),
            tie_embeddings=values.get("tie_word_embeddings", True),
        )  # fmt: skip
    if kind == "llama":
        # Older files say rope_scaling, and type.
        rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        if rope_type != "default":
            raise ValueError(f"GptConfig: rope_type {rope_type!r} is not supported; this decoder has 'default'.")
        _require(values, _LLAMA_ONLY)
        head_dim = values["hidden_size"] // values["num_attention_heads"]
        if values.get("head_dim") not in (None, head_dim):
            raise ValueError(f"GptConfig: head_dim {values['head_dim']} must be hidden_size / heads = {head_dim}.")
        return GptConfig.llama(
            vocab_size=values["vocab_size"], max_positions=values["max_position_embeddings"],
            dim=values["hidden_size"], num_layers=values["num_hidden_layers"],
            num_heads=values["num_attention_heads"], num_kv_heads=values.get("num_key_value_heads"),
            hidden_dim=values["intermediate_size"], eps=values["rms_norm_eps"],
            rope_theta=values.get("rope_theta") or rope.get("rope_theta", 10000.0),
            tie_embeddings=values.get("tie_word_embeddings", False),
        )  # fmt: skip
    raise ValueError(f"GptConfig: model_type must be 'gpt2' or 'llama', got {kind!r}.")


def _require(values: dict[str, Any], expected: dict[str, Any]) -> None:
    for name, value in expected.items():
        if values.get(name, value) != value:
            raise ValueError(f"GptConfig: {name} {values[name]!r} is not supported; this decoder has {value!r}.")


def convert_state_dict(theirs: dict[str, Tensor], config: GptConfig) -> dict[str, Tensor]:
    """A Hugging Face GPT-2's or Llama's state dict under this package's names.

    Raises: KeyError if a parameter is missing.
    """
    theirs = {name.removeprefix("transformer.").removeprefix("model."): tensor for name, tensor in theirs.items()}
    return _from_llama(theirs, config) if config.rope_theta else _from_gpt2(theirs, config)


def _from_gpt2(theirs: dict[str, Tensor], config: GptConfig) -> dict[str, Tensor]:
    ours = {"embedding.weight": theirs["wte.weight"], "position.weight": theirs["wpe.weight"]}
    ours["head.weight"] = theirs.get("lm_head.weight", theirs["wte.weight"])
    names = {"norm1": "ln_1", "norm2": "ln_2", "attention.out_proj": "attn.c_proj", "feed_forward.up": "mlp.c_fc",
             "feed_forward.down": "mlp.c_proj"}  # fmt: skip
    for kind in ("weight", "bias"):
        ours[f"norm.{kind}"] = theirs[f"ln_f.{kind}"]
        for i in range(config.num_layers):
            for name, their_name in names.items():
                tensor = theirs[f"h.{i}.{their_name}.{kind}"]
                # GPT-2 keeps its matrices as (in, out).
                ours[f"blocks.{i}.{name}.{kind}"] = tensor.T if tensor.dim() == 2 else tensor
            parts = theirs[f"h.{i}.attn.c_attn.{kind}"].chunk(3, dim=-1)
            for name, part in zip("qkv", parts, strict=True):
                ours[f"blocks.{i}.attention.{name}_proj.{kind}"] = part.T if part.dim() == 2 else part
    return ours


def _from_llama(theirs: dict[str, Tensor], config: GptConfig) -> dict[str, Tensor]:
    ours = {"embedding.weight": theirs["embed_tokens.weight"], "norm.weight": theirs["norm.weight"]}
    ours["head.weight"] = theirs.get("lm_head.weight", theirs["embed_tokens.weight"])
    names = {"norm1": "input_layernorm", "norm2": "post_attention_layernorm", "attention.out_proj": "self_attn.o_proj"}
    names |= {f"attention.{part}_proj": f"self_attn.{part}_proj" for part in "qkv"}
    names |= {f"feed_forward.{part}": f"mlp.{part}_proj" for part in ("gate", "up", "down")}
    for i in range(config.num_layers):
        for name, their_name in names.items():
            ours[f"blocks.{i}.{name}.weight"] = theirs[f"layers.{i}.{their_name}.weight"]
    return ours


def from_pretrained(folder: Path) -> Gpt:
    """The model of a Hugging Face folder (config.json and model.safetensors), in eval mode."""
    from safetensors.torch import load_file

    folder = Path(folder)
    config = config_from_dict(json.loads((folder / "config.json").read_text()))
    model = Gpt(config)
    model.load_state_dict(convert_state_dict(load_file(folder / "model.safetensors"), config))
    return model.eval()
