"""The short way from ``fastattn.attention`` to its op, for plain tensors on the CPU."""

from __future__ import annotations

import pytest
import torch
from torch.overrides import TorchFunctionMode

import fastattn
from fastattn._extension import extension
from fastattn.ops import attention_compiled
from fastattn.ops.attention_compiled import attention_if_plain

pytestmark = pytest.mark.skipif(extension is None, reason="the extension is not built")

Q, K = torch.zeros(2, 4, 6, 8), torch.zeros(2, 4, 7, 8)
USUAL = {"query": Q, "key": K, "value": K, "is_causal": False, "scale": None, "enable_gqa": False}


class Subclass(torch.Tensor):
    pass


class Mode(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize(("scale", "heads_kv"), [(None, 4), (0.3, 2)], ids=["default", "scaled gqa"])
def test_computes_what_the_op_does(scale, heads_kv, is_causal, dtype):
    # head_dim 24: its default scale is no power of two, so another rounding of it would show in float64.
    query = torch.randn(2, 5, 4, 24, dtype=dtype).transpose(1, 2).requires_grad_()
    key, value = torch.randn(2, heads_kv, 7, 24, dtype=dtype), torch.randn(2, heads_kv, 7, 16, dtype=dtype)
    out = attention_if_plain(query, key, value, is_causal, scale, True)
    factor = 24**-0.5 if scale is None else scale
    expected, _ = torch.ops.fastattn.attention(
        query, key, value, None, None, None, None, 0.0, is_causal, factor, -1, -1, False, 0.0
    )
    assert torch.equal(out, expected)
    assert out.stride() == expected.stride()
    assert out.grad_fn is not None
    assert attention_if_plain(query.detach(), key, value, is_causal, scale, True).grad_fn is None


@pytest.mark.parametrize(
    "changed",
    [{"query": Q.as_subclass(Subclass)}, {"key": K.to_sparse()}, {"value": K.to("meta")}, {"query": Q.int()},
     {"query": Q.half()}, {"query": Q[0]}, {"query": Q[:1]}, {"query": Q[:, :2]}, {"query": Q[..., :5]},
     {"query": None}, {"query": Q[:, :3], "enable_gqa": True}, {"key": K[:, :, :5]}, {"value": K[:, :2]},
     {"value": K[..., :0]}, {"query": Q.repeat(1, 1, 1, 33), "key": K.repeat(1, 1, 1, 33)}, {"is_causal": 1},
     {"scale": 1}, {"scale": torch.ones(())}, {"enable_gqa": 1}],
    ids=lambda changed: next(iter(changed)),
)  # fmt: skip
def test_leaves_the_unusual_to_the_general_way(changed):
    assert attention_if_plain(*USUAL.values()) is not None
    assert attention_if_plain(*(USUAL | changed).values()) is None


def test_is_left_to_those_who_watch():
    with Mode():
        assert attention_if_plain(*USUAL.values()) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert attention_if_plain(*USUAL.values()) is None
        assert fastattn.attention(Q, K, K).dtype == torch.bfloat16
    queries = torch.randn(3, *Q.shape)
    batched = torch.func.vmap(lambda query: fastattn.attention(query, K, K))(queries)
    assert torch.equal(batched, torch.stack([fastattn.attention(query, K, K, backend="eager") for query in queries]))


@pytest.mark.parametrize(
    "options",
    [{"attn_mask": torch.ones(6, 7, dtype=torch.bool)}, {"dropout_p": 0.5}, {"window": (1, 1)}, {"softcap": 2.0},
     {"alignment": "bottom_right"}, {"alibi_slopes": torch.ones(4)}, {"sinks": torch.zeros(4)}, {"return_lse": True},
     {"backend": "eager"}],
    ids=lambda options: next(iter(options)),
)  # fmt: skip
def test_is_taken_by_plain_calls_to_the_cpu_kernel_alone(options, monkeypatch):
    calls = []
    monkeypatch.setattr(attention_compiled, "attention_if_plain", lambda *args: calls.append(args))
    fastattn.attention(Q, K, K, **options)
    with fastattn.use_backend("eager"):
        fastattn.attention(Q, K, K)
    assert not calls
    with fastattn.use_backend("cpu"):
        fastattn.attention(Q, K, K)
    fastattn.attention(Q, K, K, is_causal=True)
    assert len(calls) == 2
