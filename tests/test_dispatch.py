"""Which backend runs: preferences, refusals, explanations, and the same inside torch.compile."""

from __future__ import annotations

import contextvars
import importlib.util
import os
import subprocess
import sys
import threading

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import fastattn
from fastattn import _triton, dispatch
from fastattn.dispatch import Kernel, register, select


def _refuses_odd(call):
    return f"{call} is odd" if call % 2 else None


@pytest.fixture(autouse=True)
def op(monkeypatch):
    """An op on a machine that runs three backends: cpu refuses odd numbers, emulated and eager refuse nothing."""
    monkeypatch.setattr(dispatch, "TABLE", dict(dispatch.TABLE))
    monkeypatch.setattr(dispatch, "_PREPARE", dict(dispatch._PREPARE))
    available = {"cpu": lambda: None, "eager": lambda: None, "emulated": lambda: None}
    monkeypatch.setattr(dispatch, "_UNAVAILABLE", {**dispatch._UNAVAILABLE, **available})
    register(
        "double",
        Kernel("emulated", lambda call: None, lambda call: 2 * call),
        Kernel("cpu", _refuses_odd, lambda call: 2 * call),
        Kernel("eager", lambda call: None, lambda call: call + call),
        prepare=lambda number: number,
    )
    yield
    fastattn.use_backend("auto")


def test_auto_takes_the_first_that_does_not_refuse():
    assert select("double", 2).backend == "cpu"
    assert select("double", 3).backend == "eager"


def test_emulated_runs_only_by_name():
    assert select("double", 2).backend != "emulated"
    assert select("double", 2, "emulated").backend == "emulated"


def test_interpreted_triton_runs_only_by_name(monkeypatch):
    monkeypatch.setitem(dispatch._UNAVAILABLE, "triton", lambda: None)
    register(
        "treble",
        Kernel("triton", lambda call: None, lambda call: 3 * call),
        Kernel("eager", lambda call: None, lambda call: call + call + call),
        prepare=lambda number: number,
    )
    monkeypatch.setattr(_triton, "_INTERPRETED", True)
    assert select("treble", 2).backend == "eager"
    assert select("treble", 2, "triton").backend == "triton"
    assert "triton    would run, but only when asked for by name" in fastattn.explain("treble", 2)
    monkeypatch.setattr(_triton, "_INTERPRETED", False)
    assert select("treble", 2).backend == "triton"
    assert fastattn.explain("treble", 2).startswith("treble: triton runs")


@pytest.mark.parametrize(
    ("devices", "reason"),
    [([(9, 0)], None), ([(7, 5), (8, 0)], None), ([(7, 5)], "compute capability 7.5, and Triton serves 8.0 and newer")],
)
def test_triton_runs_where_a_gpu_is_new_enough(devices, reason, monkeypatch):
    monkeypatch.setattr(_triton, "_INTERPRETED", False)
    monkeypatch.setattr(_triton, "_INSTALLED", True)
    monkeypatch.setattr(_triton, "_known_gpu_reason", [])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(devices))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: devices[index])
    for _ in range(2):
        answer = fastattn.available_backends()["triton"]
        assert answer is None if reason is None else reason in answer
    assert _triton.refuses_device(torch.zeros(1), "query") == "query is on cpu, not on a GPU of CUDA or ROCm"


