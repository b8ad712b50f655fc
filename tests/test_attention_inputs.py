"""Bad arguments of attention: each raises an error that says what was expected, what came and what to do."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastattn

needs_cpu = pytest.mark.skipif(
    fastattn.available_backends()["cpu"] is not None, reason=str(fastattn.available_backends()["cpu"])
)
Q = torch.zeros(2, 4, 6, 8)
K = torch.zeros(2, 4, 7, 8)
META = torch.device("meta")

BAD_INPUTS = [
    ({"query": "q"}, TypeError, "query must be a Tensor, got str"),
    ({"value": None}, TypeError, "value must be a Tensor, got NoneType"),
    ({"query": Q.half()}, TypeError, "query is float16 but key float32; convert them to one dtype"),
    ({"value": K.double()}, TypeError, "query is float32 but value float64"),
    ({"query": Q.int(), "key": K.int(), "value": K.int()}, TypeError, "query must be float32, .* got int32"),
    ({"key": K.to(META)}, ValueError, "query is on cpu but key on meta; move them to one device"),
    ({"query": Q[..., :5]}, ValueError, r"query has head_dim 5 but key has head_dim 8 \(key: \(2, 4, 7, 8\)\)"),
    ({"value": K[:, :, :5]}, ValueError, r"key has seqlen 7 but value has seqlen 5 \(value: \(2, 4, 5, 8\)\)"),
    ({"query": Q[0, 0, 0]}, ValueError, r"query must have at least 2 dims \(seqlen, head_dim\), got \(8,\)"),
    ({"key": K[:, :2], "value": K[:, :2]}, ValueError, "4 heads but key and value have 2; pass enable_gqa=True"),
    ({"key": K[:, :3], "value": K[:, :3], "enable_gqa": True}, ValueError, "4 heads, .* not a multiple of the 3"),
    ({"value": K[:, :2], "enable_gqa": True}, ValueError, "key has 4 heads but value has 2"),
    ({"key": K[:0].expand(0, 4, 7, 8)}, ValueError, "the leading dims must be equal or 1"),
    ({"key": torch.zeros(3, 4, 7, 8), "value": torch.zeros(3, 4, 7, 8)}, ValueError,
     r"the leading dims must be equal or 1, got query \(2, 4, 6, 8\), key \(3, 4, 7, 8\)"),
    ({"query": Q[..., :0], "key": K[..., :0]}, ValueError, "head_dim of at least 1, got 0"),
    ({"attn_mask": torch.zeros(6, 8)}, ValueError, r"attn_mask \(6, 8\) does not broadcast to .* \(2, 4, 6, 7\)"),
    ({"attn_mask": torch.zeros(1, 2, 4, 6, 7)}, ValueError, r"attn_mask \(1, 2, 4, 6, 7\) does not broadcast"),
    ({"attn_mask": torch.zeros(3, 1, 6, 7)}, ValueError, r"attn_mask \(3, 1, 6, 7\) does not broadcast"),
    ({"attn_mask": torch.ones(6, 7).int()}, TypeError, r"attn_mask must be a bool Tensor .*got int32; .*\.bool\(\)"),
    ({"attn_mask": "causal"}, TypeError, "attn_mask must be a bool Tensor .* got str"),
    ({"attn_mask": torch.zeros(6, 7, device=META)}, ValueError, "query is on cpu but attn_mask on meta"),
    ({"dropout_p": -0.1}, ValueError, "dropout_p must be between 0 and 1, got -0.1"),
    ({"dropout_p": 1.5}, ValueError, "dropout_p must be between 0 and 1, got 1.5"),
    ({"dropout_p": float("nan")}, ValueError, "dropout_p must be between 0 and 1, got nan"),
    ({"scale": "big"}, TypeError, "scale must be a number or None, got str"),
    ({"scale": torch.tensor(0.1)}, TypeError, "scale must be a number or None, got Tensor; fold a tensor into query"),
    ({"window": 4}, ValueError, r"window must be \(left, right\), .* got 4\. For no window pass None"),
    ({"window": (1, 2, 3)}, ValueError, r"window must be \(left, right\), .* got \(1, 2, 3\)"),
    ({"window": (-2, 0)}, ValueError, r"window must be .* got \(-2, 0\)"),
    ({"window": (1.0, 2)}, ValueError, r"window must be .* got \(1\.0, 2\)"),
    ({"window": (None, 0)}, ValueError, r"window must be .* got \(None, 0\)"),
    ({"alignment": "center"}, ValueError, "alignment must be 'top_left' or 'bottom_right', got 'center'"),
    ({"softcap": -1.0}, ValueError, "softcap must be 0 .none. or a number from 1e-37 to 1e38, got -1.0"),
    ({"softcap": float("inf")}, ValueError, "softcap must be 0 .none. or .* got inf"),
    ({"softcap": float("nan")}, ValueError, "softcap must be 0 .none. or .* got nan"),
    ({"softcap": 1e-40}, ValueError, "softcap must be 0 .none. or .* got 1e-40"),
    ({"softcap": 1e300}, ValueError, "softcap must be 0 .none. or .* got 1e\\+300"),
    ({"alibi_slopes": torch.zeros(3)}, ValueError, r"alibi_slopes must be \(heads,\) = \(4,\) or .* = \(2, 4\)"),
    ({"alibi_slopes": torch.zeros(4).int()}, TypeError, "alibi_slopes must be a floating Tensor, got int32"),
    ({"alibi_slopes": [0.1] * 4}, TypeError, "alibi_slopes must be a floating Tensor, got list"),
    ({"alibi_slopes": torch.zeros(4, device=META)}, ValueError, "query is on cpu but alibi_slopes on meta"),
    ({"sinks": torch.zeros(2, 4)}, ValueError, r"sinks must be \(heads,\) = \(4,\), got shape \(2, 4\)"),
    ({"sinks": 0.0}, TypeError, "sinks must be a floating Tensor, got float"),
    ({"backend": "gpu"}, ValueError, "backend must be 'auto' or one of .*, got 'gpu'"),
    ({"backend": "cuda"}, NotImplementedError, "attention: backend 'cuda' cannot run this: .* Use backend='auto'"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "error", "message"), BAD_INPUTS, ids=[case[2][:48] for case in BAD_INPUTS])
def test_rejects(change, error, message):
    arguments = {"query": Q, "key": K, "value": K}
    assert fastattn.attention(**arguments).shape == Q.shape
    with pytest.raises(error, match=message) as raised:
        fastattn.attention(**arguments | change)
    assert "backend" in change or str(raised.value).startswith("attention: ")


@pytest.mark.parametrize(
    ("change", "error", "message"), BAD_INPUTS[:40:4], ids=[case[2][:48] for case in BAD_INPUTS[:40:4]]
)
def test_explain_rejects_what_the_function_rejects(change, error, message):
    with pytest.raises(error, match=message):
        fastattn.explain(fastattn.attention, **{"query": Q, "key": K, "value": K} | change)


def _op_arguments(**changes):
    arguments = {"query": Q, "key": K, "value": K, "attn_mask": None, "alibi_slopes": None, "sinks": None,
                 "rng_state": None, "dropout_p": 0.0, "is_causal": False, "scale": 1.0, "window_left": -1,
                 "window_right": -1, "bottom_right": False, "softcap": 0.0}  # fmt: skip
    return tuple((arguments | changes).values())


@pytest.mark.parametrize("changes", [
    {"query": Q[0]}, {"key": K[:1]}, {"key": K[..., :4]}, {"value": K[:, :, :3]}, {"value": K[:, :1]},
    {"key": K.half()}, {"query": Q.int(), "key": K.int(), "value": K.int()}, {"attn_mask": torch.zeros(3, 7)},
    {"attn_mask": torch.zeros(6, 7).int()}, {"alibi_slopes": torch.zeros(3)}, {"alibi_slopes": torch.zeros(4).double()},
    {"sinks": torch.zeros(5)}, {"sinks": torch.zeros(4).int()}, {"dropout_p": 0.5}, {"dropout_p": 2.0},
    {"dropout_p": 0.5, "rng_state": torch.zeros(1).long()}, {"dropout_p": 0.5, "rng_state": torch.zeros(2)},
    {"query": torch.zeros(2, 4, 6, 300), "key": torch.zeros(2, 4, 7, 300)}, {"value": K.to_sparse()},
], ids=str)  # fmt: skip
@needs_cpu
def test_the_op_itself_never_reads_out_of_bounds(changes):
    """Called past the Python checks, the op still refuses whatever its kernels cannot address."""
    with pytest.raises((ValueError, TypeError, NotImplementedError, RuntimeError)):
        torch.ops.fastattn.attention(*_op_arguments(**changes))


CALLS_WITH_LITTLE_ROOM = """
import resource
import torch, fastattn

torch.set_num_threads(2)
x = torch.ones(1, 8, 1024, 64)  # out: 2 MiB, working memory: 1.2
fastattn.attention(x[:, :, :64], x[:, :, :64], x[:, :, :64], backend="cpu")
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
for room in range(0, 16 << 20, 1 << 18):
    resource.setrlimit(resource.RLIMIT_AS, (used + room, resource.RLIM_INFINITY))
    try:
        fastattn.attention(x, x, x, backend="cpu")
        print("ran")
    except RuntimeError as error:
        print(error)
"""


@needs_cpu
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc, as Linux has it")
def test_no_room_for_working_memory_raises():
    """It ended the process."""
    outcome = subprocess.run([sys.executable, "-c", CALLS_WITH_LITTLE_ROOM], cwd=Path(__file__).parent.parent,
                             capture_output=True, text=True, timeout=200)  # fmt: skip
    assert outcome.returncode == 0, outcome.stderr
    first, *_, last = outcome.stdout.splitlines()
    assert "can't allocate memory" in first and last == "ran"
