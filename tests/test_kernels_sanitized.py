"""The attention and layer norm kernels by their C face (tests/kernels), for ``make sanitize``: every kernel file in a
small case or two, under one harsh schedule. Without a sanitizer the tests of the ops run far more of them."""

from __future__ import annotations

import ctypes
import os

import pytest
import torch
import torch.nn.functional as F
from emulated import MODES, EmulatedLibrary, emulated_kernels

pytestmark = pytest.mark.skipif(
    os.environ.get("FASTATTN_TEST_SANITIZER") is None, reason="run by make sanitize; the ops' tests cover the rest"
)
INT32 = torch.iinfo(torch.int32)
DTYPES = {torch.float32: 0, torch.float16: 2}
SCHEDULE = MODES[1]

# The files with the instances of the cases below; tests/kernels/attention.cu stands in for the others.
ATTENTION_UNITS = (
    "attention_fwd_cuda",
    "attention_bwd_cuda",
    "attention_weights_cuda",
    "attention_???_cuda_fp16_64",
    "attention_???_cuda_fp16_128",
    "attention_???_cuda_sm90_fp16_96",
)


class AttentionCall(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_int)
        for name in ("dtype", "batch", "heads", "heads_kv", "seqlen_q", "seqlen_k", "head_dim", "causal",
                     "compute_capability", "multiprocessors", "deterministic", "total_q", "total_k", "bottom_right")
    ) + tuple((name, ctypes.c_float) for name in ("scale", "softcap", "dropout_p"))  # fmt: skip


TENSORS = ("q", "k", "v", "out", "weights", "dout", "dq", "dk", "dv", "mask", "sinks", "lse", "dmask", "dsinks",
           "rng_state", "cu_seqlens_q", "cu_seqlens_k", "workspace")  # fmt: skip


class AttentionTensors(ctypes.Structure):
    _fields_ = (*((name, ctypes.c_void_p) for name in TENSORS), ("workspace_bytes", ctypes.c_int64))


class LayerNormCall(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_int)
        for name in ("dtype", "rows", "cols", "rms", "compute_capability", "multiprocessors")
    )  # fmt: skip


def attention_reference(tensors: dict, call: AttentionCall):
    """out and weights in float32, by the definition; q, k, v, mask and sinks may require gradients."""
    group = call.heads // call.heads_kv
    k, v = (tensors[name].repeat_interleave(group, 1) for name in ("k", "v"))
    scores = call.scale * tensors["q"] @ k.mT
    if call.softcap > 0:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    if tensors.get("mask") is not None:
        scores = scores + tensors["mask"]
    if call.causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -float("inf"))
    sinks = tensors.get("sinks")
    if sinks is not None:
        scores = torch.cat([scores, sinks[:, None, None].expand(*scores.shape[:-1], 1)], -1)
    weights = scores.softmax(-1)[..., : k.shape[2]]
    return weights @ v, weights


