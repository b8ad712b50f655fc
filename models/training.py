"""One training loop for all models: AdamW, warm-up and decay, clipping, accumulation, mixed precision, exact resume.

Under ``torchrun`` it trains data-parallel (NCCL on GPUs, gloo on CPUs): each process draws batches of its own.
"""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from models.checkpoints import finish_saving, resume_checkpoint, save_checkpoint
from models.files import in_one_step

Batch = dict[str, Tensor]
Loss = Callable[[nn.Module, Batch], Tensor]
_OVERFLOWS_IN_A_ROW = 10
PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class TrainingConfig:
    """What the loop does; one step may take several batches (``accumulation``)."""

    steps: int = 1000
    learning_rate: float = 3e-4
    warmup_steps: int = 100
    final_share: float = 0.1  # of the learning rate, where the cosine decay ends
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    accumulation: int = 1
    precision: str = "float32"  # of the autocast region; the weights stay float32
    seed: int = 0
    evaluate_every: int = 0  # 0 = at the end only
    save_every: int = 100  # and at the end

    def rate(self, step: int) -> float:
        """Learning rate of ``step`` (from 0): linear warm-up, then half a cosine (arXiv:1608.03983)."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(self.steps - self.warmup_steps, 1)
        cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
        return self.learning_rate * (self.final_share + (1 - self.final_share) * cosine)


# --- Which parameters are trained ------------------------------------------------------------------------------------


def choose_parameters(model: nn.Module, tune: str) -> int:
    """Freezes what ``tune`` leaves out and returns how many numbers are trained; what is frozen already stays so.

    Args:
        tune: "all"; "last:N", the last N layers; "feed_forward"; "prompt", learned vectors in front of the input. New
            heads (parameters whose name begins with "classifier") are trained in every case.
    Raises: ValueError for an unknown choice, for more layers than there are, or for one that leaves nothing to train.
    """
    kind, _, count = tune.partition(":")
    layers = _layers(model)
    if kind == "last" and count.isdecimal():
        if int(count) > len(layers):
            raise ValueError(f"tune {tune!r}: {type(model).__name__} has {len(layers)} layers; 'all' trains all of it.")
        chosen = {f"{name}." for name in layers[len(layers) - int(count) :]}
        keep = [name for name, _ in model.named_parameters() if any(name.startswith(prefix) for prefix in chosen)]
    elif tune == "feed_forward":
        marks = ("feed_forward.", ".linear1.", ".linear2.")
        keep = [name for name, _ in model.named_parameters() if any(mark in name for mark in marks)]
    elif tune == "prompt":
        keep = [name for name, _ in model.named_parameters() if name.split(".")[-1] == "prompt"]
    elif tune == "all":
        keep = [name for name, _ in model.named_parameters()]
    else:
        raise ValueError(f"tune must be 'all', 'last:N', 'feed_forward' or 'prompt', got {tune!r}.")
    if not keep:
        remedy = "; --prompt-tokens gives it some" if tune == "prompt" else ""
        raise ValueError(f"tune {tune!r}: {type(model).__name__} has no such parameters{remedy}.")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and (name in keep or name.startswith("classifier")))
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def _layers(model: nn.Module) -> list[str]:
    """The names of the model's layers, the members of its module lists, in order."""
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    return [f"{name}.{i}" for name, module in lists for i in range(len(module))]


# --- Processes -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Processes:
    """This process among those that train together."""

    rank: int = 0
    world: int = 1
    device: torch.device = torch.device("cpu")  # noqa: RUF009

    @classmethod
    def join(cls, device: str | None = None) -> Processes:
        """Reads what torchrun sets, and joins the group."""
        world, local = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
        if device is None:
            device = f"cuda:{local}" if torch.cuda.is_available() else "cpu"
        if world > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
        return cls(int(os.environ.get("RANK", 0)), world, torch.device(device))

    def mean(self, value: float) -> float:
        if self.world == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.item() / self.world

    def any(self, value: bool) -> bool:
        """Whether it is true of any process: all get the same answer."""
        return self.mean(float(value)) > 0


# --- The loop --------------------------------------------------------------------------------------------------------


