"""``python -m models.classify FOLDER "text" …``: says which class each text is of, and how sure it is."""

from __future__ import annotations

import argparse
import sys

import torch

from models import data, tasks
from models.commands import Parser, add_kernels, batches_of, encode_whole, folder_argument, prepare, run, utf8
from models.layers import at_least_float32


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser("python -m models.classify", description=__doc__)
    folder_argument(parser, "what `python -m models.train classifier` wrote")
    parser.add_argument("text", type=utf8, nargs="*", help="what to classify; without it, the lines of standard input")
    add_kernels(parser)
    return parser.parse_args(arguments)


@torch.no_grad()
def classify(options: argparse.Namespace) -> None:
    model, tokenizer = tasks.load(options.folder, "classifier")
    model = prepare(model, options)
    description = tasks.describe(options.folder)
    pad_id = model.bert.config.pad_token_id
    for texts in batches_of(options, "classify"):
        ids = data.pad(encode_whole(tokenizer, texts, description["context"]), pad_id)
        probabilities = at_least_float32(model(ids.to(next(model.parameters()).device))).softmax(-1)
        for text, row in zip(texts, probabilities, strict=True):
            best = int(row.argmax())
            print(f"{description['classes'][best]} {row[best]:.2f}\t{text}")
        sys.stdout.flush()


if __name__ == "__main__":
    run(classify, parse())
