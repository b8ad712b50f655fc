"""What the commands share: options and their limits, one-line errors."""

from __future__ import annotations

import argparse
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import nn

from models.data import DataError, encode
from models.layers import BACKENDS, set_backend
from models.needs import let_interrupts_raise

# Of what torch says where a tensor has no room, or more elements than there are numbers.
_TOO_LARGE = ("can't allocate memory", "out of memory", "overflow")
# Of what it says of a number past float32's.
_NO_FLOAT = "cannot be converted to type float"
# Enough for the kernels to be at their speed; beam search keeps several hypotheses of each.
_TEXTS_AT_ONCE = 32


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line; --help has the rest."""

    def __init__(self, *arguments: object, **options: object) -> None:
        super().__init__(*arguments, **{"formatter_class": Formatter} | options)  # type: ignore[arg-type]

    def error(self, message: str) -> None:  # type: ignore[override]
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")


class Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, where there are any to speak of."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        # `in` would take 0 for False.
        if any(action.default is nothing for nothing in (None, False, argparse.SUPPRESS)):
            return text
        return super()._get_help_string(action) or ""


# --- Limits of options -----------------------------------------------------------------------------------------------


def whole(least: int, most: int = 2**63 - 1) -> Callable[[str], int]:
    """The type of an option that is a whole number in [least, most]."""

    def read(text: str) -> int:
        if not text.lstrip("+-").isdecimal():
            raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}")
        if not least <= int(text) <= most:
            limit = f" and at most {most}" if most < 2**63 - 1 or int(text) > most else ""
            raise argparse.ArgumentTypeError(f"must be at least {least}{limit}, got {text}")
        return int(text)

    return read


def number(least: float, most: float = math.inf, *, above: bool = False) -> Callable[[str], float]:
    """The type of an option that is a number in [least, most], or with ``above`` in (least, most]."""
    limits = f"{'above' if above else 'at least'} {least:g}" + (f" and at most {most:g}" if most < math.inf else "")

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and least <= value <= most and not (above and value == least)):
            raise argparse.ArgumentTypeError(f"must be a number {limits}, got {text!r}")
        return value

    return read


def device(text: str) -> str:
    """The type of --device."""
    kind, _, index = text.partition(":")
    if text != "cpu" and not (kind == "cuda" and (index.isdecimal() or text == "cuda")):
        raise argparse.ArgumentTypeError(f"must be cpu, cuda or cuda:N, got {text!r}")
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if kind == "cuda" and int(index or 0) >= found:
        raise argparse.ArgumentTypeError(f"{text} is not here: this machine has {found or 'no'} CUDA devices")
    return text


def utf8(text: str) -> str:
    """The type of texts: what a shell gives that is not UTF-8 holds lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise argparse.ArgumentTypeError(f"is not UTF-8 text: {text!r}") from error
    return text


# --- Options and errors ----------------------------------------------------------------------------------------------


def add_kernels(parser: argparse.ArgumentParser, int8: bool = True) -> None:
    group = parser.add_argument_group("kernels")
    group.add_argument("--backend", default="auto", choices=BACKENDS, help="which kernels run; eager is plain PyTorch")
    group.add_argument("--device", type=device, help="cpu, cuda, cuda:1, …; default: the GPU, if there is one")
    if int8:
        group.add_argument("--int8", action="store_true", help="quantise the weights of every linear layer")


def prepare(model: nn.Module, options: argparse.Namespace) -> nn.Module:
    """Moves a model where the options say, in eval mode, with the kernels they say."""
    place = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return set_backend(model.to(place).eval(), options.backend, int8=options.int8)


def run(command: Callable[[argparse.Namespace], None], options: argparse.Namespace) -> None:
    """Runs a command; what its user can mend ends it with one line and exit status 2."""
    # nn.TransformerEncoder's own, about what it does by itself with padded batches.
    warnings.filterwarnings("ignore", message="The PyTorch API of nested tensors")
    let_interrupts_raise()
    try:
        command(options)
    except BrokenPipeError:
        # Whoever read the output has gone, which is no mistake; Python must not try to write the rest when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except (DataError, ValueError, NotImplementedError, OSError, FloatingPointError) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        raise SystemExit(2) from None
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, MemoryError) and not any(words in str(error) for words in _TOO_LARGE):
            raise
        reason = " ".join(str(error).split())
        cause = "this needs more memory than there is, choose smaller sizes"
        if _NO_FLOAT in reason:
            cause = "an option is too large a number"
        print(f"error: {cause}: {reason}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt as interrupt:
        print(f"interrupted{interrupt}", file=sys.stderr)
        raise SystemExit(130) from None


def folder_argument(parser: argparse.ArgumentParser, text: str) -> None:
    parser.add_argument("folder", type=Path, help=text)


def batches_of(options: argparse.Namespace, purpose: str) -> Iterator[list[str]]:
    """The texts of the command line, or without any the lines of standard input, some at a time and as they come:
    memory does not grow with their number, and a terminal is answered line by line. ValueError if there are none."""
    size = 1 if not options.text and sys.stdin.isatty() else _TEXTS_AT_ONCE
    texts = (text for text in options.text or map(str.strip, sys.stdin) if text.strip())
    found = False
    try:
        while batch := list(islice(texts, size)):
            for text in batch:
                text.encode()  # in the C locale standard input decodes what is not UTF-8 to lone surrogates
            found = True
            yield batch
    except UnicodeError as error:
        raise ValueError(f"standard input is not UTF-8 text: {error}.") from error
    if not found:
        raise ValueError(f"there is nothing to {purpose}.")


def encode_whole(tokenizer: Tokenizer, texts: list[str], limit: int) -> list[list[int]]:
    """Token ids, cut to ``limit``; says so on standard error where that loses something."""
    ids = encode(tokenizer, texts, limit + 1)
    for text, tokens in zip(texts, ids, strict=True):
        if len(tokens) > limit:
            print(f"note: the model reads {limit} tokens; the rest is left out of {text[:40]!r} …", file=sys.stderr)
    return [tokens[:limit] for tokens in ids]
