"""What BERT is trained with: heads that predict hidden words, the next sentence, replaced words, and classes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.bert import ACTIVATIONS, BertConfig, BertEncoder
from models.layers import at_least_float32

IGNORED = -100  # label of a token that is not asked about


class BertForPreTraining(nn.Module):
    """Masked words (arXiv:1810.04805, section 3.1), next sentence, and replaced words (arXiv:2003.10555)."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.bert = BertEncoder(config)
        self.transform = nn.Linear(config.hidden_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.words = nn.Linear(config.hidden_size, config.vocab_size)
        self.next_sentence = nn.Linear(config.hidden_size, 2)
        self.replaced = nn.Linear(config.hidden_size, 1)
        for layer in (self.transform, self.words, self.next_sentence, self.replaced):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        self.words.weight = self.bert.embeddings.word.weight

    def forward(self, input_ids: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        """States that the heads read: (batch, seqlen, hidden_size)."""
        return self.bert(input_ids, input_ids != self.bert.config.pad_token_id, token_type_ids)

    def train_for(self, objectives: Sequence[str]) -> None:
        """Leaves untrained what no objective reads: it gets no gradient, which data parallelism would wait for."""
        heads = {
            "masked": (*self.transform.parameters(), *self.norm.parameters(), self.words.bias),
            "next": tuple(self.next_sentence.parameters()),
            "replaced": tuple(self.replaced.parameters()),
        }
        for objective, parameters in heads.items():
            for parameter in parameters:
                parameter.requires_grad_(objective in objectives)

    def word_logits(self, states: Tensor) -> Tensor:
        """(..., hidden_size) to (..., vocab_size)."""
        return self.words(self.norm(ACTIVATIONS[self.bert.config.hidden_act](self.transform(states))))


def mask_words(
    input_ids: Tensor, generator: torch.Generator, vocab_size: int, mask_id: int, first_word: int, share: float = 0.15
) -> tuple[Tensor, Tensor]:
    """Hides words as BERT does: of 15 % of the words, 80 % become the mask, 10 % another word, 10 % stay.

    Args:
        input_ids: (batch, seqlen); ids below ``first_word`` are special tokens and never asked about.
    Returns: the ids to read, and the labels, ``IGNORED`` where nothing is asked.
    """
    asked = (torch.rand(input_ids.shape, generator=generator) < share) & (input_ids >= first_word)
    fate = torch.rand(input_ids.shape, generator=generator)
    others = torch.randint(first_word, vocab_size, input_ids.shape, generator=generator)
    hidden = torch.where(fate < 0.8, mask_id, torch.where(fate < 0.9, others, input_ids))
    return torch.where(asked, hidden, input_ids), torch.where(asked, input_ids, IGNORED)


def replace_words(
    input_ids: Tensor, generator: torch.Generator, first_word: int, share: float = 0.15
) -> tuple[Tensor, Tensor]:
    """Puts words of the same batch in the place of some: the ids to read, and 1 where a word differs, else 0.

    Special tokens are ``IGNORED``. Words that occur often replace often, as ELECTRA's generator would have it.
    """
    words = input_ids >= first_word
    pool = input_ids[words]
    drawn = pool[torch.randint(len(pool), input_ids.shape, generator=generator)]
    replaced = torch.where((torch.rand(input_ids.shape, generator=generator) < share) & words, drawn, input_ids)
    return replaced, torch.where(words, (replaced != input_ids).long(), IGNORED)


def pretraining_losses(model: nn.Module, batch: dict[str, Tensor]) -> list[tuple[Tensor, int]]:
    """Of each objective that ``batch`` has labels for, the mean loss and how many labels it is the mean of.

    Fields: input_ids, token_type_ids (optional), and of word_labels (batch, seqlen), sentence_labels (batch,) and
    replaced_labels (batch, seqlen) those wanted. A small batch may hold no label: the loss is 0 then.
    """
    heads: BertForPreTraining = getattr(model, "module", model)  # type: ignore[assignment]
    states = model(batch["input_ids"], batch.get("token_type_ids"))
    sums = []
    if "word_labels" in batch:
        asked = batch["word_labels"] != IGNORED
        # The widest matrix of the model meets only the words that are asked about.
        logits, labels = at_least_float32(heads.word_logits(states[asked])), batch["word_labels"][asked]
        sums.append((F.cross_entropy(logits, labels, reduction="sum"), len(labels)))
    if "sentence_labels" in batch:
        logits, labels = at_least_float32(heads.next_sentence(states[:, 0])), batch["sentence_labels"]
        sums.append((F.cross_entropy(logits, labels, reduction="sum"), len(labels)))
    if "replaced_labels" in batch:
        asked = batch["replaced_labels"] != IGNORED
        logits = at_least_float32(heads.replaced(states)[..., 0][asked])
        labels = batch["replaced_labels"][asked].to(logits.dtype)
        sums.append((F.binary_cross_entropy_with_logits(logits, labels, reduction="sum"), len(labels)))
    return [(total / max(count, 1), count) for total, count in sums]


def pretraining_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The sum of the losses that ``batch`` has labels for, as ``pretraining_losses`` takes it."""
    return torch.stack([loss for loss, _ in pretraining_losses(model, batch)]).sum()


class BertClassifier(nn.Module):
    """Classes of whole texts, from the mean of the encoder's states.

    With ``prompt_tokens``, as many learned vectors stand in front of every text (arXiv:2104.08691): trained alone, they
    adapt an encoder that stays as it is.
    """

    def __init__(self, encoder: BertEncoder, num_classes: int, prompt_tokens: int = 0) -> None:
        super().__init__()
        hidden = encoder.config.hidden_size
        self.bert = encoder
        self.prompt = nn.Parameter(torch.randn(prompt_tokens, hidden) * 0.02) if prompt_tokens else None
        self.dropout = nn.Dropout(encoder.config.hidden_dropout_prob)
        self.classifier = nn.Linear(hidden, num_classes)

    def forward(self, input_ids: Tensor) -> Tensor:
        """(batch, seqlen) ids, padded with the encoder's pad_token_id, to (batch, num_classes) logits."""
        visible = input_ids != self.bert.config.pad_token_id
        prompt = None if self.prompt is None else self.prompt.expand(len(input_ids), -1, -1)
        if prompt is not None:
            visible = torch.cat([visible.new_ones(prompt.shape[:2]), visible], dim=1)
        states = self.bert(input_ids, visible, prompt=prompt)
        total = torch.where(visible[..., None], states, 0.0).sum(1)
        return self.classifier(self.dropout(total / visible.sum(1, keepdim=True)))


def classification_scores(predicted: list[int], actual: list[int], num_classes: int) -> dict[str, float]:
    """Accuracy, and precision, recall and F1 averaged over the classes (macro)."""
    accuracy = sum(p == a for p, a in zip(predicted, actual, strict=True)) / max(len(actual), 1)
    precisions, recalls, f1s = [], [], []
    for label in range(num_classes):
        hits = sum(p == a == label for p, a in zip(predicted, actual, strict=True))
        precisions.append(hits / max(predicted.count(label), 1))
        recalls.append(hits / max(actual.count(label), 1))
        f1s.append(2 * hits / max(predicted.count(label) + actual.count(label), 1))
    averages = (sum(values) / num_classes for values in (precisions, recalls, f1s))
    return {"accuracy": accuracy, **dict(zip(("precision", "recall", "f1"), averages, strict=True))}
