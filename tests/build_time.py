"""How long the build for one card takes on sixteen cores: compiles every unit that setup.py compiles for it, and lays
the seconds of processor time out over the cores. Needs nvcc, but neither a GPU nor sixteen cores.

``python tests/build_time.py [--arch 80 --arch 90a]``. Fails if a build takes more than five minutes, in whatever order
ninja starts the units. Compiles only what changed since the last run; CUDA units are those of cuda_report.py.
"""

from __future__ import annotations

import argparse
import heapq
import re
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace

import torch
from cuda_report import ARCHITECTURES, CONSOLE_WIDTH, REPORT, TIMED, compile_all, seconds_of
from emulated import ROOT, ninja
from rich.console import Console
from rich.table import Table
from setup_script import setup_script

CORES = 16
LIMIT_S = 300.0
BUILDS = REPORT.parent / "build_time"


# --- the schedule


def longest_first(seconds: Iterable[float], cores: int = CORES) -> float:
    """When the last unit is ready if a core that is free takes the longest unit that is left."""
    free = [0.0] * cores
    for each in sorted(seconds, reverse=True):
        heapq.heapreplace(free, free[0] + each)
    return max(free)


def any_order(seconds: Sequence[float], cores: int = CORES) -> float:
    """When it is ready at the latest, if no core idles while units are left: until the last one starts, all cores have
    been busy with the others (Graham, "Bounds on multiprocessing timing anomalies", 1969)."""
    longest = max(seconds, default=0.0)
    return (sum(seconds) - longest) / cores + longest


# --- what is compiled


def units_for(setup, architecture: str) -> list:
    """The units of a build where TORCH_CUDA_ARCH_LIST names this architecture alone."""
    nvcc = setup.find_nvcc()
    if nvcc is None:
        raise SystemExit("build_time: nvcc was not found.")
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release (\d+\.\d+)", version)
    if release is None:
        raise SystemExit(f"build_time: {nvcc} --version failed.")
    # nvcc_paths wants a torch for this nvcc; the one at hand may be without CUDA.
    matching = SimpleNamespace(version=SimpleNamespace(cuda=release[1]))
    return list(setup.units(torch, setup.Cuda(nvcc, *setup.nvcc_paths(nvcc, matching), [architecture]), False))


def nvcc_units(units: Iterable) -> list:
    return [unit for unit in units if unit.rule == "nvcc"]


def job_of(unit) -> tuple[Path, str]:
    """Of a unit for nvcc: the source, and the architecture that it is compiled for."""
    (architecture,) = re.findall(r"code=sm_(\w+)", " ".join(unit.flags))
    return unit.source, architecture


def object_of(unit) -> Path:
    """Of a unit for the C++ compiler."""
    return BUILDS / f"{'_'.join(unit.source.relative_to(ROOT / 'csrc').with_suffix('').parts)}{unit.suffix}.o"


def library_of(architecture: str) -> Path:
    return BUILDS / f"sm_{architecture}.so"


def stand_in_headers() -> list[str]:
    """Flags for a header without which those of a torch without CUDA do not compile. Where torch has CUDA, it says how
    that was built, in macros that nothing here depends on."""
    if torch.version.cuda is not None:
        return []
    header = BUILDS / "include" / "c10" / "cuda" / "impl" / "cuda_cmake_macros.h"
    header.parent.mkdir(parents=True, exist_ok=True)
    if not header.exists():
        header.write_text("#pragma once\n")
    return [f"-isystem{BUILDS / 'include'}"]


def compile_host(setup, units: Sequence, kernels: dict[str, list[Path]]) -> None:
    """Compiles the units for the C++ compiler, and links them with each architecture's kernels; what is torch's stays
    open."""
    compiler = setup.host_compiler()
    lines = ["rule cxx", f"  command = {TIMED} {compiler} -MMD -MF $out.d $flags -c $in -o $out",
             "  depfile = $out.d", "  deps = gcc",
             "rule link", f"  command = {TIMED} {compiler} -shared $in -o $out"]  # fmt: skip
    for unit in units:
        flags = setup.ninja_flags([*unit.flags, *stand_in_headers()])
        lines += [f"build {object_of(unit)}: cxx {unit.source}", f"  flags = {flags}"]
    host = " ".join(str(object_of(unit)) for unit in units)
    for architecture, objects in kernels.items():
        lines.append(f"build {library_of(architecture)}: link {host} {' '.join(map(str, objects))}")
    ninja(BUILDS, "\n".join(lines) + "\n")


# --- the report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--arch", action="append", choices=ARCHITECTURES, help="default: all")
    architectures = parser.parse_args().arch or ARCHITECTURES

    setup = setup_script()
    units = {each: units_for(setup, each) for each in architectures}
    jobs = {each: [job_of(unit) for unit in nvcc_units(units[each])] for each in architectures}
    all_jobs = list(dict.fromkeys(job for each in architectures for job in jobs[each]))
    objects = dict(zip(all_jobs, [each.object for each in compile_all(all_jobs)], strict=True))
    host = [unit for unit in units[architectures[0]] if unit.rule == "cxx"]  # the same for every card
    compile_host(setup, host, {each: [objects[job] for job in jobs[each]] for each in architectures})

    view = Table(title=f"the build for one card, in seconds of processor time, and on {CORES} cores")
    view.add_column("card")
    for heading in ("units", "longest", "of", "all", f"{CORES} cores, longest first", "any order", "link", "MiB"):
        view.add_column(heading, justify="right")
    slowest = 0.0
    for each in architectures:
        compiled = {
            path.name: seconds_of(path) for path in [*map(object_of, host), *(objects[job] for job in jobs[each])]
        }
        name, seconds = max(compiled, key=lambda name: compiled[name]), list(compiled.values())
        link = seconds_of(library_of(each))
        view.add_row(f"sm_{each}", str(len(seconds)), f"{max(seconds):.0f}", name.removesuffix(".o"),
                     f"{sum(seconds):.0f}", f"{longest_first(seconds):.0f}", f"{any_order(seconds):.0f}",
                     f"{link:.1f}", f"{library_of(each).stat().st_size / 2**20:.1f}")  # fmt: skip
        slowest = max(slowest, any_order(seconds) + link)
    Console(width=CONSOLE_WIDTH).print(view)
    print(f"at most {slowest:.0f} s for a card, of {LIMIT_S:.0f} s")
    raise SystemExit(slowest > LIMIT_S)


if __name__ == "__main__":
    main()
