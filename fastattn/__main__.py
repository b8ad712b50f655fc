"""``python -m fastattn``: what this installation is and what it can run here."""

from __future__ import annotations

import argparse
import signal

import torch

import fastattn
from fastattn import _extension
from fastattn.dispatch import BACKENDS, TABLE


def support_table() -> str:
    """The backend table as Markdown: one row an op, one column a backend."""
    rows = ["| | " + " | ".join(f"`{backend}`" for backend in BACKENDS) + " |", "|---" * (len(BACKENDS) + 1) + "|"]
    for op, kernels in TABLE.items():
        written = {kernel.backend for kernel in kernels}
        cells = ("yes" if backend in written else "–" for backend in BACKENDS)
        rows.append(f"| `{op}` | {' | '.join(cells)} |")
    return "\n".join(rows)


def main() -> None:
    argparse.ArgumentParser(prog="python -m fastattn", description=__doc__).parse_args()
    print(f"fastattn {fastattn.__version__}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    if _extension.extension is not None:
        extension = _extension.extension
        usable = ", ".join(extension.usable_cpu_isas())
        print(f"CPU build in use: {extension.active_cpu_isa()} (this machine can run: {usable})")
    for backend, reason in fastattn.available_backends().items():
        print(f"  {backend:<9} {'usable' if reason is None else reason}")
    print(f"\n{support_table()}")


if __name__ == "__main__":
    # As other commands do, end without a word when a reader such as `head` has enough.
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    main()