@pytest.mark.parametrize(
    ("interpret", "installed", "reason"),
    [("0", True, "no GPU"), ("0", False, "Triton is not installed"), ("1", True, None)],
)
def test_importing_fastattn_imports_no_triton_and_says_whether_it_runs(interpret, installed, reason):
    """In a fresh process: Triton reads its environment once."""
    if installed and importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    if reason == "no GPU" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    program = f"""
import sys
if not {installed}:
    import importlib.util
    find_spec = importlib.util.find_spec
    importlib.util.find_spec = lambda name, *rest: None if name == "triton" else find_spec(name, *rest)
import fastattn
assert "triton" not in sys.modules
print(fastattn.available_backends()["triton"])
"""
    environment = os.environ | {"TRITON_INTERPRET": interpret}
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.startswith(str(reason)), run.stdout


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGPIPE")
def test_python_m_fastattn_ends_without_a_word_when_its_reader_has_enough():
    process = subprocess.Popen([sys.executable, "-m", "fastattn"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert "BrokenPipe" not in process.stderr.read().decode()
    process.stderr.close()
    process.wait()


def test_a_backend_asked_for_by_name_says_why_it_refuses():
    assert select("double", 2, "cpu").backend == "cpu"
    with pytest.raises(
        NotImplementedError, match=r"double: backend 'cpu' cannot run this: 3 is odd\. Use backend='auto'"
    ):
        select("double", 3, "cpu")


def test_a_backend_that_use_backend_chose_is_not_advised_again():
    with fastattn.use_backend("cpu"):
        for backend in ("auto", "cpu"):
            with pytest.raises(NotImplementedError, match=r"3 is odd\. Use use_backend\('auto'\) to let"):
                select("double", 3, backend)


def test_a_backend_without_a_kernel_says_so(monkeypatch):
    monkeypatch.setitem(dispatch._UNAVAILABLE, "triton", lambda: None)
    with pytest.raises(NotImplementedError, match="'triton' cannot run this: it has no double kernel"):
        select("double", 2, "triton")


def test_an_unavailable_backend_says_why(monkeypatch):
    monkeypatch.setitem(dispatch._UNAVAILABLE, "cpu", lambda: "it rains")
    assert select("double", 2).backend == "eager"
    assert fastattn.available_backends()["cpu"] == "it rains"
    assert "cpu       no: it rains" in fastattn.explain("double", 2)
    with pytest.raises(NotImplementedError, match="it rains"):
        select("double", 2, "cpu")
    with pytest.raises(NotImplementedError, match="use_backend: backend 'cpu' cannot run here: it rains"):
        fastattn.use_backend("cpu")
    assert select("double", 2).backend == "eager"


@pytest.mark.parametrize("call", [lambda: select("double", 2, "gpu"), lambda: fastattn.use_backend("gpu"),
                                  lambda: fastattn.explain("double", 2, backend="gpu")])  # fmt: skip
def test_rejects_an_unknown_backend(call):
    with pytest.raises(ValueError, match=r"backend must be 'auto' or one of .*'cpu'.*, got 'gpu'"):
        call()


# --- use_backend -----------------------------------------------------------------------------------------------------


def test_use_backend_holds_until_changed():
    fastattn.use_backend("eager")
    assert select("double", 2).backend == "eager"
    assert select("double", 2, "cpu").backend == "cpu"
    fastattn.use_backend("auto")
    assert select("double", 2).backend == "cpu"


def test_use_backend_nests_and_restores():
    with fastattn.use_backend("eager"):
        with fastattn.use_backend("cpu"):
            assert select("double", 2).backend == "cpu"
            with pytest.raises(NotImplementedError, match="3 is odd"):
                select("double", 3)
        assert select("double", 2).backend == "eager"
    assert select("double", 2).backend == "cpu"


def test_use_backend_opens_several_blocks():
    chosen = fastattn.use_backend("eager")
    for _ in range(2):
        with chosen:
            with chosen:
                assert select("double", 2).backend == "eager"
            assert select("double", 2).backend == "eager"
        assert select("double", 2).backend == "cpu"


def test_use_backend_restores_after_an_error():
    with pytest.raises(KeyError), fastattn.use_backend("eager"):
        raise KeyError
    assert select("double", 2).backend == "cpu"


def test_use_backend_holds_per_thread_and_context():
    seen = []
    with fastattn.use_backend("eager"):
        thread = threading.Thread(target=lambda: seen.append(select("double", 2).backend))
        thread.start()
        thread.join()
        context = contextvars.copy_context()
        context.run(lambda: fastattn.use_backend("cpu"))
        seen.append(select("double", 2).backend)
    assert seen == ["cpu", "eager"]


def _double_in_torch(x):
    return x + 1 if select("double", 2).backend == "eager" else x - 1


def test_a_compiled_function_follows_use_backend():
    counter = CompileCounter()
    compiled = torch.compile(_double_in_torch, fullgraph=True, backend=counter)
    x = torch.zeros(1)
    assert compiled(x).item() == -1
    with fastattn.use_backend("eager"):
        assert compiled(x).item() == 1
        results = []
        thread = threading.Thread(target=lambda: results.append(compiled(x).item()))
        thread.start()
        thread.join()
        assert results == [-1]
    assert compiled(x).item() == -1
    assert counter.frame_count == 2


def test_use_backend_can_be_traced():
    def function(x):
        with fastattn.use_backend("eager"):
            x = _double_in_torch(x)
        return _double_in_torch(x * 10)

    assert torch.compile(function, fullgraph=True, backend="eager")(torch.zeros(1)).item() == 9
    assert select("double", 2).backend == "cpu"


# --- explain ---------------------------------------------------------------------------------------------------------


def test_explain_names_every_backend_with_its_reason():
    text = fastattn.explain("double", 3)
    lines = text.splitlines()
    assert lines[0] == "double: eager runs this call."
    assert [line.split()[0] for line in lines[1:]] == list(dispatch.BACKENDS)
    assert "  cpu       no: 3 is odd" in lines
    assert "  eager     would run" in lines
    assert "  emulated  would run, but only when asked for by name" in lines
    assert fastattn.explain("double", 2).startswith("double: cpu runs")


def test_explain_follows_the_backend_asked_for():
    assert "eager runs this call, as asked for by name" in fastattn.explain("double", 2, backend="eager")
    with fastattn.use_backend("cpu"):
        assert "cpu runs this call, as asked for by use_backend" in fastattn.explain("double", 2)
        assert "raises NotImplementedError: cpu was asked for" in fastattn.explain("double", 3)


def test_explain_takes_the_function_and_rejects_others():
    def double(number): ...

    assert fastattn.explain(double, 2) == fastattn.explain("double", 2)
    with pytest.raises(ValueError, match=r"'treble' is not an op of fastattn; the ops are .*double"):
        fastattn.explain("treble", 2)


def test_available_backends_names_all_of_them():
    reasons = fastattn.available_backends()
    assert tuple(reasons) == dispatch.BACKENDS
    assert reasons["eager"] is None
    assert all(reason is None or reason for reason in reasons.values())


def test_meta_tensors_give_shapes():
    query = torch.empty(1, 2, 5, 8, device="meta")
    assert fastattn.attention(query, query, query).shape == query.shape
    module = fastattn.MultiHeadAttention(8, 2, device="meta")
    assert module(query[0], query[0], query[0])[0].shape == (2, 5, 8)


SERVES = {"80": [80, 86, 89], "86": [86, 89], "90a": [90], "80+PTX": [80, 86, 89, 90, 100, 120], "120": [120]}


@pytest.mark.parametrize("architecture", SERVES)
def test_code_for_an_architecture_serves(architecture):
    known = [75, 80, 86, 89, 90, 100, 120]
    assert [each for each in known if dispatch._serves(architecture, each)] == SERVES[architecture]
