"""The benchmark harness: its statistics on clocks whose truth is known, its reports, and that a wrong answer fails."""

from __future__ import annotations

import copy
import csv
import io
import json
import math
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from itertools import cycle
from pathlib import Path

import pytest
import torch
import typer
from rich.console import Console
from typer.testing import CliRunner

import fastattn
from bench import __main__ as cli
from bench import page, report, timing
from bench.bench_training import check_of_step, judged_as
from bench.case import Case, Subject, Verdict, as_accurate_as_eager
from bench.machine import Machine
from bench.peaks import Peaks
from bench.run import FAILED, OK, REFUSED, Effort, Peer, Row, run_case
from bench.table import print_report
from bench.timing import Ratios, Sample, Times, compare, summarize
from models.layers import set_backend
from models.transformer import Transformer, TransformerConfig, translation_loss

# --- Statistics ------------------------------------------------------------------------------------------------------


class FakeClock:
    """Samples by name of the callable's cost, times a factor that the test lets drift, and never touches real time."""

    def __init__(self, factor=lambda sample: 1.0, clean=lambda sample: True) -> None:
        self.factor, self.clean, self.taken = factor, clean, []

    def __call__(self, callee, calls: int) -> Sample:
        sample = len(self.taken)
        self.taken.append((callee, calls))
        return Sample(callee() * self.factor(sample), self.clean(sample))


@pytest.fixture(autouse=True)
def quiet_machine(monkeypatch):
    """No foreign load, unless a test says otherwise: these tests run beside others."""
    monkeypatch.setattr(timing.ForeignLoad, "stop", lambda self: 0.0)
    monkeypatch.setattr(timing, "wait_until_idle", lambda: True)


def test_ratio_is_the_peers_time_over_ours():
    result = compare({"ours": lambda: 1e-3, "peer": lambda: 2.5e-3}, budget_s=0.0, take_sample=FakeClock())
    assert result.ratios("peer") == pytest.approx((2.5, 2.5, 2.5))
    assert result.disturbance is None and result.attempts == 1


def test_slow_drift_of_the_machine_leaves_the_ratio_alone():
    clock = FakeClock(factor=lambda sample: 1 + 0.05 * sample)  # four times slower at the end than at the start
    result = compare({"ours": lambda: 1e-3, "peer": lambda: 2e-3}, budget_s=1.0, take_sample=clock, retries=0)
    assert result.ratios("peer").median == pytest.approx(2.0, rel=0.02)


def test_subjects_alternate_their_order():
    ours, peer = (lambda: 1e-3), (lambda: 2e-3)
    clock = FakeClock()
    compare({"ours": ours, "peer": peer}, budget_s=0.0, take_sample=clock)
    measured = [callee for callee, _ in clock.taken[-4:]]
    assert measured in ([ours, peer, peer, ours], [peer, ours, ours, peer])


def test_a_sample_is_two_milliseconds_of_calls():
    clock = FakeClock()
    compare({"short": lambda: 1e-5, "long": lambda: 0.1}, budget_s=0.0, take_sample=clock)
    calls = {callee(): calls for callee, calls in clock.taken}
    assert calls == {1e-5: 200, 0.1: 1}


def test_interrupted_samples_are_dropped():
    samples = [Sample(1e-3, True)] * 8 + [Sample(9e-3, False)] * 3
    times = summarize(samples)
    assert (times.samples, times.dropped) == (8, 3)
    assert times.q3_us == pytest.approx(1000.0)


def test_all_samples_count_where_hardly_any_is_clean():
    times = summarize([Sample(1e-3, True)] * 2 + [Sample(3e-3, False)] * 8)
    assert (times.samples, times.dropped) == (10, 0)
    assert times.median_us == pytest.approx(3000.0)


def test_disagreeing_ratios_are_repeated_and_told():
    # Half of the peer's samples take three times as long: its minimum and its median tell different stories.
    seconds = cycle([2e-3, 6e-3])
    subjects = {"ours": lambda: 1e-3, "peer": lambda: next(seconds)}
    result = compare(subjects, budget_s=0.0, retries=2, take_sample=FakeClock())
    assert result.attempts == 3
    assert "ratios differ by" in result.disturbance


def test_foreign_load_is_repeated_and_told(monkeypatch):
    monkeypatch.setattr(timing.ForeignLoad, "stop", lambda self: 0.9)
    result = compare({"ours": lambda: 1e-3, "peer": lambda: 2e-3}, budget_s=0.0, retries=2, take_sample=FakeClock())
    assert result.attempts == 3
    assert "0.9 CPUs" in result.disturbance


