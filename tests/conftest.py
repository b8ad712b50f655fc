"""Fixtures of every test: fixed seeds, NaN in memory that nobody wrote, and the CPU builds to choose from."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import nullcontext

# Read when torch loads OpenMP: test processes share the cores, and threads that spin while they wait would take them.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch

# Read when Triton's kernels are defined: without a GPU they run on CPU tensors, in Triton's interpreter or, compiled
# for the GPU that FASTATTN_TEST_TRITON names, on the emulator.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "0" if os.environ.get("FASTATTN_TEST_TRITON") else "1")

from compiled import nvcc_kernels, why_no_nvcc_kernels
from devices import new_tensors_for, pytest_runtest_makereport, triton_compiled_for  # noqa: F401  (a hook)
from emulated import MODES, Mode

import fastattn
from fastattn._extension import extension, missing_reason
from fastattn.dispatch import available_backends

# tests/run_sanitized.sh names its instrumented package here: a test of another one would find nothing, and pass.
_package = os.environ.get("FASTATTN_TEST_PACKAGE")
if _package and (extension is None or not extension.__file__.startswith(_package)):
    raise pytest.UsageError(f"fastattn comes from {fastattn.__file__}, not from {_package}: {missing_reason}")

if available_backends()["emulated"] is None:
    # Test processes share the cores already; tests/emulated.py has the modes that tests choose from.
    extension.configure_emulator(os_threads=1)

_ISAS = extension.usable_cpu_isas() if extension else []


# Compiled here, where no test's time limit counts.
_nvcc_kernels = None
if os.environ.get("FASTATTN_TEST_NVCC") == "1":
    _why_not = available_backends()["emulated"] or why_no_nvcc_kernels()
    if _why_not:
        raise pytest.UsageError(f"FASTATTN_TEST_NVCC=1: {_why_not}")
    _nvcc_kernels = nvcc_kernels("*")

if _gpu := triton_compiled_for():
    from triton_compiled import CompiledTriton

    CompiledTriton(_gpu, MODES[1]).install()


@pytest.fixture(scope="session", autouse=_nvcc_kernels is not None)
def kernels_of_nvcc() -> Iterator[None]:
    """``FASTATTN_TEST_NVCC=1``: backend "emulated" runs the PTX that nvcc makes of the kernels, each translated at its
    first launch, which takes seconds."""
    with _nvcc_kernels or nullcontext():
        yield


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """``torch.empty``, and ``at::empty`` in the extension, return NaN (the largest value for integers): a forgotten
    element shows."""
    was_enabled = torch.are_deterministic_algorithms_enabled()
    was_warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(was_enabled, warn_only=was_warn_only)


@pytest.fixture
def tensors_where_the_backend_runs(request: pytest.FixtureRequest) -> Iterator[None]:
    """New tensors of a test of a ``backend`` are on its device; files ask for it by ``pytestmark``."""
    callspec = getattr(request.node, "callspec", None)
    with new_tensors_for(callspec.params.get("backend", "cpu") if callspec else "cpu"):
        yield


@pytest.fixture
def plain_mode_afterwards() -> Iterator[None]:
    """For files whose tests run the emulator in other modes, or as other cards."""
    yield
    Mode().apply()


@pytest.fixture(params=_ISAS or [pytest.param(None, marks=pytest.mark.skip(reason=str(missing_reason)))])
def cpu_isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each build of the CPU kernels that this machine can run, in turn."""
    before = extension.active_cpu_isa()
    extension.set_cpu_isa(request.param)
    yield request.param
    extension.set_cpu_isa(before)


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Iterator[object]:
    """A test of a ``backend`` that refuses the call, for a reason of its own, is skipped with that reason."""
    try:
        return (yield)
    except NotImplementedError as refusal:
        callspec = getattr(pyfuncitem, "callspec", None)
        backend = callspec.params.get("backend") if callspec else None
        if backend is not None and f"backend {backend!r} cannot run this" in str(refusal):
            pytest.skip(str(refusal))
        raise
