"""Attention's Triton kernels under autograd, torch.compile and opcheck, and given what they cannot run."""

from __future__ import annotations

import dataclasses
import types

import pytest
import torch
from attention_cases import run, small_case
from attention_opcheck import arguments_of, opcheck
from attention_triton_cases import HEAD_DIMS, launches
from torch._dynamo.testing import CompileCounter

import fastattn
from fastattn import _triton
from fastattn.ops import attention_triton as face

pytestmark = pytest.mark.skipif(
    fastattn.available_backends()["triton"] is not None, reason=f"no triton: {fastattn.available_backends()['triton']}"
)
DEVICE = "cpu" if _triton.is_interpreted() else "cuda"


@pytest.fixture(autouse=True)
def on_the_device():
    with torch.device(DEVICE):
        yield


# --- Gradients that are absent, odd or refused -----------------------------------------------------------------------


def test_only_what_requires_grad_gets_one():
    query, key, value = (torch.randn(1, 2, 9, 8) for _ in range(3))
    mask = torch.randn(9, 9)
    assert not fastattn.attention(query, key, value, mask, backend="triton").requires_grad
    value.requires_grad_()
    fastattn.attention(query, key, value, mask, backend="triton").sum().backward()
    assert value.grad is not None and query.grad is None and key.grad is None and mask.grad is None


