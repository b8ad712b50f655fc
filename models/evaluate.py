"""``python -m models.evaluate FOLDER``: what a trained model is worth on held-out data, and what INT8 costs of it."""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from models import tasks
from models.commands import Parser, add_kernels, folder_argument, prepare, run


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser("python -m models.evaluate", description=__doc__)
    folder_argument(parser, "what `python -m models.train` wrote")
    parser.add_argument("--data", type=Path, help="what it was trained on, if not the default")
    add_kernels(parser)
    return parser.parse_args(arguments)


def evaluate(options: argparse.Namespace) -> None:
    kind = tasks.describe(options.folder)["kind"]
    model, tokenizer = tasks.load(options.folder, kind)
    measure = tasks.held_out_measure(options.folder, options.data, tokenizer)
    columns = {"float32": argparse.Namespace(**vars(options) | {"int8": False})}
    if options.int8:
        columns["int8"] = options
    measures = {name: measure(prepare(copy.deepcopy(model), each)) for name, each in columns.items()}
    # The numbers of a model on data of another kind look no different.
    caption = f"every tenth item of {options.data or 'the text that packages carry'}"
    table = Table("held-out data", *columns, caption=Text(caption))
    for name in measures["float32"]:
        table.add_row(name, *(f"{values[name]:.4f}" for values in measures.values()))
    Console().print(table)


if __name__ == "__main__":
    run(evaluate, parse())
