"""``python -m bench [attention|layer_norm|int8_matmul|models|all]``: checks, times, prints a table, writes a report.

With ``--device cuda`` on a GPU: other rows, another clock, other peers (gpu_cases, gpu_timing, gpu_peers).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import fastattn
from bench import (
    bench_attention,
    bench_int8_matmul,
    bench_layer_norm,
    bench_models,
    gpu_cases,
    gpu_peers,
    machine,
    memory,
    page,
    peaks,
    plot,
    report,
)
from bench.case import Case
from bench.gpu_timing import Gpu
from bench.run import FAILED, OK, Effort, Row, run_case
from bench.table import microseconds, print_report
from bench.timing import ForeignLoad
from models.files import in_one_step
from models.needs import let_interrupts_raise

HERE = Path(__file__).parent
GROUPS = {module.GROUP: module for module in (bench_attention, bench_layer_norm, bench_int8_matmul, bench_models)}
QUICK = Effort(budget_s=1.0, one_thread_budget_s=0.5, retries=1)
# Aims of a whole run, which leave a margin under what is promised: ten minutes, and two.
FULL_RUN_S, QUICK_RUN_S = 520.0, 100.0

What = Enum("What", {name: name for name in (*GROUPS, "all")}, type=str)
Backend = Enum("Backend", {name: name for name in fastattn.available_backends()}, type=str)
Device = Enum("Device", {name: name for name in ("cpu", "cuda")}, type=str)
DTYPES = {"float32": "float32", "bfloat16": "bfloat16", "float16": "float16",
          "fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}  # fmt: skip
Dtype = Enum("Dtype", {name: name for name in DTYPES}, type=str)

app = typer.Typer(add_completion=False)


def select_cases(
    what: str = "all", dtype: str | None = None, quick: bool = False, match: str = "", device: str = "cpu"
) -> list[Case]:
    """The rows that a command line asks for, in the table's order."""
    wanted = match.lower().replace("×", "x")
    if device == "cuda":
        found = [case for case in gpu_cases.cases() if what in ("all", case.group)]
    else:
        found = [case for group in (GROUPS.values() if what == "all" else [GROUPS[what]]) for case in group.cases()]
    return [
        case
        for case in found
        if (dtype is None or case.dtype == dtype) and (case.quick or not quick) and wanted in case.plain_name.lower()
    ]


def run_cases(
    cases: list[Case],
    backend: str,
    effort: Effort,
    aim_s: float,
    console: Console,
    gpu: Gpu | None = None,
    keep: Callable[[report.Run], None] = lambda run: None,
) -> report.Run:
    """Runs ``cases`` in turn with a progress bar (a line a case where the output is no terminal).

    Where a busy machine would take it past ``aim_s`` in all, rows are measured more shortly and not repeated.
    ``keep`` gets the run before each case, with a row that says that the case ended it: so it will look if it does.
    Ends where a case has lost the device.
    """
    start, load = time.perf_counter(), ForeignLoad()
    gpu_peers.compile_until(start + aim_s / 2)
    here = machine.describe(torch.get_num_threads(), "cpu" if gpu is None else "cuda")
    clocks = "" if gpu is None else gpu.clocks()
    roofs = _measure_peaks(here, gpu)
    rows: list[Row] = []
    columns = (BarColumn(24), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=len(cases))
        for case in cases:
            progress.update(task, description=f"{case.op} {case.shape}"[: max(10, console.width - 52)])
            share = (aim_s - (time.perf_counter() - start)) / (len(cases) - len(rows))
            fatal = Row.of(case, backend, FAILED, "the process ended in this row")
            finished = [row.under(roofs) for row in (*rows, fatal)]
            keep(report.Run(here, roofs, finished, time.perf_counter() - start, None))
            rows.append(run_case(case, backend, effort.within(share), gpu))
            progress.advance(task)
            if not console.is_terminal:
                console.print(f"{len(rows)}/{len(cases)}  {case.name}  {_outcome(rows[-1])}", highlight=False)
            if gpu is not None and rows[-1].status == FAILED and gpu.is_lost():
                return report.Run(here, roofs, [row.under(roofs) for row in rows], time.perf_counter() - start, None)
    # Measured before and after: others may have slowed the machine at one of the two times.
    roofs = roofs.best_of(_measure_peaks(here, gpu))
    if gpu is not None:
        here = replace(here, clocks=f"before: {clocks}; after: {gpu.clocks()}")
    rows = [row.under(roofs) for row in rows]
    return report.Run(here, roofs, rows, time.perf_counter() - start, load.stop())


def _measure_peaks(here: machine.Machine, gpu: Gpu | None) -> peaks.Peaks:
    if gpu is None:
        return peaks.measure(here.l3_bytes)
    with gpu.building():
        return peaks.measure_gpu(here.l3_bytes, gpu.best_seconds)


def _outcome(row: Row) -> str:
    if row.status != OK:
        return row.status
    ratio = f", {row.strongest.ratios.median:.2f}× {row.strongest.name}" if row.strongest else ""
    return f"{microseconds(row.times.median_us)} µs{ratio}"