def test_lse_alone_can_be_differentiated():
    query, key, value = (torch.randn(1, 2, 9, 8, requires_grad=True) for _ in range(3))
    _, lse = fastattn.attention(query, key, value, return_lse=True, backend="triton")
    expected = torch.logsumexp(query @ key.mT * 8**-0.5, -1)
    dlse = torch.randn_like(lse)
    for a, b in zip(*(torch.autograd.grad(x, (query, key), dlse) for x in (lse, expected)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("precision", ["tf32", "ieee"])
def test_tensor_float_32_is_what_the_newer_attribute_says(precision):
    """Where only this one was set, the older torch.get_float32_matmul_precision() raises."""
    from fastattn.ops.attention_triton_plan import allows_tf32

    products = torch.backends.cuda.matmul
    before, products.fp32_precision = products.fp32_precision, precision
    try:
        assert allows_tf32(types.SimpleNamespace(dtype=torch.float32, is_cuda=True)) == (precision == "tf32")
        assert not allows_tf32(types.SimpleNamespace(dtype=torch.float16, is_cuda=True))
    finally:
        products.fp32_precision = before


def test_second_derivatives_raise():
    query = torch.randn(1, 2, 9, 8, requires_grad=True)
    out = fastattn.attention(query, query, query, backend="triton")
    (gradient,) = torch.autograd.grad(out.square().sum(), query, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"^attention: .* Use backend='eager'"):
        gradient.sum().backward()


REFUSED = [
    ({"dtype": torch.float64}, "dtype float64 is not float32, bfloat16 or float16"),
    ({"head_dim": 257}, r"head_dim 257 \(value: 257\) is not in 1 to 256"),
    ({"alibi_slopes": torch.ones(2, requires_grad=True)}, "alibi_slopes requires grad"),
    ({"device": "meta"}, "query is on meta, not on a GPU"),
]


@pytest.mark.parametrize(("change", "reason"), REFUSED, ids=[reason[:20] for _, reason in REFUSED])
def test_refuses_with_its_reason(change, reason):
    q = torch.zeros(1, 2, 3, change.get("head_dim", 8), dtype=change.get("dtype"), device=change.get("device"))
    options = {"alibi_slopes": change["alibi_slopes"]} if "alibi_slopes" in change else {}
    with pytest.raises(NotImplementedError, match=f"backend 'triton' cannot run this: {reason}"):
        fastattn.attention(q, q, q, **options, backend="triton")


def test_refuses_function_transforms():
    q = torch.randn(2, 1, 2, 5, 8)
    with pytest.raises(NotImplementedError, match=r"torch\.func"):
        torch.func.vmap(lambda q: fastattn.attention(q, q, q, backend="triton"))(q)


@pytest.mark.skipif(not _triton.is_interpreted(), reason="Triton is not interpreted")
def test_auto_leaves_interpreted_kernels_alone():
    q = torch.randn(1, 2, 5, 8)
    assert "triton    would run, but only when asked for by name" in fastattn.explain(fastattn.attention, q, q, q)


# --- Compiled code ---------------------------------------------------------------------------------------------------


@pytest.fixture
def forget_compiled_code():
    torch._dynamo.reset()


@pytest.mark.parametrize("feature", ["plain", "bool_mask", "everything"])
def test_opcheck(feature):
    arguments = arguments_of(small_case(feature, seqlen_q=7, seqlen_k=6, head_dim=4))
    opcheck("attention_triton", arguments, averages=[feature == "plain"])


@pytest.mark.parametrize("feature", ["causal_bottom_right_empty_rows", "float_mask_per_head", "gqa", "everything"])
def test_compiles_to_one_graph(feature, forget_compiled_code):
    case = small_case(feature, seqlen_q=9, seqlen_k=6, head_dim=4)
    options = {name: value for name, value in case.options.items() if name != "dropout_p"}
    case = dataclasses.replace(case, options=options)
    inputs = case.inputs(torch.float32)
    leaves = {n: t.detach().requires_grad_(t.is_floating_point() and n != "alibi_slopes") for n, t in inputs.items()}

    def step(**leaves):
        return fastattn.attention(**leaves, enable_gqa=True, return_lse=True, backend="triton", **options)

    out, lse = torch.compile(step, fullgraph=True, backend="aot_eager")(**leaves)
    expected = run(case, inputs, "triton")
    assert torch.equal(out, expected["out"]) and torch.equal(lse, expected["lse"])
    torch.manual_seed(3)
    cotangents = torch.randn(out.shape), torch.randn(lse.shape)
    learned = [name for name, leaf in leaves.items() if leaf.requires_grad]
    gradients = torch.autograd.grad((out, lse), [leaves[name] for name in learned], cotangents)
    assert all(torch.equal(g, expected[f"d{name}"]) for name, g in zip(learned, gradients, strict=True))


def test_one_graph_serves_every_length(forget_compiled_code):
    counter = CompileCounter()

    def attend(q, k):
        return fastattn.attention(q, k, k, is_causal=True, alignment="bottom_right", backend="triton")

    step = torch.compile(attend, fullgraph=True, dynamic=True, backend=counter)
    for seqlen_q, seqlen_k in ((5, 9), (17, 33), (40, 20)):
        q, k = torch.randn(2, 3, seqlen_q, 8), torch.randn(2, 3, seqlen_k, 8)
        assert torch.equal(step(q, k), attend(q, k))
    assert counter.frame_count == 1


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0)], ids=str)
def test_offsets_inside_a_tile_fit_32_bits(capability):
    """Rows may lie MAX_STRIDE elements apart; what a GPU computes beyond 2^31 wraps to an address of no tensor."""
    for head_dim in HEAD_DIMS:
        for launch in launches(capability, torch.float16, head_dim, "float_mask"):
            for block in ("BLOCK_Q", "BLOCK_K"):
                rows = launch.arguments.get(block, 1)
                assert (rows - 1) * (face.MAX_STRIDE - 1) + head_dim < 2**31, (launch.kernel.__name__, head_dim, rows)


# --- What is made of attention ---------------------------------------------------------------------------------------


def test_packed_sequences_and_caches_run_on_triton():
    cu_seqlens = torch.tensor([0, 9, 9, 40], dtype=torch.int32)
    q, k, v = (torch.randn(40, 2, 8) for _ in range(3))

    def packed(backend):
        return fastattn.varlen_attention(q, k, v, cu_seqlens, cu_seqlens, 31, 31, is_causal=True, backend=backend)

    torch.testing.assert_close(packed("triton"), packed("eager"))
    cache = torch.randn(2, 40, 2, 8)
    lengths = torch.tensor([40, 13], dtype=torch.int32)

    def step(backend):
        query = q[:2].view(2, 1, 2, 8)
        return fastattn.attention_with_kv_cache(query, cache, cache, cache_seqlens=lengths, backend=backend)

    torch.testing.assert_close(step("triton"), step("eager"))
