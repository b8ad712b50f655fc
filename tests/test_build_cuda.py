"""How setup.py finds nvcc and what it asks of it; nothing is compiled here."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import build_time
import pytest
from setup_script import setup_script

from fastattn import _extension, dispatch

ROOT = Path(__file__).resolve().parent.parent
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")


@pytest.fixture
def build(monkeypatch):
    for variable in ("FASTATTN_CUDA", "TORCH_CUDA_ARCH_LIST", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(variable, raising=False)
    return setup_script()


def torch_with(cuda: str | None, capabilities: tuple[tuple[int, int], ...] = ()) -> SimpleNamespace:
    device = SimpleNamespace(is_available=lambda: bool(capabilities), device_count=lambda: len(capabilities),
                             get_device_capability=lambda index: capabilities[index])  # fmt: skip
    return SimpleNamespace(version=SimpleNamespace(cuda=cuda), cuda=device)


def test_why_there_is_no_cuda(build, monkeypatch):
    with pytest.raises(build.NoCuda, match="this torch was built without CUDA"):
        build.find_cuda(torch_with(None))
    monkeypatch.setenv("CUDA_HOME", "/nonexistent")
    with pytest.raises(build.NoCuda, match="nvcc was not found"):
        build.find_cuda(torch_with("13.0"))
    monkeypatch.setenv("FASTATTN_CUDA", "emulated")
    with pytest.raises(build.NoCuda, match="FASTATTN_CUDA=emulated"):
        build.find_cuda(torch_with("13.0"))
    monkeypatch.setenv("FASTATTN_CUDA", "yes")
    with pytest.raises(build.BuildFailure, match="'auto', 'emulated' or 'nvcc', got 'yes'"):
        build.find_cuda(torch_with("13.0"))


def test_nvcc_alone_does_not_fall_back_on_the_emulator(build, monkeypatch, tmp_path):
    monkeypatch.setenv("FASTATTN_CUDA", "nvcc")
    monkeypatch.setattr(build, "find_torch", lambda: torch_with(None))
    command = build.NinjaBuild.__new__(build.NinjaBuild)
    monkeypatch.setattr(build.NinjaBuild, "run_ninja", lambda *arguments: pytest.fail("it builds something"))
    with pytest.raises(build.BuildFailure, match="this torch was built without CUDA"):
        command.build(tmp_path / "_C.so")


def test_a_failed_build_shows_what_failed(build, tmp_path):
    log = tmp_path / "build.log"
    failed = "FAILED: b.o\nc++ b.cpp\nb.cpp: error: wrong"
    log.write_text(f"[1/3] compile a.o\na.h: warning: noise\n[2/3] compile b.o\n{failed}\n[3/3] compile c.o\nnoise\n")
    assert build.failed_commands(log) == failed
    assert build.first_error(log) == "b.cpp: error: wrong"


@needs_nvcc
def test_nvcc_of_another_cuda_is_refused(build):
    with pytest.raises(build.NoCuda, match=r"is of CUDA \d+ but torch was built with CUDA 9\.2"):
        build.find_cuda(torch_with("9.2"))


@needs_nvcc
def test_nvcc_says_where_cuda_is(build):
    release = build.re.search(r"release (\d+\.\d)", build.subprocess.getoutput("nvcc --version"))[1]
    cuda = build.find_cuda(torch_with(release))
    assert any((Path(path) / "cuda_runtime_api.h").exists() for path in cuda.include_paths)
    assert any((Path(path) / "libcudart_static.a").exists() for path in cuda.library_paths)


LISTED = {"8.0": ["80"], "9.0": ["90a"], "8.0;9.0a 8.0+PTX": ["80", "90a", "80+PTX"], "12.0,12.0": ["120"]}


@pytest.mark.parametrize("listed", LISTED)
def test_architectures_as_listed(build, monkeypatch, listed):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", listed)
    assert build.cuda_architectures(torch_with("13.0", ((8, 6),))) == LISTED[listed]


def test_architectures_of_the_machine(build, monkeypatch):
    assert build.cuda_architectures(torch_with("13.0", ((9, 0), (8, 9), (9, 0)))) == ["89", "90a"]
    assert build.cuda_architectures(torch_with("13.0")) == build.DEFAULT_ARCHITECTURES
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "Hopper")
    with pytest.raises(build.NoCuda, match="'Hopper'; expected numbers"):
        build.cuda_architectures(torch_with("13.0"))


def test_a_machine_without_a_gpu_is_told_what_is_compiled_and_how_to_narrow_it(build, monkeypatch, capsys):
    build.cuda_architectures(torch_with("13.0"))
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "no GPU is visible" in said and "80, 90a, 80+PTX" in said
    assert "TORCH_CUDA_ARCH_LIST=9.0" in said
    build.cuda_architectures(torch_with("13.0", ((8, 9),)))
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    build.cuda_architectures(torch_with("13.0"))
    assert capsys.readouterr().err == ""


def test_code_for_hopper_alone_is_compiled_for_it_alone(build):
    architectures = ["80", "80+PTX"]
    assert build.gencode_flags(Path("a_cuda.cu"), architectures) == [
        "-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_80,code=compute_80"]  # fmt: skip
    assert build.gencode_flags(Path("a_cuda_sm90.cu"), architectures) == ["-gencode=arch=compute_90a,code=sm_90a"]


def test_a_build_has_the_device_or_the_emulator(build):
    import torch

    cuda = build.Cuda("nvcc", [], [], ["90a"])
    for given, rule in ((None, "cxx"), (cuda, "nvcc")):
        units = list(build.units(torch, given, sanitize=False))
        names = {unit.source.name for unit in units}
        assert {unit.rule for unit in units if unit.source.suffix == ".cu"} == {rule}
        assert ("device_launch_cuda.cpp" in names) == (given is not None)
        assert ("device_launch_emulated.cpp" in names) == ("scheduler.cpp" in names) == (given is None)


def test_the_schedule_of_a_build():
    # Two cores: the longest first leaves them 5 3 | 4 3 3. At the latest 5 starts when 13 others are shared evenly.
    assert build_time.longest_first([3, 4, 3, 5, 3], 2) == 10
    assert build_time.any_order([3, 4, 3, 5, 3], 2) == 11.5
    assert build_time.longest_first([], 2) == build_time.any_order([], 2) == 0


@needs_nvcc
def test_a_build_for_one_card_has_hoppers_units_too(build):
    jobs = set(map(build_time.job_of, build_time.nvcc_units(build_time.units_for(build, "86"))))
    assert {source for source, _ in jobs} == set((ROOT / "csrc").rglob("*.cu"))
    assert {"_sm90" in source.name: architecture for source, architecture in jobs} == {False: "86", True: "90a"}


@pytest.mark.skipif(_extension.extension is None, reason=str(_extension.missing_reason))
def test_the_reason_reaches_the_user():
    if _extension.without_cuda_reason is None:
        pytest.skip("this build has CUDA kernels")
    report = json.loads((ROOT / "fastattn" / "_build_report.json").read_text())
    assert dispatch.available_backends()["cuda"] == f"fastattn was built without CUDA kernels: {report['cuda']}"