def write_report(run: report.Run, folder: Path) -> list[str]:
    """results.json, results.csv, index.html and, where there is something to plot, speedup.png in ``folder``: returns
    the names of those that it wrote."""
    folder.mkdir(parents=True, exist_ok=True)
    report.write_json(run, folder / "results.json")
    report.write_csv(run, folder / "results.csv")
    with in_one_step(folder / "index.html") as partial:
        partial.write_text(page.render(run), encoding="utf-8")
    plotted = plot.write_png(run, folder / "speedup.png")
    return ["results.json", "results.csv", "index.html", *(["speedup.png"] if plotted else [])]


@app.command()
def main(
    what: Annotated[What, typer.Argument(help="which op")] = What.all,
    device: Annotated[Device, typer.Option(help="where tensors are")] = Device.cpu,
    backend: Annotated[
        Backend | None,
        typer.Option(help="whose kernels; a case it refuses says why", show_default="as the device"),
    ] = None,
    dtype: Annotated[
        Dtype | None, typer.Option(help="only rows of this dtype", metavar=f"<{'|'.join(DTYPES)}>")
    ] = None,
    match: Annotated[str, typer.Option(help='only rows with this in their name: "causal", "12x128x64"')] = "",
    quick: Annotated[bool, typer.Option("--quick", help="fewer rows, shorter timing: about two minutes")] = False,
    threads: Annotated[int, typer.Option(min=0, help="0 = as many as torch takes by itself")] = 0,
    out: Annotated[Path, typer.Option(help="folder for JSON, CSV, page and plot", show_default="bench/out")] = HERE
    / "out",
    save: Annotated[bool, typer.Option("--save", help="write to bench/results/<device> instead")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="only rows that results.json in --out lacks")] = False,
) -> None:
    """Checks every answer against float64, times it beside the strongest form of PyTorch, and reports.

    Exits with 1 if an answer is wrong, 2 if nothing can run or the backend refuses every row, 3 if a row has lost the
    GPU: --resume goes on after it.
    """
    let_interrupts_raise()
    console = Console(width=None if sys.stdout and sys.stdout.isatty() else 100)
    name = backend.value if backend else device.value
    reason = fastattn.available_backends()[name]
    if device is Device.cuda and not torch.cuda.is_available():
        reason = "PyTorch finds no CUDA device"
    if reason is not None:
        console.print(f"[bold red]backend {name!r} cannot run here:[/] {reason}", highlight=False)
        raise typer.Exit(2)
    cases = select_cases(what.value, DTYPES[dtype.value] if dtype else None, quick, match, device.value)
    if not cases:
        console.print("[bold red]no case fits these options[/]")
        raise typer.Exit(2)
    results = out / "results.json"
    try:
        if not save:
            # Now, not when rows have been measured.
            out.mkdir(parents=True, exist_ok=True)
        earlier = report.read_json(results).rows if resume and results.exists() else []
    except OSError as error:
        console.print(f"[bold red]--out {out} cannot be used:[/] {error.strerror}", highlight=False)
        raise typer.Exit(2) from None
    except (ValueError, KeyError, TypeError) as error:
        console.print(f"[bold red]{results} is not what a run wrote:[/] {escape(str(error))}", highlight=False)
        raise typer.Exit(2) from None
    known = {(row.op, row.shape, row.dtype, row.backend) for row in earlier}
    cases = [case for case in cases if (case.op, case.shape, case.dtype, name) not in known]

    gpu = Gpu() if device is Device.cuda else None
    kept: list[report.Run] = []  # what an interruption leaves

    def keep(run: report.Run) -> None:
        if not save:
            report.write_json(replace(run, rows=[*earlier, *run.rows]), results)
        # Not the fault of the row at hand; on a GPU it may be: bench.gpu interrupts a row that hangs.
        kept[:] = [replace(run, rows=[*earlier, *(run.rows if gpu is not None else run.rows[:-1])])]

    torch.set_num_threads(threads or torch.get_num_threads())
    memory.settle_heap()
    effort, aim_s = (QUICK, QUICK_RUN_S) if quick else (Effort(), FULL_RUN_S)
    try:
        run = run_cases(cases, name, effort, aim_s, console, gpu, keep)
        run = replace(run, rows=[*earlier, *run.rows])
        kept[:] = [run]
        print_report(run, console)
        folder = HERE / "results" / run.machine.slug if save else out
        *names, last = write_report(run, folder)
    except KeyboardInterrupt:
        if kept and not save:
            report.write_json(kept[0], results)
        goes_on = f"; the same command with --resume goes on from {results}" if kept and not save else ""
        console.print(f"\ninterrupted{goes_on}", highlight=False, soft_wrap=True)
        raise typer.Exit(130) from None
    console.print(f"[dim]{', '.join(names)} and {last} are in[/] {folder}", highlight=False)
    if gpu is not None and gpu.is_lost():
        raise typer.Exit(3)
    raise typer.Exit(2 if run.rows and run.refused == run.rows else 1 if run.failed else 0)


if __name__ == "__main__":
    app(prog_name="python -m bench")
