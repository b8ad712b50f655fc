"""What tests do on a GPU alone, on a pretended one (tests/pretended_gpu)."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pretended_gpu
import pytest
import torch

import fastattn
from bench import gpu

ROOT = Path(__file__).parent.parent
pytestmark = [
    pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has a device cuda of its own"),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="libraries are put in front of others as on Linux"),
    pytest.mark.skipif(
        fastattn.available_backends()["emulated"] is not None,
        reason=f"no emulated CUDA kernels: {fastattn.available_backends()['emulated']}",
    ),
]


@pytest.fixture(scope="module")
def environment():
    pretended_gpu.build(Path(torch.__file__).parent)
    return {**os.environ, "PYTHONPATH": f"{ROOT / 'tests'}:{ROOT}", "OMP_NUM_THREADS": "1"}


def test_it_is_a_device_of_its_own(environment):
    code = """
import pretended_gpu, torch, fastattn
x = torch.randn(2, 4, 33, 16, device="cuda", dtype=torch.half, requires_grad=True)
assert (x.device.type, x.cpu().device.type, x.t.__self__.is_cuda) == ("cuda", "cpu", True)
assert x.transpose(1, 2)[0].is_cuda and (x + 1)[:, 0].sum().is_cuda and torch.equal(x.cpu(), x.detach().clone().cpu())
for refused in (lambda: x + torch.ones(16), lambda: torch.randn(3, device="cuda", generator=torch.Generator())):
    try:
        refused()
    except RuntimeError as error:
        assert "Expected" in str(error), error
    else:
        raise AssertionError("taken")
out = fastattn.attention(x, x, x, is_causal=True)
grad, = torch.autograd.grad(out.sum(), x)
y = x.detach().cpu().requires_grad_()
expected = fastattn.attention(y, y, y, is_causal=True, backend="eager")
torch.testing.assert_close(out.cpu(), expected, atol=2e-3, rtol=1e-2)
torch.testing.assert_close(grad.cpu(), torch.autograd.grad(expected.sum(), y)[0], atol=1e-2, rtol=1e-2)
assert "cuda runs this call" in fastattn.explain("attention", x, x, x)
"""
    run = subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


# The quick ones among those of `make gpu`.
RUN = ["tests/test_cuda_inputs.py", "tests/test_cuda_graphs.py", "tests/test_varlen_attention_cuda.py",
       "tests/test_gpt.py", "tests/test_training.py", "tests/test_transformer.py"]  # fmt: skip


def test_the_tests_of_the_device_pass_where_they_would_run(environment):
    """Their tensors are on the device, and those that are compared on one device."""
    assert set(RUN) <= set(gpu.DEVICE_TESTS)
    command = [sys.executable, "-m", "pytest", "-p", "pretended_gpu", "-p", "no:cacheprovider", *RUN, "-k",
               gpu.SELECTIONS["cuda"]]  # fmt: skip
    run = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    counts = {word: int(count) for count, word in re.findall(r"(\d+) (passed|failed|skipped|error)", run.stdout)}
    assert run.returncode == 0 and counts["passed"] > 120, run.stdout[-4000:] + run.stderr[-2000:]
