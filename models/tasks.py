"""What each command trains: the model, its data, its loss and its measure, put together from the options."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from models import data, measures
from models.bert import BertConfig, BertEncoder
from models.bert_heads import BertClassifier, BertForPreTraining, pretraining_loss
from models.checkpoints import load_weights, read_config
from models.distillation import distillation_loss
from models.gpt import Gpt, GptConfig, causal_lm_loss
from models.layers import at_least_float32
from models.minilm import find_weights
from models.training import Batch
from models.transformer import Transformer, TransformerConfig, translation_loss

Batches = Callable[[torch.Generator], Batch]
# Of each kind of task, the model and its configuration.
_CLASSES: dict[str, tuple[type[nn.Module], type]] = {
    "gpt": (Gpt, GptConfig),
    "bert": (BertForPreTraining, BertConfig),
    "translation": (Transformer, TransformerConfig),
    "classifier": (BertClassifier, BertConfig),
}
# Fixed, so that `train` and `evaluate` hide the same words of held-out text.
HELD_OUT_BATCH = 16


@dataclass
class Task:
    """Everything that ``training.train`` needs, and what a folder must keep so that the model can be loaded again."""

    kind: str
    model: nn.Module
    config: Any
    tokenizer: Tokenizer
    batches: Batches
    loss: Callable[[nn.Module, Batch], Tensor]
    measure: Callable[[nn.Module], dict[str, float]]
    extra: dict[str, Any]


# --- Language model --------------------------------------------------------------------------------------------------


def gpt(
    path: Path | None, options: dict[str, Any], *, context: int = 128, batch_size: int = 16, vocab_size: int = 2048,
    teacher: Path | None = None, llama: bool = False,
) -> Task:  # fmt: skip
    """Causal language modelling; with ``teacher``, a folder of ours, its probabilities are learned too."""
    training, held_out = data.split(data.load_text(path))
    teacher_model, tokenizer = (None, None) if teacher is None else load(teacher, "gpt")
    if teacher_model is not None and context > teacher_model.config.max_positions:
        raise data.DataError(f"{teacher} has {teacher_model.config.max_positions} positions: choose a --context below.")
    tokenizer = tokenizer or data.train_tokenizer(training, vocab_size)
    make = GptConfig.llama if llama else GptConfig
    # Room for the whole text that `generate` may be asked for.
    config = make(**{"vocab_size": tokenizer.get_vocab_size(), "max_positions": 4 * context} | options)
    if context + config.prompt_tokens > config.max_positions:
        raise data.DataError(
            f"a context of {context} has room for at most {config.max_positions - context} prompt tokens, not "
            f"{config.prompt_tokens}: choose fewer --prompt-tokens or a longer --context."
        )

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        if teacher_model is None:
            return causal_lm_loss(model, batch["input_ids"])
        inputs, labels = batch["input_ids"][:, :-1], batch["input_ids"][:, 1:].flatten()
        with torch.no_grad():
            taught = teacher_model.to(inputs.device)(inputs)
        return distillation_loss(model(inputs).flatten(0, 1), taught.flatten(0, 1), labels)

    read = partial(measures.language_data, tokenizer, context=context, batch_size=batch_size)
    source, validation = read(training), read(held_out)
    measure = measures.language_measure(validation)
    return Task("gpt", Gpt(config), config, tokenizer, source, loss, measure, {"context": context})


# --- BERT ------------------------------------------------------------------------------------------------------------


def bert(
    path: Path | None, options: dict[str, Any], *, context: int = 128, batch_size: int = 16, vocab_size: int = 2048,
    objectives: tuple[str, ...] = ("masked",),
) -> Task:  # fmt: skip
    """Pre-training with any of the objectives masked (words), next (sentence) and replaced (words)."""
    training, held_out = data.split(data.load_text(path))
    tokenizer = data.train_tokenizer(training, vocab_size, framed=True)
    config = _bert_config(tokenizer, context, options)
    corrupt = partial(measures.corrupted, objectives=objectives, vocab_size=config.vocab_size)
    source = measures.pretraining_data(tokenizer, training, context, batch_size)
    validation = measures.pretraining_data(tokenizer, held_out, context, HELD_OUT_BATCH)
    model = BertForPreTraining(config)
    model.train_for(objectives)
    return Task(
        "bert", model, config, tokenizer,
        lambda generator: corrupt(source(generator), generator), pretraining_loss,
        measures.pretraining_measure(validation, corrupt), {"context": context, "objectives": list(objectives)},
    )  # fmt: skip


def _bert_config(tokenizer: Tokenizer, positions: int, options: dict[str, Any]) -> BertConfig:
    return BertConfig(
        vocab_size=tokenizer.get_vocab_size(), max_position_embeddings=positions, pad_token_id=data.PAD, **options
    )


# --- Translation -----------------------------------------------------------------------------------------------------


def translation(
    path: Path | None, options: dict[str, Any], *, context: int = 64, batch_size: int = 32, vocab_size: int = 4096,
    language: str = "de",
) -> Task:  # fmt: skip
    """An encoder-decoder, with label smoothing."""
    training, held_out = data.split(data.load_pairs(path, language))
    tokenizer = data.train_tokenizer((text for pair in training for text in pair), vocab_size, framed=True)
    config = TransformerConfig(
        vocab_size=tokenizer.get_vocab_size(), max_positions=context, pad_id=data.PAD, start_id=data.START,
        stop_id=data.STOP, **options,
    )  # fmt: skip

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return translation_loss(model, batch["source"], batch["target"], data.PAD)

    source, validation = (
        measures.translation_data(tokenizer, part, context, batch_size) for part in (training, held_out)
    )
    measure = measures.translation_measure(validation, tokenizer)
    extra = {"context": context, "language": language}
    return Task("translation", Transformer(config), config, tokenizer, source, loss, measure, extra)


# --- Classification --------------------------------------------------------------------------------------------------


def classifier(
    path: Path | None, options: dict[str, Any], *, context: int = 64, batch_size: int = 32, vocab_size: int = 4096,
    start: Path | None = None, prompt_tokens: int = 0, teacher: Path | None = None,
) -> Task:  # fmt: skip
    """Sentiment, or any classes.

    Args:
        start: "minilm" for the pretrained sentence encoder, a folder of ``train bert``, or None to start from nothing.
        teacher: a folder of ``train classifier`` to distil; its tokenizer and classes are taken over.
    """
    texts, labels, classes = data.load_labelled(path)
    training, held_out = data.split(list(zip(texts, labels, strict=True)))
    teacher_model, encoder = None, None
    if teacher is not None:
        teacher_model, tokenizer = load(teacher, "classifier")
        if (taught := describe(teacher)["classes"]) != classes:
            raise data.DataError(f"the data has the classes {classes}; the teacher knows {taught}.")
        check_room(teacher, context + describe(teacher)["prompt_tokens"], teacher_model.bert.config)
    elif start is not None:
        encoder, tokenizer = _pretrained_encoder(start, options["hidden_dropout_prob"])
    else:
        tokenizer = data.train_tokenizer((text for text, _ in training), vocab_size, framed=True)
    if encoder is not None:
        check_room(start, context + prompt_tokens, encoder.config)
    else:
        encoder = BertEncoder(_bert_config(tokenizer, context + prompt_tokens, options))

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        logits = model(batch["input_ids"])
        if teacher_model is None:
            return nn.functional.cross_entropy(at_least_float32(logits), batch["labels"])
        with torch.no_grad():
            taught = teacher_model.to(logits.device)(batch["input_ids"])
        return distillation_loss(logits, taught, batch["labels"])

    source, validation = (
        measures.classification_data(tokenizer, part, context, batch_size) for part in (training, held_out)
    )
    extra = {"classes": classes, "prompt_tokens": prompt_tokens, "context": context}
    return Task(
        "classifier", BertClassifier(encoder, len(classes), prompt_tokens), encoder.config, tokenizer, source, loss,
        measures.classification_measure(validation, len(classes)), extra,
    )  # fmt: skip


def _pretrained_encoder(start: Path, dropout: float) -> tuple[BertEncoder, Tokenizer]:
    if str(start) != "minilm":
        model, tokenizer = load(start, "bert")
        trained = model.bert
    elif (folder := find_weights()) is not None:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        tokenizer.no_padding()
        tokenizer.no_truncation()  # it would cut at 128 tokens, whatever the context
        trained = BertEncoder.from_pretrained(folder)
    else:
        raise data.DataError("minilm is not installed: run make build")
    # The same weights, with the dropout asked for.
    rates = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    encoder = BertEncoder(dataclasses.replace(trained.config, **rates))
    encoder.load_state_dict(trained.state_dict())
    return encoder, tokenizer


def check_room(source: Path | None, tokens: int, config: BertConfig) -> None:
    if tokens > config.max_position_embeddings:
        raise data.DataError(
            f"{source} has positions for {config.max_position_embeddings} tokens; --context and prompts need {tokens}."
        )


# --- Folders ---------------------------------------------------------------------------------------------------------


def open_folder(folder: Path, task: Task, *, resume: bool, write: bool = True) -> None:
    """Makes the folder of a run, with what ``load`` needs beside the weights.

    Raises: data.DataError, before anything is written, if it holds a model already that ``resume`` does not ask for, or
    asks for with other options.
    """
    description = {"kind": task.kind, "config": dataclasses.asdict(task.config), **task.extra}
    description = json.loads(json.dumps(description))  # tuples are lists there
    if (folder / "model.safetensors").exists():
        if not resume:
            raise data.DataError(f"{folder} holds a model: go on with --resume, or choose another --out.")
        before, tokenizer = describe(folder), load_tokenizer(folder)
        flat, now = ({**each, **each["config"]} for each in (before, description))
        different = [name for name in now if name != "config" and flat.get(name) != now[name]]
        if different or tokenizer.to_str() != task.tokenizer.to_str():
            reason = f"{different[0]} was {flat.get(different[0])}" if different else "the data gave another tokenizer"
            raise data.DataError(
                f"{folder} was trained otherwise ({reason}): --resume needs the same options and data."
            )
    elif resume and write:
        print(f"{folder} holds no checkpoint yet: training starts from the beginning.")
    if write:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")
        (folder / "tokenizer.json").write_text(task.tokenizer.to_str(pretty=True), encoding="utf-8")


def load(folder: Path, kind: str) -> tuple[Any, Tokenizer]:
    """The model of a folder that ``train`` wrote, in eval mode, and its tokenizer.

    Raises: data.DataError if there is none, or it is of another kind.
    """
    folder = Path(folder)
    description = describe(folder)
    if description["kind"] != kind:
        raise data.DataError(f"{folder} holds a {description['kind']} model; this command needs a {kind} model.")
    model_class, config_class = _CLASSES[kind]
    try:
        config = read_config(config_class, description["config"])
        if kind == "classifier":
            model = BertClassifier(BertEncoder(config), len(description["classes"]), description["prompt_tokens"])
        else:
            model = model_class(config)
    except Exception as error:  # of many classes, for sizes that are none
        raise data.DataError(f"{folder / 'config.json'} does not describe a {kind} model: {error}.") from error
    try:
        load_weights(model, folder / "model.safetensors")
    except ValueError as error:
        raise data.DataError(str(error)) from error
    tokenizer = load_tokenizer(folder)
    if tokenizer.get_vocab_size() > config.vocab_size:
        raise data.DataError(
            f"{folder / 'tokenizer.json'} has {tokenizer.get_vocab_size()} tokens, the model {config.vocab_size}."
        )
    return model.eval(), tokenizer


def load_tokenizer(folder: Path) -> Tokenizer:
    path = folder / "tokenizer.json"
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the class that tokenizers raises
        raise data.DataError(f"{path} is not a tokenizer: {error}.") from error


def describe(folder: Path) -> dict[str, Any]:
    """The config.json of a folder that ``train`` wrote."""
    try:
        description = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kind, context = description["kind"], description["context"]
        if kind not in _CLASSES:
            raise ValueError(f"it holds a {kind!r}")
        known = isinstance(description["config"], dict) and isinstance(description.get("objectives", []), list)
        if not known or type(context) is not int or context < 1:
            raise ValueError("its config.json is not as training left it")
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise data.DataError(f"{folder} is not a folder that `python -m models.train` wrote: {reason}.") from error
    return description


def held_out_measure(folder: Path, path: Path | None, tokenizer: Tokenizer) -> measures.Measure:
    """The measure that training reported for the model of ``folder``, on the held-out part of the data at ``path``."""
    description = describe(folder)
    kind, sizes = description["kind"], (description["context"], HELD_OUT_BATCH)
    if kind == "translation":
        held_out = data.split(data.load_pairs(path, description.get("language", "de")))[1]
        return measures.translation_measure(measures.translation_data(tokenizer, held_out, *sizes), tokenizer)
    if kind == "classifier":
        texts, labels, classes = data.load_labelled(path)
        if classes != description["classes"]:
            raise data.DataError(f"the data has the classes {classes}; the model knows {description['classes']}.")
        held_out = data.split(list(zip(texts, labels, strict=True)))[1]
        return measures.classification_measure(measures.classification_data(tokenizer, held_out, *sizes), len(classes))
    held_out = data.split(data.load_text(path))[1]
    if kind == "gpt":
        return measures.language_measure(measures.language_data(tokenizer, held_out, *sizes))
    corrupt = partial(measures.corrupted, objectives=description["objectives"], vocab_size=tokenizer.get_vocab_size())
    return measures.pretraining_measure(measures.pretraining_data(tokenizer, held_out, *sizes), corrupt)
