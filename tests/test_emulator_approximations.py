"""Where ex2, lg2, rcp and tanh err by up to what the PTX manual allows, every result keeps its rule: a kernel that
needs them as exact as the emulator has them otherwise would miss it on a device."""

from __future__ import annotations

import pytest
import torch
from accuracy import assert_as_accurate_as_eager
from attention_cases import FEATURES, check
from emulated import MODES, Mode, emulated_library, host_compiler
from test_varlen_attention import LENGTHS_K, LENGTHS_Q, OPTIONS, inputs
from test_varlen_attention import check as check_packed

import fastattn

needs_kernels = pytest.mark.skipif(
    fastattn.available_backends()["emulated"] is not None, reason=str(fastattn.available_backends()["emulated"])
)
pytestmark = pytest.mark.usefixtures("plain_mode_afterwards")
ROUGH = [Mode(seed=seed, rough_approximations=True) for seed in (1, 2)]
# Absolute errors of results y, of operands x.
BOUNDS = {
    "ex2": lambda x, y: 2.0**-22 * y,
    "lg2": lambda x, y: 2.0**-22 * torch.where((x > 0.5) & (x < 2), 1, y.abs()),
    "rcp": lambda x, y: 2.0**-23 * y.abs(),
    "tanh": lambda x, y: 2.0**-11 * y.abs(),
}


def mathematics(mode: Mode, operands: torch.Tensor) -> torch.Tensor:
    library = emulated_library()
    library.configure(mode)
    out = torch.empty(6, operands.numel())
    library.call("ptx_math", operands, out, operands.numel())
    library.configure(MODES[0])
    return out[:4]


@pytest.mark.skipif(host_compiler() is None, reason="no C++ compiler on PATH")
def test_instructions_err_up_to_the_bounds():
    """By another amount for each operand and seed, and always the same for one."""
    x = torch.rand(4096) * 20 + 0.01
    wide = x.double()
    exact = torch.stack([wide.exp2(), wide.log2(), wide.reciprocal(), wide.tanh()])
    bound = torch.stack([rule(wide, y) for rule, y in zip(BOUNDS.values(), exact, strict=True)])
    two_ulps = exact.abs() * 2.0**-22  # the C library's tanh needs more than one
    assert ((mathematics(Mode(), x).double() - exact).abs() <= two_ulps).all()
    first, again, second = (mathematics(mode, x) for mode in (ROUGH[0], ROUGH[0], ROUGH[1]))
    assert torch.equal(first, again)
    for results in (first, second):
        errors = results.double() - exact
        assert (errors.abs() <= bound + two_ulps).all()
        assert ((errors.abs() > 0.9 * bound).float().mean(1) > 0.02).all()
        assert ((errors > 0).float().mean(1) - 0.5).abs().max() < 0.2
    assert ((first != second).float().mean(1) > 0.5).all()


@pytest.mark.skipif(host_compiler() is None, reason="no C++ compiler on PATH")
def test_listed_results_are_exact():
    x = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan")])
    torch.testing.assert_close(mathematics(ROUGH[0], x), mathematics(Mode(), x), rtol=0, atol=0, equal_nan=True)


@needs_kernels
@pytest.mark.parametrize("card, multiprocessors", [(80, 1), (80, 32), (90, 1)], ids=["80", "80-split", "90"])
@pytest.mark.parametrize("feature", FEATURES)
def test_attention(feature, card, multiprocessors):
    """Also its parts of the keys, and every gradient."""
    turn = list(FEATURES).index(feature)
    ROUGH[turn % 2].apply(compute_capability=card, multiprocessors=multiprocessors)
    check(FEATURES[feature], (torch.float16, torch.bfloat16)[turn // 2 % 2], "emulated")


@needs_kernels
@pytest.mark.parametrize("options", OPTIONS)
def test_packed_sequences_on_hopper(options):
    turn = list(OPTIONS).index(options)
    ROUGH[turn % 2].apply(compute_capability=90, multiprocessors=1)
    operands = inputs((torch.float16, torch.bfloat16)[turn // 2 % 2])
    check_packed(operands, LENGTHS_Q, LENGTHS_K, "emulated", **OPTIONS[options])


@needs_kernels
@pytest.mark.parametrize("card", [80, 90])
@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu"])
def test_int8_epilogues(activation, card):
    ROUGH[0].apply(compute_capability=card)
    a, b = (torch.randint(-127, 128, (rows, 96), dtype=torch.int8) for rows in (70, 40))
    scales = torch.rand(70) * 1e-3, torch.rand(40) * 1e-1
    results = [
        fastattn.int8_matmul(a, b, *scales, activation=activation, backend=backend) for backend in ("emulated", "eager")
    ]
    x = (a.double() @ b.double().T) * scales[0].double()[:, None] * scales[1].double()
    reference = {
        "relu": torch.relu, "silu": torch.nn.functional.silu, "gelu": torch.nn.functional.gelu,
        "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    }[activation](x)  # fmt: skip
    assert_as_accurate_as_eager(*results, reference, activation)
