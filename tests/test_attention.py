"""Attention's accuracy on every backend that does not refuse: features, shapes, strides, CPU builds, all dtypes."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from accuracy import assert_as_accurate_as_eager
from attention_cases import DTYPES, FEATURES, KERNEL_BACKENDS, Case, check, dtype_id, run
from devices import device_for
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fastattn

pytestmark = pytest.mark.usefixtures("tensors_where_the_backend_runs")
each_backend = pytest.mark.parametrize("backend", KERNEL_BACKENDS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)


@each_backend
@each_dtype
@pytest.mark.parametrize("feature", FEATURES)
def test_feature_matches_eager(feature, dtype, backend):
    check(FEATURES[feature], dtype, backend)


# Steps of kernels' tiles (32, 64, 128, 256), one less and one more; one row; nothing at all.
SEQLENS = [(0, 5), (5, 0), (0, 0), (1, 1), (1, 65), (63, 1), (64, 64), (65, 63), (128, 127),
           (97, 257), (1, 1025), (1025, 33), (300, 300)]  # fmt: skip


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("seqlens", SEQLENS, ids=lambda seqlens: "x".join(map(str, seqlens)))
def test_seqlens(seqlens, causal, dtype, backend):
    options = {"is_causal": causal, "alignment": "bottom_right"}
    check(Case(heads=2, seqlen_q=seqlens[0], seqlen_k=seqlens[1], head_dim=32, options=options), dtype, backend)


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=dtype_id)
@pytest.mark.parametrize("dims", [(1, 1), (7, 7), (8, 3), (33, 64), (64, 64), (80, 80), (128, 128), (192, 128),
                                  (256, 255)], ids=lambda dims: "x".join(map(str, dims)))  # fmt: skip
def test_head_dims(dims, dtype, backend):
    check(Case(heads=2, seqlen_q=33, seqlen_k=70, head_dim=dims[0], head_dim_v=dims[1]), dtype, backend)


@each_backend
@pytest.mark.parametrize(("batch", "heads"), [(0, 2), (2, 0), (1, 1), (3, 5)])
def test_batches_and_heads(batch, heads, backend):
    check(Case(batch=batch, heads=heads, seqlen_q=20, seqlen_k=30), torch.float32, backend)


@each_dtype
@pytest.mark.parametrize("feature", ["plain", "causal_bottom_right", "bool_mask", "gqa_dropout_mask", "everything"])
def test_every_cpu_build(feature, dtype, cpu_isa):
    check(FEATURES[feature], dtype, "cpu")


@pytest.mark.parametrize("head_dim", [1, 40, 64, 100, 256])
def test_every_cpu_build_at_head_dim(head_dim, cpu_isa):
    check(Case(heads=2, seqlen_q=70, seqlen_k=97, head_dim=head_dim), torch.float32, "cpu")
    check(Case(heads=2, seqlen_q=70, seqlen_k=97, head_dim=head_dim), torch.bfloat16, "cpu")


# --- Strides ---------------------------------------------------------------------------------------------------------


def _transposed(x):
    """(batch, seqlen, heads, head_dim) memory, as projections leave it."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _slice_of_packed(x):
    """One third of a packed (batch, seqlen, 3, heads, head_dim) projection."""
    packed = torch.full((x.shape[0], x.shape[2], 3, x.shape[1], x.shape[3]), float("nan"), dtype=x.dtype)
    packed[:, :, 1] = x.transpose(1, 2)
    return packed[:, :, 1].transpose(1, 2)


def _offset(x):
    """Starts one element into its memory, so that no row is aligned."""
    return torch.full((x.numel() + 1,), float("nan"), dtype=x.dtype)[1:].view(x.shape).copy_(x)


def _every_other(x):
    """Rows whose elements are not neighbours."""
    return torch.stack((x, torch.full_like(x, float("nan"))), dim=-1).flatten(-2)[..., ::2]


def _columns(x):
    return x.mT.contiguous().mT


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize("view", [_transposed, _slice_of_packed, _offset, _every_other, _columns])
def test_strides(view, dtype, backend):
    case = dataclasses.replace(FEATURES["float_mask"], heads_kv=2)
    inputs = case.inputs(dtype)
    views = {name: view(tensor) for name, tensor in inputs.items()}
    assert all(torch.equal(views[name], inputs[name]) for name in inputs)
    check(case, dtype, backend, views)


@each_backend
def test_strided_output_gradients(backend):
    """Gradients of out arrive transposed, expanded, or not at all."""
    q, k, v = (torch.randn(2, 3, 20, 8, requires_grad=True) for _ in range(3))

    def gradients(backend, reduce):
        out, lse = fastattn.attention(q, k, v, return_lse=True, backend=backend)
        return torch.autograd.grad(reduce(out, lse), (q, k, v), allow_unused=True, materialize_grads=True)

    weight = torch.randn(2, 20, 8, 3).permute(0, 3, 1, 2)
    for reduce in (lambda out, lse: out.sum(), lambda out, lse: (out * weight).sum(), lambda out, lse: lse.sum()):
        torch.testing.assert_close(gradients(backend, reduce), gradients("eager", reduce))


# --- Anything --------------------------------------------------------------------------------------------------------


