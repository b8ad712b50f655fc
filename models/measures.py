"""Held-out data as each kind of model reads it, and what the model is worth on it."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from models import data
from models.bert_heads import IGNORED, classification_scores, mask_words, pretraining_losses, replace_words
from models.gpt import causal_lm_loss
from models.training import Batch
from models.transformer import Transformer, translation_loss

# --- Measures: what a model is worth on data that it was not trained on ----------------------------------------------

Measure = Callable[[nn.Module], dict[str, float]]


@torch.no_grad()
def mean_losses(
    model: nn.Module, losses: Callable[[nn.Module, Batch], list[tuple[Tensor, int]]], batches: Iterable[Batch]
) -> list[float]:
    """The means over all that is asked in ``batches``; ``losses`` gives means of one batch, and of how many answers."""
    device = next(model.parameters()).device
    measured = [losses(model, {name: tensor.to(device) for name, tensor in batch.items()}) for batch in batches]
    return [
        sum(count * mean.item() for mean, count in objective) / max(sum(count for _, count in objective), 1)
        for objective in zip(*measured, strict=True)
    ]


def language_measure(validation: data.TokenStream) -> Measure:
    def losses(model: nn.Module, batch: Batch) -> list[tuple[Tensor, int]]:
        return [(causal_lm_loss(model, batch["input_ids"]), batch["input_ids"][:, 1:].numel())]

    def measure(model: nn.Module) -> dict[str, float]:
        (value,) = mean_losses(model, losses, validation.in_order())
        return {"validation_loss": value, "perplexity": math.exp(min(value, 100.0))}

    return measure


def pretraining_measure(validation: data.Examples, corrupt: Callable[[Batch, torch.Generator], Batch]) -> Measure:
    """The sum over the objectives; what is hidden or replaced depends on the size of the batches of ``validation``."""

    def measure(model: nn.Module) -> dict[str, float]:
        generator = torch.Generator().manual_seed(0)
        batches = (corrupt(batch, generator) for batch in validation.in_order())
        return {"validation_loss": sum(mean_losses(model, pretraining_losses, batches))}

    return measure


def translation_measure(validation: data.Examples, tokenizer: Tokenizer) -> Measure:
    """The loss, and BLEU of the greedy translations."""

    def losses(model: nn.Module, batch: Batch) -> list[tuple[Tensor, int]]:
        tokens = int((batch["target"][:, 1:] != data.PAD).sum())
        return [(translation_loss(model, batch["source"], batch["target"], data.PAD, 0.0), tokens)]

    def measure(model: nn.Module) -> dict[str, float]:
        whole: Transformer = getattr(model, "module", model)  # type: ignore[assignment]
        found, wanted = [], []
        for batch in validation.in_order():
            found += whole.translate(batch["source"].to(whole.positions.device), whole.config.max_positions)
            wanted += batch["target"].tolist()
        score = bleu(*([tokenizer.decode(tokens) for tokens in texts] for texts in (found, wanted)))
        (value,) = mean_losses(model, losses, validation.in_order())
        return {"validation_loss": value, "bleu": score}

    return measure


def bleu(candidates: Sequence[str], references: Sequence[str], longest: int = 4) -> float:
    """Corpus BLEU, 0 to 100, of words and punctuation marks; one reference each (Papineni et al. 2002, section 2.3)."""
    hits, counts = [0] * longest, [0] * longest
    pairs = [
        tuple(re.findall(r"\w+|[^\w\s]", text) for text in pair) for pair in zip(candidates, references, strict=True)
    ]
    for candidate, reference in pairs:
        for n in range(longest):
            ours, theirs = (
                Counter(tuple(words[i : i + n + 1]) for i in range(len(words) - n)) for words in (candidate, reference)
            )
            hits[n] += (ours & theirs).total()
            counts[n] += ours.total()
    if min(hits) == 0:
        return 0.0
    lengths = [sum(len(pair[i]) for pair in pairs) for i in (0, 1)]
    brevity = min(0.0, 1 - lengths[1] / lengths[0])
    precision = sum(math.log(hit / count) for hit, count in zip(hits, counts, strict=True)) / longest
    return 100 * math.exp(brevity + precision)


def classification_measure(validation: data.Examples, num_classes: int) -> Measure:
    @torch.no_grad()
    def measure(model: nn.Module) -> dict[str, float]:
        device = next(model.parameters()).device
        predicted, actual = [], []
        for batch in validation.in_order():
            predicted += model(batch["input_ids"].to(device)).argmax(-1).tolist()
            actual += batch["labels"].tolist()
        return classification_scores(predicted, actual, num_classes)

    return measure


# --- Data as the models read it --------------------------------------------------------------------------------------


def language_data(tokenizer: Tokenizer, paragraphs: list[str], context: int, batch_size: int) -> data.TokenStream:
    tokens = torch.tensor(tokenizer.encode("\n\n".join(paragraphs)).ids)
    return data.TokenStream(tokens, context, batch_size)


def pretraining_data(tokenizer: Tokenizer, paragraphs: list[str], context: int, batch_size: int) -> data.Examples:
    """Halves of windows of text, <s> first </s> second </s>: half of the time the second really follows."""
    tokens = tokenizer.encode("\n\n".join(paragraphs), add_special_tokens=False).ids
    half = (context - 3) // 2
    windows = [tokens[start : start + 2 * half] for start in range(0, len(tokens) - 2 * half, half)]
    if not windows:
        raise data.DataError(f"the text has {len(tokens)} tokens; a context of {context} needs more.")
    fields: dict[str, list] = {"input_ids": [], "token_type_ids": [], "sentence_labels": []}
    for i, window in enumerate(windows):
        follows = i % 2
        second = window[half:] if follows else windows[(i * 7 + len(windows) // 2) % len(windows)][half:]
        fields["input_ids"].append([data.START, *window[:half], data.STOP, *second, data.STOP])
        fields["token_type_ids"].append([0] * (half + 2) + [1] * (half + 1))
        fields["sentence_labels"].append(follows)
    return data.Examples(fields, batch_size)


def translation_data(tokenizer: Tokenizer, pairs: list, context: int, batch_size: int) -> data.Examples:
    sources = data.encode(tokenizer, [source for source, _ in pairs], context)
    targets = data.encode(tokenizer, [target for _, target in pairs], context)
    return data.Examples({"source": sources, "target": targets}, batch_size)


def classification_data(tokenizer: Tokenizer, pairs: list, context: int, batch_size: int) -> data.Examples:
    ids = data.encode(tokenizer, [text for text, _ in pairs], context)
    return data.Examples({"input_ids": ids, "labels": [label for _, label in pairs]}, batch_size)


def corrupted(batch: Batch, generator: torch.Generator, *, objectives: Sequence[str], vocab_size: int) -> Batch:
    """A batch as the objectives ask about it, with their labels."""
    ids, labels, first_word = batch["input_ids"], {}, len(data.SPECIAL_TOKENS)
    if "next" in objectives:
        labels["sentence_labels"] = batch["sentence_labels"]
    if "replaced" in objectives:
        ids, labels["replaced_labels"] = replace_words(ids, generator, first_word)
    if "masked" in objectives:
        original = batch["input_ids"]
        hidden, asked = mask_words(ids, generator, vocab_size, data.MASK, first_word)
        # A word is asked about once: as a hidden one it is no replaced one.
        labels["word_labels"] = torch.where(asked == IGNORED, IGNORED, original)
        if "replaced_labels" in labels:
            labels["replaced_labels"] = labels["replaced_labels"].masked_fill(asked != IGNORED, IGNORED)
        ids = hidden
    return {"input_ids": ids, "token_type_ids": batch["token_type_ids"], **labels}
