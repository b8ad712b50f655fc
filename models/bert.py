"""BERT: embeddings and a torch.nn.TransformerEncoder, whose modules ``fastattn.accelerate`` can swap.

In inference nn.TransformerEncoder takes PyTorch's fast path and packs padded batches, so this is no straw man.
Loads the weights and config.json of Hugging Face BERT checkpoints (BERT, MiniLM, and the encoders trained from them).
Source: Devlin et al. 2018 (arXiv:1810.04805); post-norm layers of Vaswani et al. 2017 (arXiv:1706.03762).
"""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import fastattn
from models.bert_fused import fused_encoder, is_swapped

ACTIVATIONS = {
    "gelu": F.gelu,
    # Not nn.GELU("tanh"): nn.TransformerEncoderLayer takes every nn.GELU for the exact one on its fast path.
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}


@dataclass(frozen=True)
class BertConfig:
    """The fields of a Hugging Face config.json that this encoder uses; same names, BERT-base defaults."""

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    pad_token_id: int = 0

    def __post_init__(self) -> None:
        if self.num_attention_heads < 1 or self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"BertConfig: hidden_size {self.hidden_size} must be a multiple of num_attention_heads "
                f"{self.num_attention_heads}."
            )

    @classmethod
    def from_json(cls, path: Path) -> BertConfig:
        """Reads a config.json; fields this model has no use for are left out.

        Raises: ValueError if the file describes a model that is not this encoder.
        """
        values = json.loads(Path(path).read_text())
        for name, required in (("model_type", "bert"), ("position_embedding_type", "absolute"), ("is_decoder", False)):
            if values.get(name, required) != required:
                raise ValueError(f"BertConfig: {path} has {name} {values[name]!r}; this encoder needs {required!r}.")
        activation = values.get("hidden_act", "gelu")
        if activation not in ACTIVATIONS:
            raise ValueError(f"BertConfig: hidden_act must be one of {', '.join(ACTIVATIONS)}, got {activation!r}.")
        return cls(**{field.name: values[field.name] for field in fields(cls) if field.name in values})


class BertEmbeddings(nn.Module):
    """Word, position and segment embeddings, added and normalised: (batch, seqlen) ids to (batch, seqlen, hidden)."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.word = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.position = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, input_ids: Tensor, token_type_ids: Tensor | None, prompt: Tensor | None = None) -> Tensor:
        words = self.word(input_ids)
        if prompt is not None:
            words = torch.cat([prompt, words], dim=1)
            if token_type_ids is not None:
                token_type_ids = torch.cat([token_type_ids[:, :1].expand(prompt.shape[:2]), token_type_ids], dim=1)
        positions = self.position.weight[: words.shape[1]]  # (seqlen, hidden)
        # Row 0 is the segment of every token of a single sentence, so absent ids need no tensor of zeros.
        segments = self.token_type.weight[0] if token_type_ids is None else self.token_type(token_type_ids)
        return self.dropout(self.norm(words + (positions + segments)))


def bert_layers(config: BertConfig) -> nn.TransformerEncoder:
    """BERT's stack: self-attention, then a feed-forward network, each with dropout, a residual and a norm after it."""
    layer = nn.TransformerEncoderLayer(
        config.hidden_size, config.num_attention_heads, config.intermediate_size, config.hidden_dropout_prob,
        ACTIVATIONS[config.hidden_act], config.layer_norm_eps, batch_first=True,
    )  # fmt: skip
    # torch drops out inside the feed-forward network too, and one probability serves all; BERT has neither.
    layer.dropout.p = 0.0
    layer.self_attn.dropout = config.attention_probs_dropout_prob
    return nn.TransformerEncoder(layer, config.num_hidden_layers)