def train(
    model: nn.Module,
    loss: Loss,
    batches: Callable[[torch.Generator], Batch],
    config: TrainingConfig,
    *,
    folder: Path | None = None,
    evaluate: Callable[[], dict[str, float]] | None = None,
    processes: Processes | None = None,
    resume: bool = False,
    report: Callable[[dict[str, float]], None] = lambda row: None,
    stop: Callable[[], bool] = lambda: False,
) -> list[dict[str, float]]:
    """Trains ``model`` and returns one row a step: step, loss, learning_rate, and what ``evaluate`` gave.

    Args:
        loss: of the model (wrapped for data parallelism, where it is) on a batch.
        batches: draws a batch with the generator that it is given.
        folder: where model.safetensors, training.safetensors and log.csv go; None = nowhere.
        resume: go on from the checkpoint in ``folder``, if there is one, to the very weights that an uninterrupted run
            ends with.
        report: called with each row.
        stop: asked after each step whether to end there, with a checkpoint; one process that says so ends all.
    """
    processes = processes or Processes()
    device = processes.device
    model.to(device).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in trained if parameter.dim() > 1]
    others = [parameter for parameter in trained if parameter.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.98))
    dtype = PRECISIONS[config.precision]
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    first, rows = 0, []
    if resume and folder is not None:
        finish_saving(folder)
        if (folder / "training.safetensors").exists():
            first = resume_checkpoint(folder, model, optimizer, scaler)
            rows = _read_log(folder / "log.csv", first)
    parallel = nn.parallel.DistributedDataParallel(model) if processes.world > 1 else model

    overflows = 0
    for step in range(first, config.steps):
        # What a step draws, and each batch of it below, depends on these numbers alone, not on what came before: a run
        # that resumes draws what it would have drawn, in every process.
        torch.manual_seed(hash((config.seed, step, processes.rank)) % 2**63)
        for group in optimizer.param_groups:
            group["lr"] = config.rate(step)
        total = 0.0
        for micro in range(config.accumulation):
            seed = hash((config.seed, step, micro, processes.rank)) % 2**63
            batch = {name: t.to(device) for name, t in batches(torch.Generator().manual_seed(seed)).items()}
            last = micro + 1 == config.accumulation
            with nullcontext() if last or processes.world == 1 else parallel.no_sync():  # type: ignore[operator]
                with torch.autocast(device.type, dtype, enabled=dtype is not None):
                    value = loss(parallel, batch) / config.accumulation
                scaler.scale(value).backward()
            total += value.item()
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(trained, config.clip_norm)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

        done = step + 1
        row = {"step": done, "loss": processes.mean(total), "learning_rate": config.rate(step), "norm": norm.item()}
        if evaluate is not None and (done == config.steps or _due(done, config.evaluate_every)):
            model.eval()
            row |= evaluate()
            model.train()
        rows.append(row)
        report(row)
        overflows = _check_finite(row, overflows, dtype)
        ends = done == config.steps or processes.any(stop())
        if folder is not None and processes.rank == 0 and (ends or _due(done, config.save_every)):
            # The log first: of one that reaches further than the checkpoint, resuming takes what it needs.
            _write_log(folder / "log.csv", rows)
            save_checkpoint(folder, model, optimizer, done, scaler)
        if ends:
            break
    model.eval()
    return rows


def _check_finite(row: dict[str, float], overflows: int, dtype: torch.dtype | None) -> int:
    """How many steps in a row were not finite, after ``overflows`` of them. Raises: FloatingPointError if too many."""
    half = dtype == torch.float16
    broken = next((name for name in (("loss",) if half else ("loss", "norm")) if not math.isfinite(row[name])), None)
    overflows = overflows + 1 if broken else 0
    # In float16 a step that overflows is left out, and the next ones are scaled down.
    if overflows <= (_OVERFLOWS_IN_A_ROW if half else 0) and math.isfinite(row.get("validation_loss", 0.0)):
        return overflows
    broken = broken or "validation_loss"
    raise FloatingPointError(
        f"train: the {broken} of step {row['step']:.0f} is {row[broken]}; try a smaller learning_rate."
    )


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _write_log(path: Path, rows: list[dict[str, float]]) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row))
    path.parent.mkdir(parents=True, exist_ok=True)
    with in_one_step(path) as partial, partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)


def _read_log(path: Path, steps: int) -> list[dict[str, float]]:
    if not path.exists():
        return []
    try:
        with path.open(newline="") as file:
            rows = [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]
        return [row | {"step": int(row["step"])} for row in rows if row["step"] <= steps]
    except (ValueError, TypeError, KeyError, csv.Error) as error:
        raise ValueError(f"{path} is not a log that training wrote ({error}): remove it to go on without.") from error
