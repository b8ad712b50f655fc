"""Lengths do not make Triton compile: a loop over many takes the kernels of a few.

The launcher compiles anew for other types, for arguments of 1 and for multiples of 16, unless they are marked. The
loops are planned in a process of its own, since Triton's interpreter, which the tests run in, has no parameters to ask.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
HALF, CAPABILITY = torch.float16, (9, 0)


def empty(*shape: int, dtype: torch.dtype = HALF) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def attention_of(lengths: Iterable[int], masked: bool) -> Iterator:
    """Forward and backward of one batch of 8 heads of 64, causal or with a mask of all rows."""
    from fastattn.ops import attention_triton_plan as plan
    from fastattn.ops.attention_triton_mask import plan_mask_states
    from fastattn.ops.attention_triton_tiles import Gpu

    gpu = Gpu(CAPABILITY)
    for n in lengths:
        q, k, v, out, dout, dq, dk, dv = (empty(1, 8, n, 64) for _ in range(8))
        mask = empty(1, 1, n, n, dtype=torch.bool) if masked else None
        lse, (row_lse, delta) = empty(1, 8, n), (empty(1, 8, plan.padded_rows(n)) for _ in range(2))
        scoring = plan.Scoring(mask, None, None, None, 0.0, not masked, 0.125, -1, -1, False, 0.0)
        launches, states = plan_mask_states(q, v, mask, gpu)
        inputs = plan.BackwardInputs(q, k, v, dout, row_lse, delta, states)
        yield from launches
        yield from plan.plan_forward(q, k, v, out, lse, scoring, states, gpu)
        yield plan.plan_delta(out, dout, None, lse, row_lse, delta)
        yield from plan.plan_dq(inputs, dq, scoring, gpu)
        yield from plan.plan_dkdv(inputs, dk, dv, scoring, gpu)
        yield plan.plan_weights(q, k, lse, empty(1, n, n), scoring, True, gpu)


def decoding(lengths: Iterable[int]) -> Iterator:
    """One new token after so many others, whose number the host knows."""
    from fastattn.ops import attention_with_kv_cache_triton_plan as plan
    from fastattn.ops.attention_triton_tiles import Gpu

    keys, angles, token = empty(1, 8192, 8, 64), empty(8192, 32), empty(1, 1, 8, 64)
    scores = plan.Scores(None, None, True, 0.125, -1, -1, 0.0)
    for n in lengths:
        cache = plan.Cache(keys, keys, None, n, 1, None)
        yield plan.plan_append(token, (token, token), cache, plan.Rotation(angles, angles, False))[0]
        out, lse = empty(1, 1, 8, 64), empty(1, 8, 1)
        yield from plan.plan_attention(token, cache, out, lse, scores, Gpu(CAPABILITY), multiprocessors=132)


def rows_of_norms(rows: Iterable[int]) -> Iterator:
    from tests.norm_int8_triton_cases import norm_launches

    for n in rows:
        yield from norm_launches(CAPABILITY, HALF, 768, True, False, rows=n)


def compiled(launches: Iterable) -> dict[str, int]:
    """By kernel: how many the launcher would compile."""
    from tests.triton_aot import specialized

    kinds = {(launch.kernel.__name__, repr((specialized(launch), launch.options))) for launch in launches}
    return dict(sorted(Counter(name.removesuffix("_kernel") for name, _ in kinds).items()))


def check_counts() -> None:
    once = ("attention_delta", "attention_dkdv", "attention_dq", "attention_fwd", "attention_weights")
    assert compiled(attention_of(range(1, 300), masked=False)) == dict.fromkeys(once, 1)
    # A mask's rows are read as vectors where their length allows; tiles of three shapes want lists, one of them across
    # the states' rows, whose length is a stride.
    listed = {"attention_mask_states": 2, "attention_mask_lists": 4}
    expected = dict.fromkeys(once, 2) | listed | {"attention_delta": 1}
    assert (found := compiled(attention_of(range(513, 1300, 3), masked=True))) == dict(sorted(expected.items())), found
    # Where keys are many, parts of them, in float32.
    expected = {"attention_cached": 2, "combine_parts": 1, "kv_append": 1}
    assert (found := compiled(decoding(range(1, 8000, 41)))) == expected, found
    expected = {"column_sums": 1, "row_bwd": 1, "row_fwd": 1}
    assert (found := compiled(rows_of_norms(range(1, 260)))) == expected, found


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_lengths_share_kernels():
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(Path(__file__).resolve())]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]


if __name__ == "__main__":
    check_counts()