class BertEncoder(nn.Module):
    """BERT without a task head."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.config = config
        self.backend = "auto"  # set by models.layers.set_backend
        self.embeddings = BertEmbeddings(config)
        self.encoder = bert_layers(config)
        for name, parameter in self.named_parameters():
            if "norm" not in name:
                # BERT's own; nn.TransformerEncoder would start every layer with the same weights.
                nn.init.normal_(parameter, std=0.02) if parameter.dim() > 1 else nn.init.zeros_(parameter)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None,
        prompt: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """The last hidden states.

        Args:
            input_ids: (batch, seqlen) int64 token ids; seqlen at most ``config.max_position_embeddings``.
            attention_mask: (batch, seqlen), 1 or True where there is a token, 0 or False where there is padding;
                absent = no padding, which saves the search for it.
            token_type_ids: (batch, seqlen) int64, 0 for the first sentence and 1 for the second; absent = all 0.
            prompt: (batch, prompt_tokens, hidden_size), stands in front of the text; ``attention_mask`` counts it.
        Returns: (batch, seqlen, hidden_size). States of padding tokens mean nothing.
        Raises: ValueError for a sequence longer than the position embeddings reach.
        """
        seqlen, limit = input_ids.shape[1], self.config.max_position_embeddings
        seqlen += 0 if prompt is None else prompt.shape[1]
        if seqlen > limit:
            raise ValueError(f"BertEncoder: input_ids has {seqlen} tokens; the model has positions for {limit}.")
        visible = None if attention_mask is None else attention_mask != 0
        embedded = self.embeddings(input_ids, token_type_ids, prompt)
        # The norms have no backend of their own to set: they follow the preference.
        with nullcontext() if self.backend == "auto" else fastattn.use_backend(self.backend):
            if is_swapped(self.encoder):
                return fused_encoder(self.encoder, embedded, visible)
            # torch.nn's sense is True = ignore.
            return self.encoder(embedded, src_key_padding_mask=None if visible is None else ~visible)

    @classmethod
    def from_pretrained(cls, folder: Path) -> BertEncoder:
        """The encoder of a Hugging Face folder (config.json and model.safetensors), in eval mode."""
        from safetensors.torch import load_file

        folder = Path(folder)
        model = cls(BertConfig.from_json(folder / "config.json"))
        model.load_state_dict(convert_state_dict(load_file(folder / "model.safetensors"), model.config))
        return model.eval()


# Where our modules are in a Hugging Face BERT; {i} is the layer.
_EMBEDDINGS = {
    "embeddings.word": "embeddings.word_embeddings",
    "embeddings.position": "embeddings.position_embeddings",
    "embeddings.token_type": "embeddings.token_type_embeddings",
}
_WITH_BIAS = {
    "embeddings.norm": "embeddings.LayerNorm",
    "encoder.layers.{i}.self_attn.out_proj": "encoder.layer.{i}.attention.output.dense",
    "encoder.layers.{i}.norm1": "encoder.layer.{i}.attention.output.LayerNorm",
    "encoder.layers.{i}.linear1": "encoder.layer.{i}.intermediate.dense",
    "encoder.layers.{i}.linear2": "encoder.layer.{i}.output.dense",
    "encoder.layers.{i}.norm2": "encoder.layer.{i}.output.LayerNorm",
}


def convert_state_dict(theirs: dict[str, Tensor], config: BertConfig) -> dict[str, Tensor]:
    """A Hugging Face BERT's state dict under this module's names, with query, key and value fused as torch.nn has them.

    Accepts the ``bert.`` prefix of checkpoints with a task head. The pooler and the heads are left out.
    Raises: KeyError if a parameter of the encoder is missing.
    """
    theirs = {name.removeprefix("bert."): tensor for name, tensor in theirs.items()}
    layers = range(config.num_hidden_layers)
    ours = {f"{name}.weight": theirs[f"{their_name}.weight"] for name, their_name in _EMBEDDINGS.items()}
    modules = {name.format(i=i): their_name.format(i=i) for i in layers for name, their_name in _WITH_BIAS.items()}
    for kind in ("weight", "bias"):
        ours |= {f"{name}.{kind}": theirs[f"{their_name}.{kind}"] for name, their_name in modules.items()}
        for i in layers:
            parts = [theirs[f"encoder.layer.{i}.attention.self.{part}.{kind}"] for part in ("query", "key", "value")]
            ours[f"encoder.layers.{i}.self_attn.in_proj_{kind}"] = torch.cat(parts)
    return ours
