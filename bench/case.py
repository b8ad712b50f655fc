"""A benchmark case: what is computed, by us and by PyTorch, the check of its answer, and how much work it is."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from bench.timing import Callee

# The rule that the tests hold every kernel to. tests/ is no package, so the file is loaded by its path.
_spec = importlib.util.spec_from_file_location("accuracy", Path(__file__).parent.parent / "tests" / "accuracy.py")
accuracy = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(accuracy)

Tensors = Tensor | Sequence[Tensor]


class Verdict(NamedTuple):
    """A check that passed: how far off the answer was and how far it might have been."""

    error: float
    allowed: float
    note: str = ""


@dataclass(frozen=True)
class Subject:
    """A case with its tensors made: what to time, and the check to pass first.

    ``check`` raises AssertionError for a wrong answer. Every callable makes fresh outputs, PyTorch's as ours.
    """

    ours: Callee
    peers: dict[str, Callee]
    check: Callable[[], Verdict]


@dataclass(frozen=True)
class Case:
    """One row of the table. Tensors are made when the row's turn comes, by ``build``."""

    group: str  # the command-line word: attention, layer_norm, int8_matmul, models
    op: str
    shape: str
    dtype: str
    build: Callable[[], Subject] = field(repr=False)
    flops: float = 0.0  # multiplications and additions that the definition asks for, masked ones left out
    bytes: float = 0.0  # inputs read once and outputs written once
    compute_dtype: str | None = None  # the roof that the row is held to, where it is not that of ``dtype``
    seqlen: int | None = None  # places the row in the plot of speed-up by length
    variant: str = ""  # its line there
    quick: bool = False
    headline: str = ""  # its label in the summary plot; without one it is left out there

    @property
    def name(self) -> str:
        return f"{self.op} | {self.shape} | {self.dtype}"

    @property
    def plain_name(self) -> str:
        """The name in characters that every keyboard has: ``attention forward 1x12x128x64 full float32``."""
        return f"{self.op} {self.shape} {self.dtype}".replace("×", "x").replace("→", "-")


def torch_dtype(name: str) -> torch.dtype:
    return getattr(torch, name)


def seeded_generator(seed: int) -> torch.Generator:
    """For tensors on the default device."""
    return torch.Generator(torch.get_default_device()).manual_seed(seed)


def as_tuple(tensors: Tensors) -> tuple[Tensor, ...]:
    return (tensors,) if isinstance(tensors, Tensor) else tuple(tensors)


def as_accurate_as_eager(
    ours: Callable[[], Tensors],
    eager: Callable[[], Tensors],
    reference: Callable[[], Tensors],
    names: Sequence[str] = ("out",),
) -> Callable[[], Verdict]:
    """The check by the accuracy rule: each of our tensors, eager's in the same dtype, and the float64 reference's.

    A tensor without dimensions, a loss, may be off by an ulp more: by luck eager's error at one number may be nil.
    """

    def check() -> Verdict:
        worst = Verdict(0.0, 1.0)
        for name, mine, theirs, exact in zip(
            names, as_tuple(ours()), as_tuple(eager()), as_tuple(reference()), strict=True
        ):
            mine, theirs, exact = mine.detach(), theirs.detach(), exact.detach()
            luck = accuracy.ulp(exact.abs().item(), theirs.dtype) if exact.dim() == 0 else 0.0
            accuracy.assert_as_accurate_as_eager(mine, theirs, exact, name, rounding=luck)
            verdict = Verdict(accuracy.max_error(mine, exact), accuracy.allowed_error(theirs, exact, rounding=luck))
            worst = max(worst, verdict, key=lambda v: v.error / v.allowed)
        return worst

    return check


def gradients(outputs: Tensors, inputs: Sequence[Tensor], douts: Tensors) -> tuple[Tensor, ...]:
    """Gradients of ``inputs``, leaving the graph for the next call and touching no ``.grad``."""
    return torch.autograd.grad(as_tuple(outputs), inputs, as_tuple(douts), retain_graph=True)


def like(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Detached copies in ``dtype`` that require grad if the originals do."""
    return [t.detach().to(dtype).requires_grad_(t.requires_grad) for t in tensors]
