"""What nvcc makes of each CUDA kernel, for every GPU generation: registers, spills, shared memory. Needs no GPU.

``python tests/cuda_report.py [--arch 80 --arch 90a] [attention ...]``: words select sources by a part of their path.
Fails if a kernel spills registers or nvcc warns. Compiles only what changed since the last run.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from emulated import BUILD, NVCC_FLAGS, ROOT, ninja
from rich.console import Console
from rich.table import Table

ARCHITECTURES = ("80", "86", "89", "90a", "120")
# Warps that a multiprocessor holds at most: CUDA C++ Programming Guide, "Compute Capabilities", technical
# specifications.
MAX_WARPS = {"80": 64, "86": 48, "89": 48, "90a": 64, "100": 64, "120": 48}
REGISTERS = 65536
REPORT = BUILD.parent / "cuda_report"


@dataclass(frozen=True)
class KernelUse:
    """The resources of one kernel, compiled for one architecture."""

    source: str
    name: str
    architecture: str
    registers: int
    spill_bytes: int
    stack_bytes: int
    shared_bytes: int  # static; what a launch asks for comes on top

    @property
    def warps(self) -> int:
        """Warps on a multiprocessor, as far as registers decide: they are handed out to warps by 256."""
        per_warp = -(-self.registers * 32 // 256) * 256
        return min(REGISTERS // per_warp, MAX_WARPS.get(self.architecture, 48))


_FUNCTION = re.compile(
    r"Compiling entry function '(?P<name>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.S,
)
# nvcc notices some of the bugs that tests/ptx/bugs_*.cu have on purpose: enum value 0 is the right kernel.
_COMPLAINT = re.compile(r"warning|Potential Performance Loss(?!.*L3Bug[1-9])", re.I)


def parse(log: str, source: str, architecture: str) -> list[KernelUse]:
    """What ``ptxas -v`` said, kernel by kernel; names are mangled."""
    uses = []
    for found in _FUNCTION.finditer(log):
        shared = re.search(r"(\d+) bytes smem", found["rest"])
        uses.append(KernelUse(source, found["name"], architecture, int(found["registers"]),
                              int(found["stores"]) + int(found["loads"]), int(found["stack"]),
                              int(shared[1]) if shared else 0))  # fmt: skip
    return uses


def complaints(log: str) -> list[str]:
    return [line for line in log.splitlines() if _COMPLAINT.search(line)]


def architectures_of(source: Path, wanted: Iterable[str]) -> list[str]:
    """Sources named ``*sm90*`` have instructions of sm_90a alone, as in setup.py."""
    return [each for each in wanted if each == "90a" or "sm90" not in source.name]


def readable(names: Sequence[str]) -> list[str]:
    """``fastattn::(...)::kernel<Traits<...> >(Params)`` -> ``kernel<Traits<...>>``."""
    if shutil.which("c++filt") is None:
        return list(names)
    text = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    short = []
    for line in text.splitlines():
        line = re.sub(r"\(anonymous namespace\)::|fastattn::|^void ", "", line)
        line = re.sub(r"\((?:\w+::)?\w*Params.*$", "", line.replace("__nv_bfloat16", "bf16").replace("__half", "fp16"))
        short.append(line.replace("> >", ">>").replace("> >", ">>"))
    return short


def compile_all(
    sources: Sequence[Path], wanted: Sequence[str], directory: Path = REPORT
) -> list[tuple[Path, str, str]]:
    """(source, architecture, nvcc's messages) for each; raises RuntimeError with the messages if one fails."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise SystemExit("cuda_report: nvcc is not on PATH.")
    flags = " ".join([*NVCC_FLAGS, "-Xcompiler", "-Wall", "-Xptxas", "-v"])
    lines = ["rule nvcc", f"  command = {nvcc} {flags} $arch -MMD -MF $out.d -c $in -o $out > $out.log 2>&1 "
             "|| { cat $out.log; exit 1; }", "  depfile = $out.d", "  deps = gcc"]  # fmt: skip
    jobs = []
    for source in sources:
        for architecture in architectures_of(source, wanted):
            name = f"{'_'.join(source.relative_to(ROOT).with_suffix('').parts)}.sm_{architecture}.o"
            jobs.append((source, architecture, directory / f"{name}.log"))
            lines += [f"build {name}: nvcc {source}",
                      f"  arch = -gencode=arch=compute_{architecture},code=sm_{architecture}"]  # fmt: skip
    ninja(directory, "\n".join(lines) + "\n")
    return [(source, architecture, log.read_text()) for source, architecture, log in jobs]


def table(uses: Sequence[KernelUse], wanted: Sequence[str]) -> Table:
    """One row a kernel: registers and warps a multiprocessor for each architecture, then what should be nothing."""
    view = Table(title="registers / warps a multiprocessor that they leave room for")
    for heading in ("source", "kernel"):
        view.add_column(heading, overflow="fold")
    for architecture in wanted:
        view.add_column(f"sm_{architecture}", justify="right")
    for heading in ("shared", "stack", "spills"):
        view.add_column(heading, justify="right")
    rows: dict[tuple[str, str], dict[str, KernelUse]] = {}
    for use in uses:
        rows.setdefault((use.source, use.name), {})[use.architecture] = use
    names = readable([name for _, name in rows])
    for ((source, _), by_architecture), name in zip(rows.items(), names, strict=True):
        each = [by_architecture.get(architecture) for architecture in wanted]
        found = [use for use in each if use is not None]
        spills = max(use.spill_bytes for use in found)
        view.add_row(source, name, *("" if use is None else f"{use.registers} / {use.warps}" for use in each),
                     str(max(use.shared_bytes for use in found)), str(max(use.stack_bytes for use in found)),
                     str(spills), style="red" if spills else None)  # fmt: skip
    return view


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*", help="parts of the sources' paths; default: every csrc/**/*.cu")
    parser.add_argument("--arch", action="append", choices=ARCHITECTURES, help="default: all")
    arguments = parser.parse_args()
    wanted = arguments.arch or ARCHITECTURES
    sources = [
        path
        for path in sorted((ROOT / "csrc").rglob("*.cu"))
        if not arguments.words or any(word in str(path.relative_to(ROOT)) for word in arguments.words)
    ]
    if not sources:
        raise SystemExit(f"cuda_report: no source has {' or '.join(arguments.words)} in its path.")
    logs = compile_all(sources, wanted)
    uses = [use for source, architecture, log in logs for use in parse(log, source.stem, architecture)]
    width = None if sys.stdout.isatty() else int(os.environ.get("COLUMNS", "180"))
    Console(width=width).print(table(uses, wanted))
    warnings = sorted({line for _, _, log in logs for line in complaints(log)})
    spilling = [use for use in uses if use.spill_bytes]
    print(f"{len(uses)} kernels, {len(spilling)} spill registers, {len(warnings)} warnings")
    print("\n".join(warnings), end="\n" if warnings else "")
    raise SystemExit(bool(warnings or spilling))


if __name__ == "__main__":
    main()
