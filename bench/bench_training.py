"""Training steps of the models, loss and gradients, each against the same model on plain PyTorch.

README.md beside this file says how the gradients of a whole model are judged, and why.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from bench.bench_generation import translation_pairs, with_memory, with_sdpa
from bench.case import Case, Subject, Verdict, as_accurate_as_eager
from models.bert import BertConfig
from models.bert_heads import BertForPreTraining, mask_words, pretraining_loss
from models.gpt import Gpt, GptConfig, causal_lm_loss
from models.layers import set_backend
from models.transformer import Transformer, TransformerConfig, translation_loss

GROUP = "models"
MINILM = BertConfig(
    hidden_size=384, num_hidden_layers=6, intermediate_size=1536, hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0, hidden_act="gelu",
)  # fmt: skip
Loss = Callable[[nn.Module], Tensor]
Step = Callable[[], Sequence[Tensor]]  # the loss, then gradients


def cases() -> Iterator[Case]:
    for compiled in (False, True):
        yield gpt_training_step(2, 256, compiled)
        yield bert_training_step(8, 128, compiled)
        yield translation_training_step(8, 64, compiled)


def gpt_training_step(batch: int, seqlen: int, compiled: bool) -> Case:
    """Loss and gradients of every parameter, of a decoder half as wide and a third as deep as GPT-2."""
    config = GptConfig(vocab_size=4096, dim=384, num_layers=4, num_heads=6, hidden_dim=1536, dropout=0.0)

    def build() -> Subject:
        torch.manual_seed(0)
        eager = set_backend(Gpt(config), "eager")
        ids = torch.randint(config.vocab_size, (batch, seqlen + 1), generator=torch.Generator().manual_seed(1))
        return training_subject(lambda model: causal_lm_loss(model, ids), eager, forms(eager, compiled))

    weights = 4 * 12 * config.dim**2 + config.dim * config.vocab_size
    return Case(
        GROUP, "GPT training step", f"{batch}×{seqlen}×{config.dim}{suffix(compiled)}", "float32", build,
        flops=6 * batch * seqlen * (weights + config.num_layers * seqlen * config.dim), bytes=12 * weights,
    )  # fmt: skip


def bert_training_step(batch: int, seqlen: int, compiled: bool) -> Case:
    """Masked words: loss and gradients of every parameter of an encoder of MiniLM's shape, half padding."""

    def build() -> Subject:
        torch.manual_seed(0)
        stock = BertForPreTraining(MINILM)
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(1000, MINILM.vocab_size, (batch, seqlen), generator=generator)
        lengths = torch.linspace(seqlen / 4, seqlen, batch).long()
        ids[torch.arange(seqlen) >= lengths[:, None]] = MINILM.pad_token_id
        hidden, labels = mask_words(ids, generator, MINILM.vocab_size, 103, 1000)
        fields = {"input_ids": hidden, "word_labels": labels}
        peers: dict[str, nn.Module] = {"nn encoder": stock}
        if compiled:
            fast = copy.deepcopy(stock)
            fast.bert = torch.compile(fast.bert)  # type: ignore[assignment]
            peers = {"torch.compile": fast}
        unused = ("next_sentence", "replaced")
        return training_subject(lambda model: pretraining_loss(model, fields), stock, peers, unused)

    weights = 6 * (4 * 384**2 + 2 * 384 * 1536)
    return Case(
        GROUP, "BERT training step", f"{batch}×{seqlen}×384 padded{suffix(compiled)}", "float32",
        build, flops=6 * batch * seqlen * weights, bytes=12 * (weights + 384 * MINILM.vocab_size),
        headline="" if compiled else "BERT training step",
    )  # fmt: skip


def translation_training_step(batch: int, seqlen: int, compiled: bool) -> Case:
    """Label-smoothed loss and gradients of every parameter of a small encoder-decoder, half of the sources padding."""
    config = TransformerConfig(
        vocab_size=8192, dim=256, num_encoder_layers=3, num_decoder_layers=3, num_heads=4, hidden_dim=1024, dropout=0.0
    )

    def build() -> Subject:
        torch.manual_seed(0)
        eager = set_backend(Transformer(config), "eager")
        source, target = translation_pairs(batch, seqlen, seqlen + 1, config)
        return training_subject(
            lambda model: translation_loss(model, source, target, config.pad_id), eager, forms(eager, compiled)
        )

    encoder = config.num_encoder_layers * (4 * config.dim**2 + 2 * config.dim * config.hidden_dim)
    decoder = config.num_decoder_layers * (8 * config.dim**2 + 2 * config.dim * config.hidden_dim)
    weights = encoder + decoder + config.dim * config.vocab_size
    attended = (config.num_encoder_layers + 1.5 * config.num_decoder_layers) * seqlen * config.dim
    return Case(
        GROUP, "Transformer training step", f"{batch}×{seqlen}×{config.dim} padded{suffix(compiled)}", "float32", build,
        flops=6 * batch * seqlen * (weights + attended), bytes=12 * weights,
    )  # fmt: skip


def suffix(compiled: bool) -> str:
    return ", compiled peer" if compiled else ""


def forms(eager: nn.Module, compiled: bool) -> dict[str, nn.Module]:
    """PyTorch's forms of a model of ``models.layers``. Compiling takes a minute: that peer has a row of its own."""
    sdpa = with_sdpa(copy.deepcopy(eager))
    return {"torch.compile": torch.compile(sdpa)} if compiled else {"SDPA": sdpa, "eager": eager}  # type: ignore[dict-item]


def training_subject(
    loss: Loss, eager: nn.Module, peers: dict[str, nn.Module], unused: tuple[str, ...] = ()
) -> Subject:
    """``eager`` swapped, against ``peers``. Parameters whose names begin with one of ``unused`` take no part."""
    names = [name for name, _ in eager.named_parameters() if not name.startswith(unused)]
    ours = set_backend(copy.deepcopy(eager), "auto")

    def step(model: nn.Module) -> tuple[Tensor, ...]:
        value = loss(model)
        learned = [parameter for name, parameter in model.named_parameters() if not name.startswith(unused)]
        return value, *torch.autograd.grad(value, learned)

    run = {name: partial(step, model) for name, model in peers.items()}
    check = check_of_step(partial(step, ours), partial(step, eager), lambda: step(copy.deepcopy(eager).double()), names)
    return Subject(partial(step, ours), run, with_memory(check, partial(step, ours), next(iter(run.values()))))


def check_of_step(ours: Step, eager: Step, exact: Step, names: Sequence[str]) -> Callable[[], Verdict]:
    """The accuracy rule on a loss and the gradients of the parameters called ``names``, joined by ``judged_as``."""

    def joined(step: Step) -> list[Tensor]:
        loss, *gradients = step()
        groups: dict[str, list[Tensor]] = {}
        for name, gradient in zip(names, gradients, strict=True):
            groups.setdefault(judged_as(name), []).append(gradient)
        return [loss, *map(torch.cat, groups.values())]

    labels = ["loss", *(f"gradient of {name}" for name in dict.fromkeys(map(judged_as, names)))]
    return as_accurate_as_eager(partial(joined, ours), partial(joined, eager), partial(joined, exact), labels)


def judged_as(name: str) -> str:
    """The tensor that a parameter is judged in: an attention's query, key and value projections are one, as torch.nn's
    attention keeps them."""
    return re.sub(r"\b[qkv]_proj\.", "in_proj_", name)