CASES = {
    "causal": {"heads_kv": 1, "causal": 1},
    "causal_128": {"heads": 1, "head_dim": 128, "causal": 1},
    # With so many multiprocessors the keys of a row have several blocks.
    "packed_split": {"heads": 4, "seqlen_q": 5, "seqlen_k": 300, "multiprocessors": 16},
    # Four heads share the mask, so its tiles are looked at first, and dmask has several blocks a place.
    "masked": {"heads": 4, "seqlen_q": 40, "head_dim": 40, "mask": True, "sinks": True, "softcap": 3.0},
    "dropout_128": {"heads": 1, "seqlen_q": 20, "seqlen_k": 40, "head_dim": 128, "dropout_p": 0.25},
    # One block takes both heads; two blocks of keys take turns to add to dq.
    "hopper": {"compute_capability": 90, "seqlen_k": 140, "head_dim": 96, "deterministic": 1},
    "hopper_masked": {"compute_capability": 90, "heads_kv": 1, "head_dim": 80, "mask": True},
}
DEFAULTS = {"heads": 2, "heads_kv": 2, "seqlen_q": 70, "seqlen_k": 75, "head_dim": 64, "compute_capability": 80,
            "multiprocessors": 1}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_attention(name):
    shape = DEFAULTS | CASES[name]
    shape["heads_kv"] = min(shape["heads_kv"], shape["heads"])
    has_mask, has_sinks = shape.pop("mask", False), shape.pop("sinks", False)
    call = AttentionCall(dtype=DTYPES[torch.float16], batch=1, scale=shape["head_dim"] ** -0.5, **shape)
    q_shape = (1, call.heads, call.seqlen_q, call.head_dim)
    k_shape = (1, call.heads_kv, call.seqlen_k, call.head_dim)
    tensors = {name: torch.randn(s).half() for name, s in
               {"q": q_shape, "k": k_shape, "v": k_shape, "dout": q_shape}.items()}  # fmt: skip
    weights_shape = (1, call.heads, call.seqlen_q, call.seqlen_k)
    if has_mask:
        mask = torch.randn(weights_shape[2:])
        mask[:, 64:] = -float("inf")  # a tile that hides all
        tensors |= {"mask": mask, "dmask": torch.empty_like(mask)}
    if has_sinks:
        tensors |= {"sinks": torch.randn(call.heads), "dsinks": torch.empty(call.heads)}
    tensors |= {f"d{name}": torch.empty_like(tensors[name]) for name in "qkv"}
    tensors |= {
        "out": torch.empty_like(tensors["q"]), "weights": torch.empty(weights_shape, dtype=torch.float16),
        "lse": torch.empty(q_shape[:-1]), "rng_state": torch.tensor([7, 0]),
        "workspace": torch.empty(4 << 20, dtype=torch.uint8),
    }  # fmt: skip
    library = emulated_kernels("attention", ATTENTION_UNITS)
    library.configure(SCHEDULE)
    arguments = AttentionTensors(workspace_bytes=4 << 20, **{name: t.data_ptr() for name, t in tensors.items()})
    for function, more in (("attention_forward", ()), ("attention_weights_of", (0,)), ("attention_backward", ())):
        _call(library, tensors.values(), function, call, arguments, *more)

    leaves = {name: tensors[name].float().requires_grad_() for name in ("q", "k", "v", "mask", "sinks")
              if name in tensors}  # fmt: skip
    out, weights = attention_reference(leaves, call)
    if call.dropout_p > 0:  # which elements stay is the ops' tests' affair
        assert tensors["out"].isfinite().all() and tensors["dq"].isfinite().all()
        return
    close = {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(tensors["out"].float(), out, **close)
    if not has_sinks:
        torch.testing.assert_close(tensors["weights"].float(), weights, **close)
    gradients = torch.autograd.grad(out, list(leaves.values()), tensors["dout"].float())
    for leaf, gradient in zip(leaves, gradients, strict=True):
        torch.testing.assert_close(tensors[f"d{leaf}"].float(), gradient, rtol=2e-2, atol=5e-2)


# (cu_seqlens, longest) of 40 rows: nobody has looked at them, as on a device.
LENGTHS = {
    "right": ([0, 9, 9, 40], 31),
    "falls": ([0, 40, 5, 33], 40),
    "negative": ([-7, -3, 20, 40], 40),
    "past_the_end": ([0, 9, 41, 90], 40),
    "extremes": ([INT32.min, INT32.max, INT32.min, INT32.max], 40),
    "longer_than_told": ([0, 30, 31, 40], 4),
    "longest_past_the_end": ([0, 20, 30, 40], 200),
    "nothing_first": ([3, 9, 9, 17], 9),
}
# What rows of two sequences become is a race that such lengths ask for, and all that ThreadSanitizer would say of them.
OVERLAPPING = ("falls", "extremes")


@pytest.mark.parametrize("card, head_dim", [(80, 64), (80, 96), (80, 128), (90, 96)])
@pytest.mark.parametrize("name", LENGTHS)
def test_lengths_of_packed_sequences_stay_inside(name, card, head_dim):
    """Tensors and workspace are no larger than they have to be; where sequences overlap, only that counts."""
    if name in OVERLAPPING and os.environ["FASTATTN_TEST_SANITIZER"] == "thread":
        pytest.skip("two sequences write the same rows")
    cu, longest = LENGTHS[name]
    total, batch, heads = 40, len(cu) - 1, 2
    # Queries may be packed rightly where keys are not, and the other way round; a block's queries may be shared.
    for wrong_q, wrong_k, multiprocessors in ((True, True, 1), (True, False, 1), (False, True, 16)):
        lengths = {side: (cu, longest) if wrong else ([0, 13, 20, 40], 20) for side, wrong in
                   (("q", wrong_q), ("k", wrong_k))}  # fmt: skip
        call = AttentionCall(dtype=DTYPES[torch.float16], batch=batch, heads=heads, heads_kv=1, head_dim=head_dim,
                             seqlen_q=lengths["q"][1], seqlen_k=lengths["k"][1], total_q=total, total_k=total,
                             causal=wrong_q, bottom_right=wrong_k, compute_capability=card,
                             multiprocessors=multiprocessors, deterministic=int(wrong_q),
                             scale=head_dim**-0.5)  # fmt: skip
        shapes = {"q": heads, "out": heads, "dout": heads, "dq": heads, "k": 1, "v": 1, "dk": 1, "dv": 1}
        tensors = {name: torch.randn(n, total, head_dim).half() for name, n in shapes.items()}
        tensors |= {f"cu_seqlens_{side}": torch.tensor(lengths[side][0], dtype=torch.int32) for side in "qk"}
        tensors |= {"lse": torch.empty(heads, total), "rng_state": torch.tensor([7, 0])}
        library = emulated_kernels("attention", ATTENTION_UNITS)
        library.configure(SCHEDULE)

        def arguments(workspace: torch.Tensor, tensors: dict = tensors) -> AttentionTensors:
            pointers = {name: t.data_ptr() for name, t in tensors.items()}
            return AttentionTensors(workspace=workspace.data_ptr(), workspace_bytes=workspace.nbytes, **pointers)

        sizes = torch.zeros(2, dtype=torch.int64)
        _call(library, tensors.values(), "attention_workspaces", call, arguments(sizes), sizes)
        for function, size in zip(("attention_forward", "attention_backward"), sizes.tolist(), strict=True):
            workspace = torch.empty(size, dtype=torch.uint8)
            _call(library, [*tensors.values(), workspace], function, call, arguments(workspace))
        for result in ("out", "dq", "dk", "dv"):
            assert name == "falls" or tensors[result].isfinite().all(), result


def _call(library: EmulatedLibrary, tensors, function: str, *arguments) -> None:
    """Declares the tensors of a structure, which the library cannot see, as what asynchronous copies may touch."""
    with library._declared(list(tensors)):
        library.call(function, *arguments)


# By the chunks of 16 bytes in a row: in one warp's registers, in a block's, too many for one block's backward, and for
# one block of a cluster.
@pytest.mark.parametrize(
    "rows, cols, dtype, compute_capability",
    [
        (5, 48, torch.float16, 80),
        (3, 1025, torch.float32, 80),
        (2, 4100, torch.float32, 80),
        (2, 8200, torch.float32, 90),
    ],
)
def test_layer_norm(rows, cols, dtype, compute_capability):
    library = emulated_kernels("layer_norm")
    library.configure(SCHEDULE)
    call = LayerNormCall(DTYPES[dtype], rows, cols, 0, compute_capability, 2)
    x, dout = torch.randn(rows, cols).to(dtype), torch.randn(rows, cols).to(dtype)
    weight, bias = torch.randn(cols), torch.randn(cols)
    out, dx = torch.empty_like(x), torch.empty_like(x)
    mean, rstd, dweight, dbias = (torch.empty(n) for n in (rows, rows, cols, cols))
    workspace = torch.empty(1 << 20, dtype=torch.uint8)
    library.call("layer_norm_forward", call, x, weight, bias, out, mean, rstd)
    library.call("layer_norm_backward", call, x, dout, weight, mean, rstd, dx, dweight, dbias, workspace, 1 << 20)

    leaves = [t.double().requires_grad_() for t in (x, weight, bias)]
    expected = F.layer_norm(leaves[0], (cols,), *leaves[1:])
    close = {"rtol": 2e-3, "atol": 1e-2 if dtype == torch.float16 else 1e-3}
    torch.testing.assert_close(out.double(), expected, **close)
    for actual, gradient in zip(
        (dx, dweight, dbias), torch.autograd.grad(expected, leaves, dout.double()), strict=True
    ):
        torch.testing.assert_close(actual.double(), gradient, **close)
