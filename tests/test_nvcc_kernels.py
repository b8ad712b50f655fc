"""What nvcc makes of the kernels, run on the emulator: every family of kernels, under a harsh schedule.

``FASTATTN_TEST_NVCC=1`` in front of pytest runs any tests of backend "emulated" this way (tests/conftest.py).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import test_ptx
import torch
from attention_cases import FEATURES, Case, check
from compiled import NvccKernels, nvcc_kernels, nvcc_test_kernels, ptx_of, why_no_nvcc_kernels
from emulated import MODES, PTX_TESTS, KernelError, emulated_library
from layer_norm_cases import check as check_norm
from layer_norm_cases import make_inputs
from ptx_to_cpp import UnknownPtx, entry_names, translate

import fastattn

WHY_NOT = fastattn.available_backends()["emulated"] or why_no_nvcc_kernels()
pytestmark = [pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT)),
              pytest.mark.usefixtures("plain_mode_afterwards")]  # fmt: skip
HARSH = MODES[1]


@contextmanager
def run_as_compiled(capability: int, *units: str, kernels: str) -> Iterator[None]:
    """Runs these sources' kernels as nvcc compiled them; one whose name holds ``kernels`` must be among those run."""
    HARSH.apply(compute_capability=capability, multiprocessors=2)
    nvcc = nvcc_kernels(*units)
    nvcc.launched.clear()
    with nvcc:
        yield
    assert any(kernels in name for name in nvcc.launched), nvcc.launched


def resized(feature: str, **changes: object) -> Case:
    return dataclasses.replace(FEATURES[feature], batch=1, heads=2, heads_kv=None, head_dim_v=None, **changes)


ATTENTION = ("attention_fwd_cuda", "attention_bwd_cuda")


@pytest.mark.parametrize("feature", ["causal", "everything"])
def test_attention(feature):
    with run_as_compiled(80, *ATTENTION, "attention_*_cuda_bf16_64", kernels="attention_bwd_dkv"):
        check(resized(feature, head_dim=64), torch.bfloat16, "emulated")


@pytest.mark.parametrize("feature, head_dim", [("float_mask", 64), ("causal", 256)])
def test_attention_on_hopper(feature, head_dim):
    with run_as_compiled(90, *ATTENTION, f"attention_*_cuda_sm90_bf16_{head_dim}", kernels="attention_bwd"):
        check(resized(feature, seqlen_q=150, seqlen_k=140, head_dim=head_dim), torch.bfloat16, "emulated")


@pytest.mark.parametrize("capability, seqlen_q", [(80, 1), (90, 70)])
def test_cached_keys(capability, seqlen_q):
    q, k, v = torch.randn(2, seqlen_q, 4, 64), *torch.randn(2, 2, seqlen_q, 2, 64)
    operands = [each.bfloat16() for each in (q, *torch.randn(2, 2, 200, 2, 64), k, v)]
    lengths = torch.tensor([100, 37], dtype=torch.int32)
    prompt = "attention_fwd_cuda_sm90_bf16_64" if capability == 90 else "attention_fwd_cuda_bf16_64"
    results = []
    with run_as_compiled(capability, "attention_fwd_cached_cuda_bf16", "attention_fwd_cuda", prompt, "kv_append_cuda",
                         kernels="kv_append"):  # fmt: skip
        for backend in ("emulated", "eager"):
            copies = [each.clone() for each in operands]
            out = fastattn.attention_with_kv_cache(*copies, cache_seqlens=lengths.clone(), backend=backend)
            results.append((out, *copies[1:3]))
    for actual, eager in zip(*results, strict=True):
        torch.testing.assert_close(actual, eager, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    "op, size, capability, kernel",
    [("layer_norm", 97, 80, "layer_norm_bwd"), ("add_rms_norm", 4099, 80, "layer_norm_bwd"),
     ("layer_norm", 66_000, 90, "cluster")],
)  # fmt: skip
def test_norms(op, size, capability, kernel):
    options = {"dropout_p": 0.2} if op == "add_rms_norm" else {}
    with run_as_compiled(capability, "layer_norm_*cuda*", kernels=kernel):
        check_norm(op, make_inputs(op, (3, size), torch.bfloat16), "emulated", **options)


