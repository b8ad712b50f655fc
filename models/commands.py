"""What the commands share: options, one-line errors, progress."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

from torch import nn

from models.data import DataError
from models.layers import BACKENDS, set_backend


class Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, where there are any to speak of."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        return text if action.default in (None, False, argparse.SUPPRESS) else super()._get_help_string(action) or ""


def add_kernels(parser: argparse.ArgumentParser, int8: bool = True) -> None:
    group = parser.add_argument_group("kernels")
    group.add_argument("--backend", default="auto", choices=BACKENDS, help="which kernels run; eager is plain PyTorch")
    group.add_argument("--device", help="cpu, cuda, cuda:1, …; default: the GPU, if there is one")
    if int8:
        group.add_argument("--int8", action="store_true", help="quantise the weights of every linear layer")


def prepare(model: nn.Module, options: argparse.Namespace) -> nn.Module:
    """Moves a model where the options say, in eval mode, with the kernels they say."""
    import torch

    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return set_backend(model.to(device).eval(), options.backend, int8=options.int8)


def run(command: Callable[[argparse.Namespace], None], options: argparse.Namespace) -> None:
    """Runs a command; what its user can mend ends it with one line and exit status 2."""
    # nn.TransformerEncoder's own, about what it does by itself with padded batches.
    warnings.filterwarnings("ignore", message="The PyTorch API of nested tensors")
    try:
        command(options)
    except (DataError, ValueError, NotImplementedError, FileNotFoundError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("interrupted; train again with --resume to go on from the last checkpoint", file=sys.stderr)
        raise SystemExit(130) from None


def folder_argument(parser: argparse.ArgumentParser, text: str) -> None:
    parser.add_argument("folder", type=Path, help=text)


def texts_of(options: argparse.Namespace, purpose: str) -> list[str]:
    """The texts of the command line, or without any the lines of standard input; ValueError if there are none."""
    texts = options.text or [line.strip() for line in sys.stdin if line.strip()]
    if not texts:
        raise ValueError(f"there is nothing to {purpose}.")
    return texts
