"""Writes a run as JSON (all of it) and CSV (one line for each row and peer), and reads JSON back."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from pathlib import Path

from bench.machine import Machine
from bench.peaks import Peaks
from bench.run import FAILED, REFUSED, Peer, Row
from bench.timing import Ratios, Times
from models.files import in_one_step


@dataclass(frozen=True)
class Run:
    """Everything one invocation found out."""

    machine: Machine
    peaks: Peaks
    rows: list[Row]
    seconds: float
    foreign_cpus: float | None  # over the whole run

    @property
    def failed(self) -> list[Row]:
        return [row for row in self.rows if row.status == FAILED]

    @property
    def refused(self) -> list[Row]:
        return [row for row in self.rows if row.status == REFUSED]

    def as_dict(self) -> dict:
        return {
            "machine": self.machine.as_dict(),
            "peaks": self.peaks.as_dict(),
            "seconds": self.seconds,
            "foreign_cpus": self.foreign_cpus,
            "rows": [row.as_dict() for row in self.rows],
        }


def write_json(run: Run, path: Path) -> None:
    with in_one_step(path) as partial:
        partial.write_text(json.dumps(run.as_dict(), indent=1) + "\n")


def read_json(path: Path) -> Run:
    """The run that ``write_json`` wrote."""
    values = json.loads(Path(path).read_text())
    rows = []
    for row in values["rows"]:
        # Derived values are there for readers of the file.
        row = {name: value for name, value in row.items() if name not in ("gflops", "gigabytes_per_s")}
        row["times"] = Times(**row["times"]) if row["times"] else None
        row["peers"] = [
            Peer(peer["name"], Times(**peer["times"]), Ratios(**peer["ratios"]), peer["one_thread"])
            for peer in row["peers"]
        ]
        rows.append(Row(**row))
    machine, peaks = Machine(**values["machine"]), Peaks(**values["peaks"])
    return Run(machine, peaks, rows, values["seconds"], values["foreign_cpus"])


CSV_COLUMNS = (
    "op", "shape", "dtype", "backend", "status", "time_us", "q1_us", "q3_us", "min_us", "gflops", "gigabytes_per_s",
    "percent_of_peak", "peer", "peer_time_us", "ratio_median", "ratio_q1", "ratio_min", "one_thread_ratio", "error",
    "allowed", "disturbed", "note", "device", "threads", "isa", "torch", "commit", "date",
)  # fmt: skip


def write_csv(run: Run, path: Path) -> None:
    """A tidy table; a row without times (refused, failed) is one line without a peer."""
    machine = run.machine
    where = {
        "device": machine.gpu or machine.cpu,
        "threads": machine.threads,
        "isa": machine.isa,
        "torch": machine.torch,
    }
    where |= {"commit": machine.commit, "date": machine.date}
    with in_one_step(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, CSV_COLUMNS)
        writer.writeheader()
        for row in run.rows:
            for peer in row.peers or [None]:
                line = _row_values(row) | (_peer_values(peer) if peer else {}) | where
                writer.writerow({name: _text(value) for name, value in line.items()})


def _row_values(row: Row) -> dict:
    values = {name: getattr(row, name) for name in ("op", "shape", "dtype", "backend", "status", "note", "disturbed")}
    if row.times is not None:
        values |= {"time_us": row.times.median_us, "q1_us": row.times.q1_us, "q3_us": row.times.q3_us}
        values |= {"min_us": row.times.min_us, "gflops": row.gflops, "gigabytes_per_s": row.gigabytes_per_s}
        values |= {name: getattr(row, name) for name in ("percent_of_peak", "error", "allowed")}
    return values


def _peer_values(peer: Peer) -> dict:
    return {
        "peer": peer.name, "peer_time_us": peer.times.median_us, "ratio_median": peer.ratios.median,
        "ratio_q1": peer.ratios.q1, "ratio_min": peer.ratios.minimum, "one_thread_ratio": peer.one_thread,
    }  # fmt: skip


def _text(value: object) -> object:
    return f"{value:.5g}" if isinstance(value, float) else value
