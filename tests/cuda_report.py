"""What nvcc makes of each CUDA kernel, for every GPU generation: registers, spills, shared memory, occupancy. Needs
no GPU.

``python tests/cuda_report.py [--arch 80 --arch 90a] [attention ...]``: words select sources by a part of their path.
Fails if a kernel spills registers, nvcc warns, or machine code for Hopper touches registers that are not its own
(tests/machine_code.py, with Triton's disassembler). Compiles only what changed since the last run.
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

from cuda_occupancy import LaunchSize, launch_sizes, resident_warps
from emulated import BUILD, ROOT, ninja
from machine_code import Report, report_on_all, tool
from rich.console import Console
from rich.table import Table
from setup_script import setup_script

ARCHITECTURES = ("80", "86", "89", "90a", "120")
REPORT = BUILD.parent / "cuda_report"
CONSOLE_WIDTH = None if sys.stdout.isatty() else int(os.environ.get("COLUMNS", "180"))


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

    def is_left_out(self, name: str) -> bool:
        """Whether this architecture never launches the kernel of this (demangled) name, and has no code for it."""
        below = re.search(r"fastattn::Below<(\d+)>", name)
        return below is not None and int(self.architecture.rstrip("a")) >= int(below[1])


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


def demangled(names: Sequence[str]) -> list[str]:
    if shutil.which("c++filt") is None:
        return list(names)
    return subprocess.run(
        ["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True
    ).stdout.splitlines()


def readable(name: str) -> str:
    """``void fastattn::(...)::kernel<Traits<...> >(Params)`` -> ``kernel<Traits<...>>``."""
    name = re.sub(r"\(anonymous namespace\)::|fastattn::|^void ", "", name)
    name = re.sub(r"\(ScoreKind\)", "", name.replace("__nv_bfloat16", "bf16").replace("__half", "fp16"))
    return re.sub(r"\([^()]*\)$", "", name).replace("> >", ">>").replace("> >", ">>")


# A compilation by ninja that leaves its messages and its processor time beside the object.
TIMED = f"{sys.executable} {ROOT / 'tests' / 'cpu_seconds.py'} $out.seconds"


def seconds_of(target: Path) -> float:
    """The processor time that making it took."""
    return float(Path(f"{target}.seconds").read_text())


@dataclass(frozen=True)
class Compilation:
    """A source that nvcc compiled for one architecture."""

    source: Path
    architecture: str
    object: Path

    @property
    def log(self) -> str:
        return Path(f"{self.object}.log").read_text()


def compile_all(jobs: Sequence[tuple[Path, str]], directory: Path = REPORT) -> list[Compilation]:
    """Compiles each (source, architecture) with the flags of setup.py; raises RuntimeError with the messages if one
    fails."""
    setup = setup_script()
    nvcc = setup.find_nvcc()
    if nvcc is None:
        raise SystemExit("cuda_report: nvcc was not found.")
    flags = setup.ninja_flags([*setup.NVCC_FLAGS, "-Xcompiler", "-Wall", "-Xptxas", "-v"])
    lines = ["rule nvcc", f"  command = {TIMED} {nvcc} {flags} $arch -MMD -MF $out.d -c $in -o $out > $out.log 2>&1 "
             "|| { cat $out.log; exit 1; }", "  depfile = $out.d", "  deps = gcc"]  # fmt: skip
    compilations = []
    for source, architecture in jobs:
        name = f"{'_'.join(source.relative_to(ROOT).with_suffix('').parts)}.sm_{architecture}.o"
        compilations.append(Compilation(source, architecture, directory / name))
        lines += [f"build {name}: nvcc {source}",
                  f"  arch = -gencode=arch=compute_{architecture},code=sm_{architecture}"]  # fmt: skip
    ninja(directory, "\n".join(lines) + "\n")
    return compilations


def table(uses: Sequence[KernelUse], wanted: Sequence[str], sources: Sequence[Path]) -> Table:
    """One row a kernel: for each architecture its registers and the warps that a multiprocessor holds, then shared
    memory, and what should be nothing."""
    view = Table(title="registers / warps a multiprocessor holds (0: too much shared memory); - where it is left out")
    for heading in ("source", "kernel"):
        view.add_column(heading, overflow="fold")
    for architecture in wanted:
        view.add_column(f"sm_{architecture}", justify="right")
    for heading in ("threads", "shared", "stack", "spills"):
        view.add_column(heading, justify="right")
    rows: dict[tuple[str, str], dict[str, KernelUse]] = {}
    for use in uses:
        rows.setdefault((use.source, use.name), {})[use.architecture] = use
    names = demangled([name for _, name in rows])
    sizes: dict[str, LaunchSize] = {}
    for folder in {path.parent for path in sources}:
        here = [path for path in sources if path.parent == folder]
        stems = {path.stem for path in here}
        sizes |= launch_sizes([name for (source, _), name in zip(rows, names, strict=True) if source in stems], here)
    for ((source, _), by_architecture), name in zip(rows.items(), names, strict=True):
        size, found = sizes[name], list(by_architecture.values())
        shared_bytes = max(use.shared_bytes for use in found) + size.shared_bytes

        def cell(use: KernelUse | None, name: str = name, threads: int = size.threads, shared: int = shared_bytes):
            if use is None:
                return ""
            if use.is_left_out(name):
                return "-"
            return f"{use.registers} / {resident_warps(use.architecture, use.registers, threads, shared)}"

        spills = max(use.spill_bytes for use in found)
        view.add_row(source, readable(name), *(cell(by_architecture.get(architecture)) for architecture in wanted),
                     str(size.threads or "?"), str(shared_bytes), str(max(use.stack_bytes for use in found)),
                     str(spills), style="red" if spills else None)  # fmt: skip
    return view


def machine_code_of(objects: Sequence[Path]) -> Report:
    """For sm_90a, where registers belong to products in flight and to other warps."""
    if tool("nvdisasm") is None:
        print("sm_90a: machine code was not read: no nvdisasm, which Triton's package has")
        return Report()
    report = report_on_all(objects)
    print(f"sm_90a: {report}", *report.faults, sep="\n")
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
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
    jobs = [(source, each) for source in sources for each in architectures_of(source, wanted)]
    compilations = compile_all(jobs)
    uses = [use for each in compilations for use in parse(each.log, each.source.stem, each.architecture)]
    Console(width=CONSOLE_WIDTH).print(table(uses, wanted, sources))
    warnings = sorted({line for each in compilations for line in complaints(each.log)})
    spilling = [use for use in uses if use.spill_bytes]
    print(f"{len(uses)} kernels, {len(spilling)} spill registers, {len(warnings)} warnings")
    print("\n".join(warnings), end="\n" if warnings else "")
    machine_code = machine_code_of([each.object for each in compilations if each.architecture == "90a"])
    raise SystemExit(bool(warnings or spilling or machine_code.faults))


if __name__ == "__main__":
    main()
