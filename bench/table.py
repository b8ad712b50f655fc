"""The terminal's table: one block an op, a line a peer; where names are longer than there is room, they go on below."""

from __future__ import annotations

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from bench.peaks import streams
from bench.report import Run
from bench.run import FAILED, OK, Peer, Row

LEGEND = (
    "ratio: PyTorch's time over ours, of medians; range: lowest and highest of the ratios of medians, first quartiles "
    "and minima. 1 thr: the ratio to the strongest peer with one thread. peak: share of what this machine's measured "
    "GEMM and copy speeds allow. err: largest error over the allowed one (twice eager's against float64, and an ulp; "
    "for int8 models, of 1 − cosine)."
)


# The numbers, their padding, and 11 and 10 characters for the names. Terminals have 80; narrower ones fold the lines.
LEAST_WIDTH = 80
NUMBER_WIDTHS = (5, 9, 4, 6, 9, 5, 4)  # spread, speed, peak, ratio, range, 1 thr, err


def blocks(rows: list[Row]) -> dict[tuple[str, str], list[Row]]:
    """Rows by (op, dtype), in the order in which each first comes."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row.op, row.dtype), []).append(row)
    return found


def microseconds(value: float) -> str:
    return f"{value:,.0f}" if value >= 99.5 else f"{value:.1f}"


def speed(row: Row) -> str:
    """Bytes a second for what streams, arithmetic for the rest."""
    unit, value = ("GB/s", row.gigabytes_per_s) if streams(row.flops, row.bytes) else ("GF/s", row.gflops)
    return f"{value:.0f} {unit}" if value >= 10 else f"{value:.1f} {unit}"


def header_lines(run: Run) -> list[tuple[str, str]]:
    """(label, text) of what the numbers depend on."""
    machine, peaks = run.machine, run.peaks
    gemm = " · ".join(f"{name} {value:,.0f}" for name, value in peaks.gemm.items())
    load = "unknown" if run.foreign_cpus is None else f"{run.foreign_cpus:.2f} CPUs on average"
    return [
        ("machine", f"{machine.cpu} (family {machine.family}), {machine.threads} threads, {machine.isa} kernels"),
        *([("GPU", f"{machine.gpu}; {machine.gpu_software}; {machine.clocks}")] if machine.gpu else []),
        ("software", f"torch {machine.torch}, Python {machine.python}, {machine.system}, commit {machine.commit}"),
        ("peaks", f"GEMM Gop/s: {gemm}"),
        ("", f"copy GB/s: {peaks.copy_cache:.0f} in cache · {peaks.copy_memory:.0f} in memory"),
        ("run", f"{machine.date}, {run.seconds:.0f} s; others used {load}"),
    ]


def _ratio_style(ratio: float) -> str:
    return "bold green" if ratio >= 1.05 else "bold red" if ratio < 0.95 else "yellow"


def _columns(rows: list[Row], width: int) -> Table:
    """An empty block with the widths that all blocks share. No number is ever cut."""
    shape = max((len(row.shape) for row in rows), default=5) + 2  # room for a note's number
    peer = max([len("PyTorch"), *(len(peer.name) for row in rows for peer in row.peers)])
    time = max([len("time µs"), *(len(microseconds(row.times.median_us)) for row in rows if row.times)])
    padding = 1 if width < 110 else 2
    room = width - (time + sum(NUMBER_WIDTHS) + 10 * padding)
    if shape + peer > room:
        shape = min(shape, max(room - peer, room * 11 // 21))
        peer = room - shape
    table = Table(box=None, padding=(0, padding, 0, 0), show_edge=False, header_style="dim")
    table.add_column("shape", width=shape, overflow="fold")
    table.add_column("time µs", width=time, justify="right", no_wrap=True)
    spread, speed, peak, ratio, span, one_thread, error = NUMBER_WIDTHS
    table.add_column("", width=spread, style="dim", no_wrap=True)
    table.add_column("speed", width=speed, justify="right", no_wrap=True)
    table.add_column("peak", width=peak, justify="right", no_wrap=True)
    table.add_column("PyTorch", width=peer, overflow="fold")
    table.add_column("ratio", width=ratio, justify="right", no_wrap=True)
    table.add_column("range", width=span, style="dim", no_wrap=True)
    table.add_column("1 thr", width=one_thread, justify="right", no_wrap=True)
    table.add_column("err", width=error, justify="right", no_wrap=True)
    return table


def _short(ratio: float) -> str:
    return f"{ratio:.2f}" if ratio < 10 else f"{ratio:.1f}" if ratio < 100 else f"{ratio:.0f}"


def _peer_cells(peer: Peer) -> list[RenderableType]:
    return [
        peer.name,
        Text(f"{_short(peer.ratios.median)}×", _ratio_style(peer.ratios.median)),
        f"{_short(min(peer.ratios))}–{_short(max(peer.ratios))}",
        "" if peer.one_thread is None else f"{_short(peer.one_thread)}×",
    ]


def _add_row(table: Table, row: Row, marker: str) -> None:
    shape = Text(row.shape).append(marker, "cyan")
    if row.times is None:
        table.add_row(shape, Text(row.status, "bold red" if row.status == FAILED else "yellow"))
        return
    peak = "" if row.percent_of_peak is None else f"{row.percent_of_peak:.0f}%"
    own = [shape, microseconds(row.times.median_us), f"±{row.times.spread:.0%}", speed(row), peak]
    # An error of zero over anything is a perfect score, and 1.00 just passes.
    error = f"{row.error / row.allowed:.2f}"
    peers = row.peers or [None]
    for i, peer in enumerate(peers):
        cells = _peer_cells(peer) if peer else [""] * 4
        table.add_row(*(own if i == 0 else [""] * 5), *cells, error if i == 0 else "")


def render(run: Run, width: int) -> RenderableType:
    """The whole report for a terminal ``width`` columns wide."""
    head = Table.grid(padding=(0, 2, 0, 0))
    for label, text in header_lines(run):
        head.add_row(Text(label, "dim"), text)
    parts: list[RenderableType] = [Text("fastattn bench", "bold"), head]
    notes: list[Text] = []
    for (op, dtype), block in blocks(run.rows).items():
        table = _columns(run.rows, width)
        for row in block:
            note = _note(row)
            if note and note not in notes:
                notes.append(note)
            _add_row(table, row, _superscript(notes.index(note) + 1) if note else "")
        parts += [Text(), Text.assemble((op, "bold"), ("  " + dtype, "dim")), table]
    parts += [Text()]
    for i, note in enumerate(notes):
        line = Table.grid(padding=(0, 1, 0, 0))
        line.add_row(Text(_superscript(i + 1), "cyan"), note)
        parts.append(line)
    parts += [Padding(Text(LEGEND, "dim"), (1 if notes else 0, 0, 0, 0)), Text(), summary(run.rows)]
    return Group(*parts)


def _note(row: Row) -> Text | None:
    if not row.note:
        return None
    if row.status == OK:
        return Text(row.note, "yellow" if row.disturbed else "")
    return Text(f"{row.op}, {row.shape}: {row.note}", "red" if row.status == FAILED else "yellow")


def _superscript(number: int) -> str:
    return str(number).translate(str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹"))


def summary(rows: list[Row]) -> Text:
    """One line that says how the run went; the last thing on the screen."""
    done = [row for row in rows if row.status == OK]
    failed = sum(row.status == FAILED for row in rows)
    text = Text(f"{len(done)} of {len(rows)} rows checked and timed", "bold")
    compared = [row.strongest.ratios.median for row in done if row.strongest]
    if compared:
        faster = sum(ratio > 1 for ratio in compared)
        text.append(f"; faster than the strongest form of PyTorch in {faster} of {len(compared)}", "")
    disturbed = sum(row.disturbed for row in done)
    if disturbed:
        text.append(f"; {disturbed} disturbed by other work", "yellow")
    refused = len(rows) - len(done) - failed
    if refused:
        text.append(f"; {refused} refused by the backend", "yellow")
    if failed:
        text.append(f"; {failed} FAILED", "bold red")
    return text.append(".")


def print_report(run: Run, console: Console) -> None:
    console.width = max(console.width, LEAST_WIDTH)
    console.print(render(run, console.width))