def test_an_undisturbed_repeat_replaces_a_disturbed_attempt(monkeypatch):
    loads = iter([0.9, 0.0, 0.9])
    monkeypatch.setattr(timing.ForeignLoad, "stop", lambda self: next(loads))
    result = compare({"ours": lambda: 1e-3}, budget_s=0.0, retries=2, take_sample=FakeClock())
    assert result.attempts == 2 and result.disturbance is None and result.foreign_cpus == 0.0


def test_the_real_clock_orders_real_work():
    small, large = torch.zeros(1 << 12), torch.zeros(1 << 20)
    with timing.threads(1):
        result = compare({"large": large.exp, "small": small.exp}, budget_s=0.05, retries=0)
    assert 0 < result.ratios("small").minimum < 0.3


def test_threads_are_put_back():
    before = torch.get_num_threads()
    with pytest.raises(RuntimeError), timing.threads(1):
        assert torch.get_num_threads() == 1
        raise RuntimeError
    assert torch.get_num_threads() == before


# --- Cases and rows --------------------------------------------------------------------------------------------------

EFFORT = Effort(budget_s=0.0, one_thread_budget_s=0.0, retries=0)


def toy_case(offset: float = 0.0, bytes_: float = 2048, **changes) -> Case:
    """exp of a few numbers, wrong by ``offset``."""

    def build() -> Subject:
        x = torch.linspace(-1, 1, 256)
        check = as_accurate_as_eager(lambda: x.exp() + offset, lambda: x.exp(), lambda: x.double().exp())
        return Subject(lambda: x.exp() + offset, {"torch.exp": x.exp}, check)

    return Case(
        "attention", "toy", "256", "float32", build, flops=256, bytes=bytes_, headline="a toy", **changes
    )  # fmt: skip


def test_a_right_answer_is_timed():
    with timing.threads(2):
        row = run_case(toy_case(), "eager", EFFORT)
    assert row.status == OK and row.error <= row.allowed
    assert row.strongest.name == "torch.exp" and row.strongest.one_thread > 0
    assert row.gflops == pytest.approx(256e-3 / row.times.median_us)


def test_a_wrong_answer_fails_and_is_not_timed():
    row = run_case(toy_case(offset=1e-5), "eager", EFFORT)
    assert row.status == FAILED and row.times is None
    assert "max error" in row.note


def test_an_error_fails_the_row():
    def build() -> Subject:
        raise RuntimeError("boom")

    row = run_case(replace(toy_case(), build=build), "eager", EFFORT)
    assert row.status == FAILED and row.note == "RuntimeError: boom"


def test_a_refusal_is_told_and_is_no_failure():
    def build() -> Subject:
        raise NotImplementedError("attention: backend 'cpu' cannot run this: too wide")

    row = run_case(replace(toy_case(), build=build), "eager", EFFORT)
    assert row.status == REFUSED and "too wide" in row.note


def test_the_peer_that_is_fastest_comes_first():
    def build() -> Subject:
        x = torch.zeros(64)

        def late() -> torch.Tensor:
            time.sleep(0.01)  # longer than other processes may hold up the other peer in most of its samples
            return x.exp()

        return Subject(x.exp, {"late": late, "prompt": x.exp}, lambda: Verdict(0.0, 1.0))

    with timing.threads(2):
        row = run_case(replace(toy_case(), build=build), "eager", EFFORT)
    assert [peer.name for peer in row.peers] == ["prompt", "late"]
    assert row.peers[0].one_thread is not None and row.peers[1].one_thread is None


def test_a_row_is_cut_short_where_the_run_is_late():
    effort = Effort(budget_s=2.0, one_thread_budget_s=1.0, retries=2)
    assert effort.within(30.0) == effort
    assert effort.within(4.0) == Effort(budget_s=1.0, one_thread_budget_s=0.5, retries=0)
    assert effort.within(-5.0) == Effort(budget_s=0.0, one_thread_budget_s=0.0, retries=0)


