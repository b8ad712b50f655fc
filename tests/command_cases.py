"""What tests of the commands of models/ share: arguments of runs of seconds, and a model of each kind."""

from __future__ import annotations

from pathlib import Path

from models import classify, evaluate, generate, translate
from models import train as train_command

ROOT = Path(__file__).parent.parent
TEXT = "\n\n".join(f"Paragraph {i} counts: " + " ".join(str(i + j) for j in range(12)) for i in range(60))
MODULES = {"train": train_command, "generate": generate, "translate": translate, "classify": classify,
           "evaluate": evaluate}  # fmt: skip
KINDS = ("gpt", "bert", "translation", "classifier")


def tiny_arguments(command: str, folder: Path, *more: str) -> list[str]:
    text = folder / "data.txt"
    if command in ("gpt", "bert") and not text.exists():
        text.write_text(TEXT)
    if command == "translation":
        text.write_text("".join(f"number {i} is here\tZahl {i} ist hier\n" for i in range(60)))
    if command == "classifier":
        text.write_text(
            "text,label\n" + "".join(f"{'good' if i % 2 else 'bad'} thing {i},{i % 2}\n" for i in range(60))
        )
    return [command, "--data", str(text), "--out", str(folder), "--dim", "32", "--layers", "2", "--heads", "2",
            "--context", "24", "--vocab-size", "320", "--batch-size", "8", "--steps", "4", "--warmup-steps", "1",
            "--device", "cpu", *more]  # fmt: skip


def train_each(tmp_path_factory) -> dict[str, Path]:
    """The folder of a model of each kind."""
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in KINDS}
    for kind, folder in folders.items():
        train_command.train(train_command.parse(tiny_arguments(kind, folder)))
    return folders
