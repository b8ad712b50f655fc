"""``python -m bench.readme``: rewrites the parts of README.md that come from measurements and from the backend table.

Each part stands between ``<!-- name -->`` and ``<!-- /name -->``; ``--check`` only fails if one is out of date.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import torch

import fastattn
from bench.report import Run, read_json
from bench.table import microseconds
from fastattn.__main__ import support_table

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"


def newest_results() -> tuple[Path, Run]:
    """The latest run on a processor under bench/results."""
    files = (ROOT / "bench" / "results").glob("*/results.json")
    runs = [(path.parent, run) for path in files if not (run := read_json(path)).machine.gpu]
    if not runs:
        raise SystemExit("bench/results has no results.json of a processor: run `python -m bench --save` first.")
    return max(runs, key=lambda found: found[1].machine.date)


def machine_line(run: Run) -> str:
    machine = run.machine
    return f"{machine.cpu}, {machine.threads} threads, {machine.isa} kernels, torch {machine.torch}"


def headline(run: Run) -> str:
    """The causal forward at 512 tokens: the shape of a small GPT's attention."""
    row = next(r for r in run.rows if r.headline and r.op == "attention forward" and "causal" in r.shape and r.times)
    peer = row.strongest
    return (
        f"**{peer.ratios.median:.1f}× `{peer.name}`**: {row.headline}, {microseconds(row.times.median_us)} µs against "
        f"{microseconds(peer.times.median_us)} µs ({row.shape}, {row.dtype}; {machine_line(run)})."
    )


def benchmarks(folder: Path, run: Run) -> str:
    """The rows that carry a headline, each beside the strongest form of PyTorch that was timed with it."""
    lines = [
        f"`python -m bench --save` on {machine_line(run)}, {run.machine.date}, commit {run.machine.commit}. Each "
        "answer was checked first; the ratio is the strongest PyTorch form's time over ours, medians of alternating "
        f"samples in one process. All rows, with spread, 1-thread ratios and errors: [`{folder.relative_to(ROOT)}`]"
        f"({folder.relative_to(ROOT)}/results.csv).",
        "",
        f"![Ratio to the strongest form of PyTorch]({folder.relative_to(ROOT)}/speedup.png)",
        "",
        "| | shape | dtype | µs | ratio | against | 1 thread |",
        "|---|---|---|---:|---:|---|---:|",
    ]
    for row in run.rows:
        if not row.headline or row.strongest is None:
            continue
        peer = row.strongest
        one_thread = "" if peer.one_thread is None else f"{peer.one_thread:.2f}×"
        disturbed = " (disturbed)" if row.disturbed else ""
        lines.append(
            f"| {row.headline} | {row.shape} | {row.dtype} | {microseconds(row.times.median_us)} | "
            f"**{peer.ratios.median:.2f}×**{disturbed} | {peer.name} | {one_thread} |"
        )
    return "\n".join([*lines, "", *against_float32(run)])


def against_float32(run: Run) -> list[str]:
    """The INT8 models beside the strongest float32 form of PyTorch: what swapping the modules gains."""
    lines = []
    for row in run.rows:
        floats = [peer for peer in row.peers if "int8" not in peer.name]
        if row.headline and row.op.startswith("MiniLM") and floats:
            peer = floats[0]
            lines.append(f"- {row.headline}, against stock float32 ({peer.name}): **{peer.ratios.median:.2f}×**")
    return lines


def explanation() -> str:
    query = torch.zeros(1, 2, 8, 64, dtype=torch.float32)
    text = fastattn.explain("attention", query, query, query, is_causal=True)
    return f'```\n>>> print(fastattn.explain("attention", query, key, value, is_causal=True))\n{text}\n```'


def render(text: str) -> str:
    """README with every part made anew."""
    folder, run = newest_results()
    parts = {
        "headline": headline(run),
        "support": support_table(),
        "benchmarks": benchmarks(folder, run),
        "explain": explanation(),
    }
    for name, part in parts.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        text, count = pattern.subn(lambda found, part=part: f"{found[1]}{part}\n{found[2]}", text)
        if count != 1:
            raise SystemExit(f"README.md must have the part <!-- {name} --> once, found it {count} times.")
    return text


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.readme", description=__doc__.split("\n\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing: fail if README.md is out of date")
    check = parser.parse_args().check
    before = README.read_text(encoding="utf-8")
    after = render(before)
    if check:
        raise SystemExit(None if before == after else "README.md is out of date: run `python -m bench.readme`.")
    README.write_text(after, encoding="utf-8")


if __name__ == "__main__":
    main()