def test_percent_of_peak_is_of_the_nearer_roof():
    peaks = Peaks(
        {"float32": 100.0, "bfloat16": 50.0, "int8": 400.0}, copy_cache=10.0, copy_memory=1.0, cache_bytes=1000
    )
    assert peaks.percent("float32", flops=1e9, bytes_=10, seconds=0.02) == pytest.approx(50)  # 10 ms at best
    assert peaks.percent("int8", flops=1e9, bytes_=10, seconds=0.02) == pytest.approx(12.5)
    assert peaks.percent("bfloat16", flops=1e9, bytes_=10, seconds=0.02) == pytest.approx(50)  # float32 is faster
    assert peaks.percent("float32", flops=1, bytes_=1e7, seconds=0.02) == pytest.approx(50)
    assert peaks.percent("float32", flops=2e7, bytes_=5e6, seconds=0.01) == pytest.approx(50)  # streams


# --- Reports ---------------------------------------------------------------------------------------------------------


def make_run(*rows: Row) -> report.Run:
    peaks = Peaks({"float32": 200.0, "bfloat16": 400.0, "int8": 800.0}, 50.0, 10.0, 32 << 20)
    machine = Machine(
        "Test <b> 9000", "7", "avx512", 2, 32 << 20, "2.0", "3.11", "Linux", "0.1", "abc123", "2026-01-01"
    )
    return report.Run(machine, peaks, [row.under(peaks) for row in rows], 12.0, 0.01)


def make_row(op: str, ratio: float = 2.0, **changes) -> Row:
    times = Times(100.0, 98.0, 104.0, 95.0, 20, 1)
    peer = Peer("SDPA", replace(times, median_us=100 * ratio), Ratios(ratio, ratio * 1.02, ratio * 0.97), 1.4)
    row = Row("attention", op, "1×2×128×64 full", "float32", "cpu", OK, times=times, peers=[peer], flops=1e7, bytes=1e5,
              error=1e-7, allowed=4e-7, seqlen=128, variant="forward, full", headline=f"{op} headline")  # fmt: skip
    return replace(row, **changes)


RUN_ROWS = (
    make_row("attention forward"),
    make_row(
        "attention forward", ratio=0.8, shape="8×2×128×64", disturbed=True, note="disturbed: others used 0.7 CPUs"
    ),
    Row("attention", "attention decode", "1×8", "float32", "cpu", FAILED, "wrong answer: out: <NaN>"),
    Row("layer_norm", "layer norm forward", "4×4", "float32", "cpu", REFUSED, "it has no layer_norm kernel yet"),
)


def test_json_comes_back_as_it_was(tmp_path):
    run = make_run(*RUN_ROWS)
    report.write_json(run, tmp_path / "run.json")
    assert report.read_json(tmp_path / "run.json") == run
    assert json.loads((tmp_path / "run.json").read_text())["machine"]["commit"] == "abc123"


