"""Held-out data as each kind of model reads it, and what the model is worth on it."""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from models import data
from models.bert_heads import IGNORED, classification_scores, mask_words, pretraining_loss, replace_words
from models.gpt import causal_lm_loss
from models.training import Batch
from models.transformer import Transformer, translation_loss

# --- Measures: what a model is worth on data that it was not trained on ----------------------------------------------

Measure = Callable[[nn.Module], dict[str, float]]


@torch.no_grad()
def mean_loss(
    model: nn.Module,
    loss: Callable[[nn.Module, Batch], Tensor],
    batches: Iterable[Batch],
    tokens: Callable[[Batch], int],
    most: int = 50,
) -> float:
    """The mean over the tokens of the first ``most`` batches; ``loss`` is the mean over one batch's ``tokens``."""
    device = next(model.parameters()).device
    total, count = 0.0, 0
    for batch in itertools.islice(batches, most):
        weight = tokens(batch)
        total += weight * loss(model, {name: tensor.to(device) for name, tensor in batch.items()}).item()
        count += weight
    return total / count


def language_measure(validation: data.TokenStream) -> Measure:
    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return causal_lm_loss(model, batch["input_ids"])

    def measure(model: nn.Module) -> dict[str, float]:
        value = mean_loss(model, loss, validation.in_order(), lambda batch: batch["input_ids"][:, 1:].numel())
        return {"validation_loss": value, "perplexity": math.exp(min(value, 100.0))}

    return measure


def pretraining_measure(validation: data.Examples, corrupt: Callable[[Batch, torch.Generator], Batch]) -> Measure:
    def measure(model: nn.Module) -> dict[str, float]:
        generator = torch.Generator().manual_seed(0)
        batches = (corrupt(batch, generator) for batch in validation.in_order())
        # Each objective asks about a number of its own, all in proportion to the tokens read.
        return {
            "validation_loss": mean_loss(model, pretraining_loss, batches, lambda batch: batch["input_ids"].numel())
        }

    return measure


def translation_measure(validation: data.Examples, tokenizer: Tokenizer, most: int = 100) -> Measure:
    """The loss, and BLEU of the greedy translations of the first ``most`` pairs."""

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return translation_loss(model, batch["source"], batch["target"], data.PAD, 0.0)

    def tokens(batch: Batch) -> int:
        return int((batch["target"][:, 1:] != data.PAD).sum())

    def measure(model: nn.Module) -> dict[str, float]:
        whole: Transformer = getattr(model, "module", model)  # type: ignore[assignment]
        sources, targets = (validation.fields[name][:most] for name in ("source", "target"))
        ids = data.pad(sources).to(whole.positions.device)
        found = [tokenizer.decode(tokens) for tokens in whole.translate(ids, whole.config.max_positions)]
        score = bleu(found, [tokenizer.decode(tokens) for tokens in targets])
        return {"validation_loss": mean_loss(model, loss, validation.in_order(), tokens), "bleu": score}

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


def _words(text: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]", text)


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
