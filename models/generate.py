"""``python -m models.generate FOLDER "text"``: continues a text with a trained decoder, a token at a time."""

from __future__ import annotations

import argparse
import time

import torch

from models import tasks
from models.commands import Parser, add_kernels, folder_argument, number, prepare, run, utf8, whole


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser("python -m models.generate", description=__doc__)
    folder_argument(parser, "what `python -m models.train gpt` wrote")
    parser.add_argument("text", type=utf8, help="what to continue")
    parser.add_argument("--tokens", type=whole(1), help="how many to generate; default: 100, or what there is room for")
    parser.add_argument("--temperature", type=number(0), default=0.8, help="0 = the likeliest token every time")
    parser.add_argument("--top-k", type=whole(1), help="sample among this many likeliest tokens")
    parser.add_argument(
        "--top-p", type=number(0, 1, above=True), help="sample among the likeliest tokens of this probability together"
    )
    parser.add_argument("--seed", type=whole(0), default=0)
    add_kernels(parser)
    return parser.parse_args(arguments)


def generate(options: argparse.Namespace) -> None:
    model, tokenizer = tasks.load(options.folder, "gpt")
    model = prepare(model, options)
    ids = tokenizer.encode(options.text).ids
    if not ids:
        raise ValueError("text is empty: give at least one character to continue.")
    room = model.config.max_positions - model.config.prompt_tokens - len(ids)
    if room < 1:
        raise ValueError(f"text has {len(ids)} tokens; the model has room for {room + len(ids)}, new ones included.")
    generator = torch.Generator(model.embedding.weight.device).manual_seed(options.seed)
    count = options.tokens or min(100, room)
    tokens = model.stream(
        [ids], count, temperature=options.temperature, top_k=options.top_k, top_p=options.top_p,
        generator=generator,
    )  # fmt: skip
    shown, new, start = tokenizer.decode(ids), list(ids), time.perf_counter()
    for token in tokens:
        if len(new) == len(ids):
            # Not before the first token: what is wrong shows by then, and gets a line of its own.
            print(options.text, end="", flush=True)
        new.append(token.item())
        text = tokenizer.decode(new)
        # A character may take several tokens: it is shown once it is whole.
        if not text.endswith("�"):
            print(text[len(shown) :], end="", flush=True)
            shown = text
    seconds = time.perf_counter() - start
    print(f"\n\n{len(new) - len(ids)} tokens, {(len(new) - len(ids)) / seconds:.0f} a second")


if __name__ == "__main__":
    run(generate, parse())
