"""What ``make gpu`` found out, on one screen and as JSON."""

from __future__ import annotations

import json
import platform
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from xml.etree import ElementTree

from bench.gpu_stages import Stage, answer

MOST_FAILURES, MOST_REASONS, WIDTH = 12, 6, 150


def write(folder: Path, stages: Sequence[Stage], no_gpu: str | None) -> str:
    """Writes summary.json and summary.txt of what is in ``folder``, stages of earlier runs included; returns the text.

    ``no_gpu``: why there is no CUDA backend.
    """
    path = folder / "summary.json"
    records = {each["name"]: each for each in json.loads(path.read_text())["stages"]} if path.exists() else {}
    records |= {stage.name: asdict(stage) for stage in stages}
    tests, unreadable = read_all({f.stem.removeprefix("tests_"): f for f in folder.glob("tests_*.xml")}, read_tests)
    benches, more = read_all({f.parent.name: f for f in folder.glob("*/results.json")}, read_bench)
    summary = {"machine": machine(), "reason": no_gpu, "stages": list(records.values()), "tests": tests,
               "benches": benches, "unreadable": [*unreadable, *more]}  # fmt: skip
    path.write_text(json.dumps(summary, indent=1) + "\n")
    text = "\n".join(line[:WIDTH] for line in lines(summary))
    (folder / "summary.txt").write_text(text + "\n", encoding="utf-8")
    return text


@cache
def machine() -> str:
    """The GPU and what has a say in how its kernels come out."""
    query = answer(["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"], 10)
    gpus = query.stdout.strip().splitlines() if query is not None and query.returncode == 0 else ["no GPU"]
    parts = [*(gpu.replace(", ", ", driver ") for gpu in gpus), f"Python {platform.python_version()}"]
    for package in ("torch", "triton", "numpy"):
        with suppress(PackageNotFoundError):
            parts.append(f"{package} {version(package)}")
    return "; ".join(parts)


def read_all(files: dict[str, Path], read: Callable[[Path], dict]) -> tuple[dict[str, dict], list[str]]:
    """What ``files`` say, by name, and the files that say nothing: who is killed as it writes leaves half a report."""
    found, unreadable = {}, []
    for name, path in sorted(files.items()):
        try:
            found[name] = read(path)
        except (ElementTree.ParseError, ValueError, KeyError, TypeError) as error:
            unreadable.append(f"{path.parent.name}/{path.name}: {error}")
    return found, unreadable


def read_tests(path: Path) -> dict:
    """Of a JUnit report: counts, each failure's first line, and how often each reason to skip was given."""
    cases = list(ElementTree.parse(path).getroot().iter("testcase"))
    failures, skipped = [], Counter()
    for case in cases:
        name = f"{case.get('classname', '').removeprefix('tests.')}::{case.get('name')}"
        for problem in (*case.findall("failure"), *case.findall("error")):
            failures.append({"test": name, "message": first_line(problem.get("message"))})
        for reason in case.findall("skipped"):
            skipped[first_line(reason.get("message"))] += 1
    passed = len(cases) - sum(skipped.values()) - len({failure["test"] for failure in failures})
    return {"passed": passed, "failed": len(failures), "skipped": sum(skipped.values()), "failures": failures,
            "reasons": dict(skipped.most_common())}  # fmt: skip


def read_bench(path: Path) -> dict:
    """Of results.json: each row's status, and our time beside the strongest peer's."""
    rows = []
    for row in json.loads(path.read_text())["rows"]:
        line = {name: row[name] for name in ("op", "shape", "dtype", "status", "note", "percent_of_peak")}
        if row["times"] is not None:
            line["time_us"] = row["times"]["median_us"]
        if row["peers"]:
            line |= {"peer": row["peers"][0]["name"], "ratio": row["peers"][0]["ratios"]["median"]}
        rows.append(line)
    return {"rows": rows}


def first_line(text: str | None) -> str:
    return (text or "").strip().split("\n")[0][:300]


def lines(summary: dict) -> Iterable[str]:
    yield summary["machine"]
    if summary["reason"] is not None:
        yield f"no CUDA backend: {summary['reason']}"
    for stage in summary["stages"]:
        again = f" (after {len(stage['attempts'])} restarts)" if stage["attempts"] else ""
        yield f"{stage['name']:<16} {stage['outcome'] + again:<28} {stage['seconds']:5.0f} s  {stage['last_line']}"
    yield from (f"unreadable: {each}" for each in summary["unreadable"])
    for name, tests in summary["tests"].items():
        yield f"\ntests {name}: {tests['passed']} passed, {tests['failed']} failed, {tests['skipped']} skipped"
        yield from few([f"  FAILED {each['test']}: {each['message']}" for each in tests["failures"]], MOST_FAILURES)
        yield from few([f"  skipped {count}: {reason}" for reason, count in tests["reasons"].items()], MOST_REASONS)
    for name, bench in summary["benches"].items():
        yield f"\nbench {name}"
        yield from (bench_line(row) for row in bench["rows"])


def few(texts: list[str], most: int) -> list[str]:
    return texts if len(texts) <= most else [*texts[:most], f"  ... and {len(texts) - most} more: summary.json"]


def bench_line(row: dict) -> str:
    text = f"  {row['op']:<26} {row['shape']:<24} {row['dtype']:<9}"
    if "time_us" not in row:
        return f"{text} {row['status']}: {first_line(row['note'])}"
    peak = f"{row['percent_of_peak']:5.1f}% of peak" if row["percent_of_peak"] is not None else " " * 14
    peer = f"  {row['ratio']:.2f}x {row['peer']}" if "ratio" in row else ""
    return f"{text} {row['time_us']:10.1f} us {peak}{peer}"