def test_a_run_killed_as_it_writes_leaves_the_rows_of_before(tmp_path, monkeypatch):
    run, write_text = make_run(), Path.write_text

    def half(path, text):
        write_text(path, text[: len(text) // 2])
        raise KeyboardInterrupt

    report.write_json(run, tmp_path / "run.json")
    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(KeyboardInterrupt):
        report.write_json(replace(run, rows=[]), tmp_path / "run.json")
    assert report.read_json(tmp_path / "run.json") == run
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_csv_has_a_line_for_each_row_and_peer(tmp_path):
    report.write_csv(make_run(*RUN_ROWS), tmp_path / "run.csv")
    with (tmp_path / "run.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["status"] for line in lines] == [OK, OK, FAILED, REFUSED]
    first = lines[0]
    assert (first["peer"], float(first["ratio_median"]), float(first["ratio_min"])) == ("SDPA", 2.0, 1.94)
    assert (first["commit"], first["device"], first["torch"]) == ("abc123", "Test <b> 9000", "2.0")
    assert lines[2]["time_us"] == "" and "NaN" in lines[2]["note"]


@pytest.mark.parametrize("width", [40, 80, 100, 160])
def test_table_shows_every_row_uncut(width):
    """As long as the longest of the real ones, and as slow; a terminal of 40 columns folds what it is given."""
    long = make_row(
        "attention forward", shape="32 packed sequences 16 to 512", times=Times(355840, 2e5, 1.6e6, 1e5, 9, 1)
    )
    long = replace(long, peers=[replace(long.peers[0], name="torch.compile flex_attention"), *long.peers])
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    print_report(make_run(*RUN_ROWS, long), console)
    text = console.export_text()
    assert max(len(line.rstrip()) for line in text.splitlines()) <= max(width, 80)
    assert "355,840 " in text and "±197%" in text
    assert "…" not in text
    for part in (
        "2.00×",
        "1.94–2.04",
        "1.40×",
        "0.25",
        "0.80×",
        "FAILED",
        "refused",
        "others used 0.7 CPUs",
        "1 FAILED",
    ):
        assert part in text, part


def test_page_stands_alone_and_escapes_what_it_quotes():
    html = page.render(make_run(*RUN_ROWS))
    assert html.count("<svg") == html.count("</svg>") == 2 + 1  # by length, roofline, bars
    assert "src=" not in html and "<script" not in html and "href=" not in html
    assert "&lt;NaN&gt;" in html and "<NaN>" not in html and "<b> 9000" not in html
    assert "2.00×" in html and "prefers-color-scheme: dark" in html


def test_page_of_a_run_without_a_timed_row_has_no_charts():
    html = page.render(make_run(RUN_ROWS[2]))
    assert "<svg" not in html and "wrong answer" in html


def test_report_folder_is_complete(tmp_path):
    cli.write_report(make_run(*RUN_ROWS), tmp_path / "new")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        "index.html", "results.csv", "results.json", "speedup.png",
    ]  # fmt: skip
    assert (tmp_path / "new" / "speedup.png").read_bytes().startswith(b"\x89PNG")


def test_a_report_is_utf8_whatever_the_locale(tmp_path, monkeypatch):
    monkeypatch.setattr(io, "text_encoding", lambda encoding, stacklevel=2: encoding or "ascii")
    cli.write_report(make_run(*RUN_ROWS), tmp_path)
    for name in ("index.html", "results.csv"):
        assert "1×2×128×64 full" in (tmp_path / name).read_bytes().decode()


def test_a_report_without_matplotlib_has_the_rest(tmp_path, monkeypatch):
    """Minutes of measuring are not lost for a picture."""
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    names = cli.write_report(make_run(*RUN_ROWS), tmp_path)
    assert sorted(names) == sorted(path.name for path in tmp_path.iterdir()) == [
        "index.html", "results.csv", "results.json",
    ]  # fmt: skip


def test_device_folder_tells_processors_apart():
    machine = make_run().machine
    xeon = replace(machine, cpu="Intel(R) Xeon(R) Processor @ 2.50GHz", family="6")
    assert xeon.slug == "intel-xeon-family-6-2-threads"
    assert replace(machine, cpu="AMD EPYC", family="26", threads=8).slug == "amd-epyc-family-26-8-threads"
    assert replace(machine, cpu="AMD Ryzen 9 7950X 16-Core Processor").slug == "amd-ryzen-9-7950x-16-core-2-threads"


# --- The command line ------------------------------------------------------------------------------------------------


@pytest.fixture
def small_runs(monkeypatch):
    """Timing and peaks in no time: these tests are about the flow."""
    monkeypatch.setattr(cli.peaks, "measure", lambda cache: make_run().peaks)
    monkeypatch.setattr(cli, "Effort", lambda: EFFORT)
    monkeypatch.setattr(cli, "QUICK", EFFORT)


def invoke(monkeypatch, cases: list[Case], *arguments: str):
    monkeypatch.setattr(cli.bench_attention, "cases", lambda: iter(cases))
    return CliRunner().invoke(cli.app, ["attention", "--backend", "eager", *arguments])


@pytest.mark.parametrize("name", ["bf16", "bfloat16"])
def test_dtypes_have_short_names(small_runs, monkeypatch, tmp_path, name):
    cases = [toy_case(), replace(toy_case(), dtype="bfloat16")]
    assert invoke(monkeypatch, cases, "--dtype", name, "--out", str(tmp_path)).exit_code == 0
    assert [row.dtype for row in report.read_json(tmp_path / "results.json").rows] == ["bfloat16"]


def test_command_line_goes_on_after_the_row_that_ended_it(small_runs, monkeypatch, tmp_path):
    def end():
        raise SystemExit(130)

    cases = [
        toy_case(),
        replace(toy_case(), op="fatal", build=end),
        replace(toy_case(), op="last"),
    ]
    assert invoke(monkeypatch, cases, "--out", str(tmp_path)).exit_code == 130
    rows = report.read_json(tmp_path / "results.json").rows
    assert [(row.op, row.status) for row in rows] == [("toy", OK), ("fatal", FAILED)]
    assert rows[1].note == "the process ended in this row"
    assert invoke(monkeypatch, cases, "--resume", "--out", str(tmp_path)).exit_code == 1
    resumed = report.read_json(tmp_path / "results.json").rows
    assert resumed[:2] == rows and [(row.op, row.status) for row in resumed[2:]] == [("last", OK)]


def test_an_interrupted_run_keeps_its_rows_and_says_how_to_go_on(small_runs, monkeypatch, tmp_path):
    pressed = []

    def press():
        if not pressed:
            pressed.append(True)
            raise KeyboardInterrupt
        return toy_case().build()

    cases = [toy_case(), replace(toy_case(), op="next", build=press)]
    interrupted = invoke(monkeypatch, cases, "--out", str(tmp_path))
    assert interrupted.exit_code == 130
    said = f"interrupted; the same command with --resume goes on from {tmp_path / 'results.json'}"
    assert said in interrupted.output
    assert [(row.op, row.status) for row in report.read_json(tmp_path / "results.json").rows] == [("toy", OK)]
    assert invoke(monkeypatch, cases, "--resume", "--out", str(tmp_path)).exit_code == 0
    rows = report.read_json(tmp_path / "results.json").rows
    assert [(row.op, row.status) for row in rows] == [("toy", OK), ("next", OK)]


@pytest.mark.parametrize("moment", ["print_report", "page.render", "plot.write_png"])
def test_an_interrupt_as_it_reports_keeps_every_row(moment, small_runs, monkeypatch, tmp_path):
    """It said nothing but "Aborted", and left the last row as one that had ended the process."""

    def press(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(f"bench.__main__.{moment}", press)
        interrupted = invoke(patch, [toy_case()], "--out", str(tmp_path))
    assert interrupted.exit_code == 130
    assert f"interrupted; the same command with --resume goes on from {tmp_path / 'results.json'}" in interrupted.output
    assert [row.status for row in report.read_json(tmp_path / "results.json").rows] == [OK]
    assert not [path for path in tmp_path.iterdir() if path.suffix == ".partial"]
    assert invoke(monkeypatch, [toy_case()], "--resume", "--out", str(tmp_path)).exit_code == 0
    assert (tmp_path / "index.html").exists()


def test_command_line_reports_and_exits_with_0(small_runs, monkeypatch, tmp_path):
    result = invoke(monkeypatch, [toy_case()], "--out", str(tmp_path))
    assert result.exit_code == 0, result.output
    assert "1 of 1 rows checked and timed" in result.output
    assert report.read_json(tmp_path / "results.json").rows[0].status == OK


def test_a_failing_check_exits_with_1(small_runs, monkeypatch, tmp_path):
    result = invoke(monkeypatch, [toy_case(), toy_case(offset=1e-3)], "--out", str(tmp_path))
    assert result.exit_code == 1
    assert "1 of 2 rows checked and timed" in result.output and "1 FAILED" in result.output
    assert [row.status for row in report.read_json(tmp_path / "results.json").rows] == [OK, FAILED]


def test_a_backend_that_cannot_run_exits_with_2_and_the_reason(small_runs, monkeypatch, tmp_path):
    backends = cli.fastattn.available_backends() | {"emulated": "it rains"}
    monkeypatch.setattr(cli.fastattn, "available_backends", lambda: backends)
    result = CliRunner().invoke(cli.app, ["--backend", "emulated", "--out", str(tmp_path)])
    assert result.exit_code == 2 and "cannot run here: it rains" in result.output


def test_refused_rows_exit_with_2_where_there_are_no_others(small_runs, monkeypatch, tmp_path):
    def refuse():
        raise NotImplementedError("attention: too wide")

    refused = replace(toy_case(), op="refused", build=refuse)
    assert invoke(monkeypatch, [refused], "--out", str(tmp_path)).exit_code == 2
    assert invoke(monkeypatch, [refused, toy_case()], "--out", str(tmp_path)).exit_code == 0


@pytest.mark.skipif(fastattn.available_backends()["cpu"] is not None, reason="the extension is missing")
def test_resumed_rows_are_measured_again_for_another_backend(small_runs, monkeypatch, tmp_path):
    assert invoke(monkeypatch, [toy_case()], "--out", str(tmp_path)).exit_code == 0
    assert invoke(monkeypatch, [toy_case()], "--resume", "--backend", "cpu", "--out", str(tmp_path)).exit_code == 0
    assert [row.backend for row in report.read_json(tmp_path / "results.json").rows] == ["eager", "cpu"]


def test_a_run_needs_no_standard_output(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    with pytest.raises(typer.Exit) as exit:
        cli.main(cli.What.attention, backend=cli.Backend.eager, match="no such row")
    assert exit.value.exit_code == 2


def test_no_fitting_case_exits_with_2(small_runs, monkeypatch):
    assert invoke(monkeypatch, [toy_case()], "--match", "no such row").exit_code == 2


@pytest.mark.parametrize("spoil", ["file", "json", "fields"])
def test_a_folder_that_cannot_be_used_is_told_before_anything_is_measured(spoil, monkeypatch, tmp_path):
    monkeypatch.setattr(cli, "run_cases", None)
    out = tmp_path / "out"
    if spoil == "file":
        out.write_text("")
    else:
        out.mkdir()
        (out / "results.json").write_text("{" if spoil == "json" else "{}")
    result = invoke(monkeypatch, [toy_case()], "--resume", "--out", str(out))
    assert result.exit_code == 2 and ("cannot be used" if spoil == "file" else "is not what a run wrote") in " ".join(
        result.output.split()
    )


def test_filters_choose_rows(monkeypatch):
    cases = [toy_case(), toy_case(quick=True), replace(toy_case(quick=True), dtype="bfloat16", shape="77")]
    monkeypatch.setattr(cli.bench_attention, "cases", lambda: iter(cases))
    assert len(cli.select_cases("attention")) == 3
    assert len(cli.select_cases("attention", quick=True)) == 2
    assert len(cli.select_cases("attention", dtype="bfloat16")) == 1
    assert [case.shape for case in cli.select_cases("attention", match="77")] == ["77"]


def test_every_real_case_has_a_name_of_its_own_and_work():
    cases = cli.select_cases()
    assert len({case.plain_name for case in cases}) == len(cases) > 60
    assert all(case.plain_name.isascii() for case in cases)
    assert all(case.flops > 0 and case.bytes > 0 and math.isfinite(case.flops / case.bytes) for case in cases)
    assert {case.group for case in cli.select_cases(quick=True)} == set(cli.GROUPS)


@pytest.mark.parametrize("name", ["1×12×128×64 causal", "1×32/8×4096×128"])
def test_attention_cases_pass_their_own_check(name):
    """The definition in the benchmark and the library's eager form agree: a second opinion on both."""
    case = next(case for case in cli.select_cases("attention") if case.shape == name)
    with cli.fastattn.use_backend("eager"):
        verdict = case.build().check()
    assert verdict.error <= verdict.allowed


def test_peak_memory_counts_what_lives_at_once():
    from bench.memory import peak_megabytes

    # Two operands and their product at once, then the product alone.
    assert peak_megabytes(lambda: torch.ones(1000, 500) @ torch.ones(500, 1000)) == pytest.approx(8.0, abs=0.1)
    assert peak_megabytes(lambda: [torch.ones(250_000) for _ in range(4)][-1]) == pytest.approx(4.0, abs=0.1)


@pytest.mark.parametrize("wrong, relative", [("", 0.0), ("cross_attention.k_proj.weight", 3e-4), ("norm.bias", 3e-5)])
def test_a_training_step_s_check_sees_small_errors(wrong, relative):
    """Of a gradient that is a difference of larger terms too, though rounding may be as large as it makes them."""
    torch.manual_seed(0)
    model = Transformer(TransformerConfig(50, 16, 32, 1, 1, 4, 48, dropout=0.0))
    source, target = torch.randint(3, 50, (4, 9)), torch.randint(3, 50, (4, 9))
    names = [name for name, _ in model.named_parameters()]

    def step(backend: str, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
        form = set_backend(copy.deepcopy(model).to(dtype), backend)
        loss = translation_loss(form, source, target, 0)
        return [loss, *torch.autograd.grad(loss, list(form.parameters()))]

    def ours() -> list[torch.Tensor]:
        loss, *gradients = step("auto")
        pairs = zip(names, gradients, strict=True)
        return [loss, *(g * (1 + relative) if wrong and name.endswith(wrong) else g for name, g in pairs)]

    check = check_of_step(ours, lambda: step("eager"), lambda: step("eager", torch.float64), names)
    expected = "gradient of .*(norm.bias|cross_attention.in_proj_weight)"
    with pytest.raises(AssertionError, match=expected) if wrong else nullcontext():
        check()


def test_a_training_step_is_judged_as_torch_nn_keeps_its_projections():
    assert judged_as("decoder.0.cross_attention.k_proj.bias") == "decoder.0.cross_attention.in_proj_bias"
    assert judged_as("blocks.1.attention.q_proj.weight") == judged_as("blocks.1.attention.v_proj.weight")
    assert judged_as("blocks.1.attention.out_proj.weight") == "blocks.1.attention.out_proj.weight"
