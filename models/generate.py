"""``python -m models.generate FOLDER "text"``: continues a text with a trained decoder, a token at a time."""

from __future__ import annotations

import argparse
import time

import torch

from models import tasks
from models.commands import Formatter, add_kernels, folder_argument, prepare, run


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m models.generate", description=__doc__, formatter_class=Formatter)
    folder_argument(parser, "what `python -m models.train gpt` wrote")
    parser.add_argument("text", help="what to continue")
    parser.add_argument("--tokens", type=int, default=100, help="how many to generate at most")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 = the likeliest token every time")
    parser.add_argument("--top-k", type=int, help="sample among this many likeliest tokens")
    parser.add_argument("--top-p", type=float, help="sample among the likeliest tokens of this probability together")
    parser.add_argument("--seed", type=int, default=0)
    add_kernels(parser)
    return parser.parse_args(arguments)


def generate(options: argparse.Namespace) -> None:
    model, tokenizer = tasks.load(options.folder, "gpt")
    model = prepare(model, options)
    ids = tokenizer.encode(options.text).ids
    if not ids:
        raise ValueError("text is empty: give at least one character to continue.")
    generator = torch.Generator(model.embedding.weight.device).manual_seed(options.seed)
    tokens = model.stream(
        [ids], options.tokens, temperature=options.temperature, top_k=options.top_k, top_p=options.top_p,
        generator=generator,
    )  # fmt: skip
    print(options.text, end="", flush=True)
    shown, new, start = options.text, list(ids), time.perf_counter()
    for token in tokens:
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
