"""Training steps of the models on a GPU, under bfloat16 autocast as one trains them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import cache, partial

import torch
from torch import Tensor, nn

from bench import gpu_peers
from bench.bench_generation import GPT2, with_sdpa
from bench.case import Case, Subject, as_accurate_as_eager, seeded_generator
from models.gpt import Gpt, GptConfig, causal_lm_loss
from models.layers import set_backend

GROUP = "models"
# What is compared with float64, whose attention matrix and logits would not fit at the whole size.
CHECKED_BATCH, CHECKED_SEQLEN = 1, 256


def cases() -> Iterator[Case]:
    yield gpt_training_step("GPT-2 124M training step", 8, 1024, GPT2)


def gpt_training_step(name: str, batch: int, seqlen: int, config: GptConfig) -> Case:
    """Loss and gradients of every parameter. Peers: the model on plain PyTorch, on SDPA, and that compiled."""
    weights = 12 * config.num_layers * config.dim**2 + config.dim * config.vocab_size
    return Case(
        GROUP, name, f"{batch}×{seqlen}", "bfloat16", partial(build_gpt_training_step, batch, seqlen, config),
        flops=6 * batch * seqlen * (weights + config.num_layers * seqlen * config.dim), bytes=12 * weights, quick=True,
        headline=name,
    )  # fmt: skip


def build_gpt_training_step(batch: int, seqlen: int, config: GptConfig) -> Subject:
    ours, eager, sdpa = make_models(config, str(torch.get_default_device()))
    ids = torch.randint(config.vocab_size, (batch, seqlen + 1), generator=seeded_generator(1))
    few = ids[:CHECKED_BATCH, : CHECKED_SEQLEN + 1]
    check = as_accurate_as_eager(
        lambda: compared(training_step(ours, few)), lambda: compared(training_step(eager, few)),
        lambda: compared(training_step(copy.deepcopy(eager).double(), few)), ("loss", "gradients"),
    )  # fmt: skip
    peers: dict[str, Callable[[], object]] = {
        "SDPA": partial(training_step, sdpa, ids),
        "eager": partial(training_step, eager, ids),
        "torch.compile": lambda: training_step(gpu_peers.compiled(sdpa), ids),
    }
    return Subject(partial(training_step, ours, ids), gpu_peers.available(peers), check)


# Once for all copies of a case: the weights alone are more than L2 holds.
@cache
def make_models(config: GptConfig, device: str) -> tuple[nn.Module, nn.Module, nn.Module]:
    """Ours, on plain PyTorch, and on SDPA."""
    torch.manual_seed(0)
    eager = set_backend(Gpt(config), "eager")
    return set_backend(copy.deepcopy(eager), "auto"), eager, with_sdpa(copy.deepcopy(eager))


def training_step(model: nn.Module, ids: Tensor) -> list[Tensor]:
    parameters = dict(model.named_parameters())
    wide = next(iter(parameters.values())).dtype == torch.float64
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=not wide):
        loss = causal_lm_loss(model, ids)
    # The softmax does not change if every key moves alike: this gradient is 0, and what comes out is noise.
    learned = [parameter for name, parameter in parameters.items() if not name.endswith("k_proj.bias")]
    return [loss, *torch.autograd.grad(loss, learned)]


@torch.no_grad()
def compared(results: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The loss, and all gradients in one vector, each tensor's divided by its root mean square."""
    loss, *gradients = results
    return loss, torch.cat([(g / g.double().square().mean().sqrt().clamp_min(1e-30)).flatten() for g in gradients])