@st.composite
def cases(draw) -> tuple[Case, list[int]]:
    heads_kv = draw(st.integers(1, 3))
    options = {
        "is_causal": draw(st.booleans()),
        "alignment": draw(st.sampled_from(["top_left", "bottom_right"])),
        "window": draw(st.none() | st.tuples(st.integers(-1, 40), st.integers(-1, 40))),
        "softcap": draw(st.sampled_from([0.0, 3.0])),
        "dropout_p": draw(st.sampled_from([0.0, 0.0, 0.4])),
    }
    tensors = {}
    if draw(st.booleans()):
        shape = [draw(st.sampled_from([name, "1"])) for name in ("batch", "heads", "seqlen_q", "seqlen_k")]
        shape, boolean = shape[draw(st.integers(0, 3)) :], draw(st.booleans())
        tensors["attn_mask"] = lambda case: _mask(
            [1 if name == "1" else getattr(case, name) for name in shape], boolean
        )
    if draw(st.booleans()):
        tensors["sinks"] = lambda case: torch.randn(case.heads)
    if draw(st.booleans()):
        tensors["alibi_slopes"] = lambda case: torch.rand(case.heads)
    case = Case(
        batch=draw(st.integers(1, 3)), heads=heads_kv * draw(st.integers(1, 3)), heads_kv=heads_kv,
        seqlen_q=draw(st.integers(0, 90)), seqlen_k=draw(st.integers(0, 150)), head_dim=draw(st.integers(1, 70)),
        head_dim_v=draw(st.integers(1, 70)), options=options, tensors=tensors,
    )  # fmt: skip
    return case, draw(st.permutations([0, 1, 2]))


def _mask(shape, boolean):
    return torch.rand(shape) < 0.5 if boolean else torch.randn(shape)


@each_backend
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(drawn=cases(), dtype=st.sampled_from(DTYPES))
def test_any_shape_strides_and_options(backend, drawn, dtype):
    case, order = drawn
    inputs = case.inputs(dtype)
    back = [order.index(dim) for dim in range(3)]
    for name in ("query", "key", "value"):
        inputs[name] = inputs[name].permute(*order, 3).contiguous().permute(*back, 3)
    check(case, dtype, backend, inputs)


# --- Determinism -----------------------------------------------------------------------------------------------------


@each_backend
@each_dtype
def test_results_are_bitwise_the_same_at_every_run_and_thread_count(dtype, backend):
    case = dataclasses.replace(FEATURES["everything"], seqlen_q=150, seqlen_k=200)
    inputs, threads = case.inputs(dtype), torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, threads):
            torch.set_num_threads(count)
            results.append(run(case, inputs, backend))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(results[0][name], other[name]) for name in other)


# --- Magnitudes ------------------------------------------------------------------------------------------------------


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=dtype_id)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_scores_of_ten_thousand(causal, dtype, backend):
    """exp overflows at 89 in float32: only differences to the largest score may reach it."""
    case = Case(heads=2, seqlen_q=40, seqlen_k=70, head_dim=16, options={"scale": 1000.0, "is_causal": causal})
    inputs = {name: tensor.detach() for name, tensor in case.inputs(torch.float32).items()}
    # Small integers, so that 16-bit inputs hold them and every score is exact in float32.
    inputs = {name: (2 * tensor).round().clamp(-4, 4).to(dtype) for name, tensor in inputs.items()}
    actual = run(case, inputs, backend)
    eager, reference = (run(case, inputs, "eager", wide, device=device_for(backend)) for wide in (False, True))
    assert reference["lse"].abs().max() > 1e4
    for name in ("out", "lse"):
        assert_as_accurate_as_eager(actual[name], eager[name], reference[name], name)
    assert all(gradient.isfinite().all() for gradient in actual.values())


@each_backend
def test_float16_scores_beyond_its_range(backend):
    """q.k reaches 2.5e5, past float16's 65504: the scores must not pass through it."""
    case = Case(heads=1, seqlen_q=33, seqlen_k=65, head_dim=64, options={"scale": 1e-4})
    inputs = {name: tensor * (64 if name != "value" else 1) for name, tensor in case.inputs(torch.float16).items()}
    check(case, torch.float16, backend, inputs)


@each_backend
@each_dtype
def test_masks_of_the_lowest_finite_number(dtype, backend):
    """The other way to write -inf: hides a key, and a row that has nothing else attends to all keys equally."""
    mask = torch.zeros(30, 40)
    mask[:, 20:] = mask[7] = torch.finfo(torch.float32).min
    case = Case(heads=2, seqlen_q=30, seqlen_k=40, head_dim=16, tensors={"attn_mask": lambda case: mask})
    inputs = case.inputs(dtype)
    on_device = {name: tensor.to(device_for(backend)) for name, tensor in inputs.items()}
    out, lse = (t.cpu() for t in fastattn.attention(**on_device, return_lse=True, backend=backend))
    eager, reference = (run(case, inputs, "eager", wide, device=device_for(backend)) for wide in (False, True))
    assert_as_accurate_as_eager(out, eager["out"], reference["out"], "out")
    torch.testing.assert_close(out[:, :, 7], inputs["value"].cpu().double().mean(dim=2).to(dtype))
    assert lse.isfinite().all() and all(result.isfinite().all() for result in run(case, inputs, backend).values())