@pytest.mark.parametrize("capability, rows", [(80, 1), (80, 150), (90, 150)])
def test_int8_linear(rows, capability):
    input, module = torch.randn(rows, 160).bfloat16(), fastattn.Int8Linear.from_linear(torch.nn.Linear(160, 200))
    operands = (input, module.weight, module.weight_scale, module.bias.bfloat16())
    expected = fastattn.int8_linear(*operands, activation="gelu", backend="eager")
    units = ("int8_matmul_cuda", "int8_matmul_cuda_bf16", "int8_matmul_cuda_sm90", "quantize_int8_cuda")
    with run_as_compiled(capability, *units, kernels="int8_"):
        actual = fastattn.int8_linear(*operands, activation="gelu", backend="emulated")
    torch.testing.assert_close(actual, expected, rtol=1.6e-2, atol=1e-2)


# --- Tests of the wrappers reach their text --------------------------------------------------------------------------

# What an asm statement might have wrong, as an edit of the PTX, and the test that notices.
WRONG = {
    "ldmatrix without trans": (
        "ptx_sm80", r"(ldmatrix\S*)\.trans", r"\1", lambda library: test_ptx.test_ldmatrix(library, 4, True)),
    "mma with the registers of B exchanged": (
        "ptx_sm80", r"(mma\S*\.f32\.bf16.*, )\{(%r\d+), (%r\d+)\}(, \{%f)", r"\1{\3, \2}\4",
        lambda library: test_ptx.test_mma_m16n8k16(library, torch.bfloat16)),
    "cp.async that ignores how much is valid": (
        "ptx_sm80", r"(cp\.async\.cg\S* .*), 16, %r\d+", r"\1, 16",
        lambda library: test_ptx.test_cp_async(library, 16)),
    "a shuffle over half of a segment": (
        "ptx_sm80", r"6175", "7199", lambda library: test_ptx.test_shuffles(library)),
    "wgmma that takes B as K-major": (
        "ptx_sm90", r"(wgmma\S*bf16.* p, 1, 1, .*)1;", r"\g<1>0;",
        lambda library: test_ptx.test_wgmma_m64k16(library, 64, torch.bfloat16, ("k", True), 128)),
    "a tile's coordinates exchanged": (
        "ptx_sm90", r"(tensor\.2d\.shared.*\{)(%r\d+), (%r\d+)\}", r"\1\3, \2}",
        lambda library: test_ptx.test_tma(library, "2d-128B", False)),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_instruction_is_noticed(name):
    source, pattern, replacement, test = WRONG[name]
    edits = []

    def edit(text: str) -> str:
        edited, count = re.subn(pattern, replacement, text)
        edits.append(count)
        return edited

    library = emulated_library()
    library.configure(MODES[0])
    with NvccKernels(library.path, [PTX_TESTS / f"{source}.cu"], edit=edit):
        with pytest.raises((AssertionError, KernelError)) as noticed:
            test(library)
        assert "UnknownPtx" not in str(noticed.value)
    assert edits and all(edits), "nothing was edited"
    with nvcc_test_kernels():
        test(library)


# --- Nothing is left out ---------------------------------------------------------------------------------------------


def test_an_unknown_instruction_is_refused():
    text = ptx_of(PTX_TESTS / "ptx_sm80.cu").read_text()
    name = entry_names(text)[0]
    translate(text, {name: "kernel"})
    with pytest.raises(UnknownPtx, match=r"line \d+: shfl\.sync\.sideways\.b32"):
        translate(text.replace("shfl.sync.up.b32", "shfl.sync.sideways.b32"), {name: "kernel"})


def test_kernels_of_other_sources_are_refused():
    library, x = emulated_library(), torch.randn(12, 1000)
    with (
        nvcc_test_kernels(),
        pytest.raises(KernelError, match=r"LookupError: .*layer_norm_kernel.* in none of the sources"),
    ):
        library.call("bugs_layer_norm", x, torch.empty_like(x), 12, 1000, 0)
