"""The benchmarks of a GPU, rehearsed without one: a clock whose truth is known, cases small enough for the CPU."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from test_bench import EFFORT, make_run, toy_case
from typer.testing import CliRunner

import fastattn
from bench import __main__ as cli
from bench import gpu_cases, gpu_models, gpu_peers, gpu_timing, machine, peaks, readme, report
from bench.run import FAILED, OK, REFUSED, run_case
from models.gpt import GptConfig


class FakeGpu:
    """Captures nothing and times nothing: each call costs what ``cost`` says of it."""

    l2_bytes = 1 << 20

    def __init__(self, cost=lambda callee: 1e-5) -> None:
        self.cost, self.captured = cost, []

    def building(self):
        return nullcontext()

    def is_lost(self):
        return False

    def capture(self, callees):
        if any(getattr(callee, "uncapturable", False) for callee in callees):
            raise RuntimeError("operation not permitted when stream is capturing")
        self.captured.append(callees)
        for callee in callees:
            callee()
        replay = lambda: None  # noqa: E731
        replay.callees = callees
        return replay

    def seconds(self, run, times):
        callees = run.callees if isinstance(run, gpu_timing.Rotation) else [run]
        return times * sum(map(self.cost, callees))

    def best_seconds(self, callee, budget_s):
        callee()
        return 1e-3

    def clocks(self):
        return "SM 1980 of 1980 MHz"


# --- Timing ----------------------------------------------------------------------------------------------------------


def test_copies_cover_l2_twice_within_reason():
    l2 = 50 << 20
    assert gpu_timing.copies(1 << 30, l2) == gpu_timing.MIN_COPIES
    assert gpu_timing.copies(10 << 20, l2) == 10
    assert gpu_timing.copies(1024, l2) == gpu_timing.MAX_COPIES
    assert gpu_timing.is_cold(10 << 20, 10, l2) and not gpu_timing.is_cold(1024, gpu_timing.MAX_COPIES, l2)


def test_a_sample_is_the_time_of_one_call():
    gpu = FakeGpu(cost=lambda callee: callee())
    rotation = gpu_timing.Rotation(gpu, [lambda: 1e-5, lambda: 3e-5])
    assert gpu_timing.gpu_sample(rotation, 1).seconds == pytest.approx(2e-5)
    assert gpu_timing.gpu_sample(rotation, 100).seconds == pytest.approx(2e-5)
    assert rotation.note == ""


def test_what_cannot_be_captured_is_called_and_told():
    calls = []

    def callee():
        calls.append(1)

    callee.uncapturable = True
    rotation = gpu_timing.Rotation(FakeGpu(), [callee] * 3)
    rotation()
    assert len(calls) == 3
    assert rotation.note == "not captured (RuntimeError): times include launches"


def test_clocks_are_read_from_what_nvidia_smi_prints():
    clocks = gpu_timing.parse_clocks("1755, 1980, 2619, 412.33, 700.00, 0x0000000000000004")
    assert clocks.text == "SM 1755 of 1980 MHz, memory 2619 MHz, 412 of 700 W, slowed (0x4)"
    assert "slowed" not in gpu_timing.parse_clocks("345, 1980, 2619, 71.0, 700.00, 0x1").text
    for line in ("", "[N/A], 1980, 2619, 412.33, 700.00, 0x4", "1, 2, 3"):
        assert gpu_timing.parse_clocks(line) is None


# --- Rows ------------------------------------------------------------------------------------------------------------


def test_a_row_is_timed_over_copies_of_its_tensors():
    gpu = FakeGpu(cost=lambda callee: 1e-5 if "lambda" in repr(callee) else 4e-5)
    row = run_case(toy_case(), "eager", EFFORT, gpu)
    assert row.status == OK, row.note
    assert row.strongest.name == "torch.exp" and row.strongest.ratios.median == pytest.approx(4.0)
    assert row.strongest.one_thread is None and row.foreign_cpus is None
    assert [len(callees) for callees in gpu.captured] == [gpu_timing.MAX_COPIES] * 2
    tensors = {callee.__self__.data_ptr() for callee in gpu.captured[1]}
    assert len(tensors) == gpu_timing.MAX_COPIES
    assert "operands fit in L2" in row.note
    assert run_case(toy_case(bytes_=1e9), "eager", EFFORT, gpu).note == ""


def test_a_wrong_answer_fails_before_anything_is_timed():
    gpu = FakeGpu()
    row = run_case(toy_case(offset=1e-3), "eager", EFFORT, gpu)
    assert row.status == FAILED and "wrong answer" in row.note and not gpu.captured


# --- Cases -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def plain_peers(monkeypatch):
    """Without a compiler: what runs here, as it is."""
    monkeypatch.setattr(gpu_peers, "compiled", lambda function: function)
    monkeypatch.setattr(gpu_peers, "_flex_attention", lambda causal, q, k, v: 1 / 0)


def test_every_case_has_a_name_of_its_own_and_work():
    cases = cli.select_cases(device="cuda")
    assert len({case.plain_name for case in cases}) == len(cases) > 30
    assert all(case.flops > 0 and case.bytes > 0 and case.plain_name.isascii() for case in cases)
    assert {case.group for case in cli.select_cases(device="cuda", quick=True)} == {
        "attention", "layer_norm", "int8_matmul", "models",
    }  # fmt: skip
    assert {case.group for case in cli.select_cases("layer_norm", device="cuda")} == {"layer_norm"}


TINY_GPT = GptConfig(vocab_size=50, dim=32, num_layers=1, num_heads=2, hidden_dim=64, dropout=0.0)
SMALL = {
    "attention forward": gpu_cases.attention("forward", (2, 3, 33, 16), "bfloat16", causal=True),
    "attention backward": gpu_cases.attention("backward", (1, 2, 17, 16), "float16", causal=False),
    "decode": gpu_cases.decode(2, heads=4, heads_kv=2, seqlen_k=65, head_dim=16),
    **{
        f"{op} {direction}": gpu_cases.norm(op, direction, 9, 65)
        for op in ("layer norm", "rms norm", "add + layer norm")
        for direction in ("forward", "backward")
    },
    "int8 linear": gpu_cases.int8_linear(5, 64, 48),
    "GPT training step": gpu_models.gpt_training_step(
        "GPT training step",
        2,
        17,
        GptConfig(vocab_size=50, dim=32, num_layers=1, num_heads=2, hidden_dim=64, dropout=0.0),
    ),
}


@pytest.mark.parametrize("backend", ["eager", "triton"])
@pytest.mark.parametrize("name", SMALL)
def test_a_small_case_runs_from_end_to_end(name, backend, plain_peers):
    if fastattn.available_backends()[backend] is not None or torch.cuda.is_available():
        pytest.skip("a rehearsal for machines without a GPU")
    gpu = FakeGpu()
    gpu.l2_bytes = 1  # few copies
    row = run_case(SMALL[name], backend, EFFORT, gpu)
    if row.status == REFUSED:
        pytest.skip(row.note)
    assert row.status == OK, row.note
    assert row.peers and row.error <= row.allowed
    if name == "GPT training step":
        assert {peer.name for peer in row.peers} == {"SDPA", "eager", "torch.compile"}
    if "attention" in name or name == "decode":
        assert any(peer.name.startswith("SDPA") for peer in row.peers)


def test_a_peer_that_is_not_there_or_refuses_is_left_out():
    assert gpu_peers.imported("no_such_package", "attribute") is None
    assert gpu_peers.imported("math", "no_such_attribute") is None
    assert list(gpu_peers.available({"runs": lambda x: x, "refuses": lambda x: x / 0}, 1)) == ["runs"]


def test_nothing_is_compiled_past_the_deadline():
    gpu_peers.compile_until(0.0)
    try:
        x, weight = torch.randn(3, 8), torch.randn(8)
        assert list(gpu_peers.available(gpu_peers.norm_forms("rms norm"), x, weight)) == ["torch"]
    finally:
        gpu_peers.compile_until(float("inf"))


# --- The command line and the report ---------------------------------------------------------------------------------


def test_without_a_gpu_it_exits_with_2_and_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = CliRunner().invoke(cli.app, ["--device", "cuda", "--backend", "eager"])
    assert result.exit_code == 2 and "PyTorch finds no CUDA device" in result.output


def test_a_run_names_its_gpu_everywhere(monkeypatch, tmp_path, plain_peers):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cli, "Gpu", FakeGpu)
    monkeypatch.setattr(cli, "QUICK", EFFORT)
    monkeypatch.setattr(cli, "HERE", tmp_path)
    monkeypatch.setattr(cli.gpu_cases, "cases", lambda: iter([toy_case(quick=True)]))
    monkeypatch.setattr(cli.peaks, "measure_gpu", lambda l2, best_of: make_run().peaks)
    here = machine.describe(1)
    described = replace(here, gpu="NVIDIA H100 80GB HBM3", gpu_software="driver 570")
    monkeypatch.setattr(cli.machine, "describe", lambda threads, device: described)
    result = CliRunner().invoke(cli.app, ["--device", "cuda", "--backend", "eager", "--quick", "--save"])
    assert result.exit_code == 0, result.output
    assert "NVIDIA H100 80GB HBM3" in result.output and "SM 1980 of 1980 MHz" in result.output
    folder = tmp_path / "results" / "nvidia-h100-80gb-hbm3"
    run = report.read_json(folder / "results.json")
    assert run.machine.clocks == "before: SM 1980 of 1980 MHz; after: SM 1980 of 1980 MHz"
    assert "NVIDIA H100 80GB HBM3" in (folder / "results.csv").read_text()
    assert "fastattn on NVIDIA H100 80GB HBM3" in (folder / "index.html").read_text()


def test_roofs_are_measured_by_the_gpus_clock(monkeypatch):
    monkeypatch.setattr(peaks, "GPU_GEMM_SHAPES", ((32, 32, 32),))
    monkeypatch.setattr(peaks, "GPU_COPY_BYTES", 1 << 12)
    roofs = peaks.measure_gpu(1 << 10, FakeGpu().best_seconds)
    assert roofs.gemm == pytest.approx(dict.fromkeys(("float32", "bfloat16", "int8", "float16"), 2e-9 * 32**3 / 1e-3))
    assert roofs.flops("float16") == roofs.gemm["float16"]


def test_readme_quotes_the_processor():
    _, run = readme.newest_results()
    assert not run.machine.gpu
