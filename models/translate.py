"""``python -m models.translate FOLDER "text" …``: translates with a trained encoder-decoder."""

from __future__ import annotations

import argparse
import sys

from models import data, tasks
from models.commands import Parser, add_kernels, batches_of, encode_whole, folder_argument, prepare, run, utf8, whole


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser("python -m models.translate", description=__doc__)
    folder_argument(parser, "what `python -m models.train translation` wrote")
    parser.add_argument("text", type=utf8, nargs="*", help="what to translate; without it, the lines of standard input")
    parser.add_argument("--beams", type=whole(1, 1000), default=4, help="hypotheses to keep; 1 = greedy")
    parser.add_argument(
        "--tokens", type=whole(1), help="how many to generate at most; default: what the model has room for"
    )
    add_kernels(parser)
    return parser.parse_args(arguments)


def translate(options: argparse.Namespace) -> None:
    model, tokenizer = tasks.load(options.folder, "translation")
    model = prepare(model, options)
    limit = model.config.max_positions
    for texts in batches_of(options, "translate"):
        ids = data.pad(encode_whole(tokenizer, texts, limit)).to(model.positions.device)
        for tokens in model.translate(ids, min(options.tokens or limit, limit), beams=options.beams):
            print(tokenizer.decode(tokens).strip())
        sys.stdout.flush()


if __name__ == "__main__":
    run(translate, parse())
