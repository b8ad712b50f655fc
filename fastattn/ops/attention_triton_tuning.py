"""Runs planned launches of attention's Triton kernels, in the tables' tiles or in the fastest that a timing finds.

Among what is tried on 9.0 and 10.0, and nowhere a default, since no GPU has timed it: keys and values by TMA, through
descriptors that the host makes (Triton 3.9; forward, causal, float16). Loads become cp.async.bulk.tensor, and addresses
leave the registers: from 205 a thread to 163 at head_dim 64, from 213 to 150 at 128 on 9.0, with the same shared memory
and no spills; tiles past the end need no comparison, being filled with zeros. Descriptors made by the kernel
(``tl.make_tensor_descriptor``) would want scratch memory in every launch, from an allocator of which a process has one.
Warp specialisation (``tl.range(warp_specialize=True)``) is not tried: with these descriptors, too, it changes nothing
on 9.0 with 8 warps, does not compile with 4 (the pass NVGPUWarpSpecialization fails), and spills in every tile on 10.0.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastattn.ops import attention_triton_plan as plans
from fastattn.ops import attention_triton_tiles as tiles
from fastattn.ops import triton_autotune
from fastattn.ops.attention_triton_mask import plan_mask_states
from fastattn.ops.attention_triton_plan import shape_of_tiles
from fastattn.ops.attention_triton_tiles import Tile, Tiling
from fastattn.ops.triton_launch import Launch, has_descriptor, next_power_of_2

# What times depend on besides the constexprs: lengths, known by the next power of two.
_LENGTHS = ("heads", "group", "seqlen_q", "seqlen_k", "window_left", "window_right")
_TILE = ("BLOCK_Q", "BLOCK_K", "SLICE", "DK", "DV")


def run(on: Tensor, plan: Callable[..., list[Launch]], *arguments: Any) -> None:
    """Launches what ``plan(*arguments, gpu)`` plans; its last parameter, ``tiling``, takes the tables' place."""
    gpu = tiles.gpu_of(on)
    launches = plan(*arguments, gpu)
    if triton_autotune.is_on():
        launches = _fastest(on, gpu, partial(plan, *arguments, gpu), launches)
    _run_all(launches, on)


def run_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    lse: Tensor,
    gradients: tuple[Tensor, Tensor, Tensor],
    call: plans.Scoring,
    states: Tensor | None,
    sinks: Tensor | None,
    mask: Tensor | None = None,
) -> tuple[plans.BackwardInputs, plans.RowGradients]:
    """Writes dq, dk and dv. Gives what the kernel of the gradient of ``mask`` reads too, and what adds up to that of
    ``sinks``, and of a mask that broadcasts over keys."""
    dq, dk, dv = gradients
    lse, dlse = lse.contiguous(), None if dlse is None else dlse.contiguous()
    batch, heads, seqlen_q, _ = out.shape
    row_lse, delta = (lse.new_empty(batch, heads, plans.padded_rows(seqlen_q, call.packing)) for _ in range(2))
    is_row_mask = mask is not None and broadcasts_over_keys(mask)
    needs_delta = sinks is not None or (mask is not None and (not is_row_mask or call.sinks is not None))
    inputs = plans.BackwardInputs(query, key, value, dout, row_lse, delta, states)
    if plans.wants_exact_rows(query, key, call):
        inputs = inputs._replace(row_inverse=torch.empty_like(delta), row_dlse=torch.empty_like(delta))
        plans.plan_delta(out, dout, None, lse, row_lse, delta, call.packing).run(query)
        _run_all(plans.plan_exact_rows(inputs, dlse, call, tiles.gpu_of(query)), query)
    else:
        inputs = inputs._replace(row_sums=torch.empty_like(delta) if needs_delta else None)
        plans.plan_delta(out, dout, dlse, lse, row_lse, delta, call.packing).run(query)
    run(query, plans.plan_dkdv, inputs, dk, dv, call)
    run(query, plans.plan_dq, inputs, dq, call)
    if not needs_delta and not is_row_mask:
        return inputs, plans.RowGradients(None, None)
    launch, of_rows = plans.plan_rows(inputs, dlse, call, sinks is not None, is_row_mask)
    launch.run(query)
    return inputs, of_rows


def broadcasts_over_keys(mask: Tensor) -> bool:
    """Or there is one key: the gradient of a mask of one column follows from rows alone."""
    return mask.dim() == 0 or mask.shape[-1] == 1


def mask_states(query: Tensor, value: Tensor, attn_mask: Tensor | None) -> Tensor | None:
    """Which parts of the mask leave a key visible, where it pays to look: read once for all plans of a pass."""
    launches, states = plan_mask_states(query, value, attn_mask, tiles.gpu_of(query))
    _run_all(launches, query)
    return states


def _run_all(launches: list[Launch], on: Tensor) -> None:
    for launch in launches:
        launch.run(on)


def _fastest(
    on: Tensor, gpu: tiles.Gpu, plan: Callable[[Tiling], list[Launch]], launches: list[Launch]
) -> list[Launch]:
    kernel, choices = launches[-1].kernel, candidates(gpu, launches[-1])

    def prepare(tiling: Tiling) -> Callable[[], None]:
        return partial(_run_all, plan(tiling), on)

    return plan(triton_autotune.fastest(kernel, _key(launches[-1].arguments), choices, choices[0], prepare, on))


def _key(arguments: dict[str, Any]) -> tuple[Any, ...]:
    constants = {name: value for name, value in arguments.items() if name.isupper() and name not in _TILE}
    lengths = {name: next_power_of_2(arguments[name]) for name in _LENGTHS}
    query, cu_seqlens = arguments["q_ptr"], arguments["cu_seqlens_q_ptr"]
    # Of packed sequences, how many, and of how many rows in all.
    batch = (query.shape[0],) if cu_seqlens is None else (cu_seqlens.shape[0] - 1, query.shape[2])
    return query.dtype, *map(next_power_of_2, batch), *sorted((constants | lengths).items())


# --- What is timed ---------------------------------------------------------------------------------------------------


# By kernel, major compute capability and padded head_dim: what is tried where the scores are dot products alone, and
# with one of mask, dropout, ALiBi, softcap. Where they have more, and in float32, few tiles fit the registers, and the
# tables' are not tuned. All of these compile without spills (``python -m tests.triton_aot --candidates``).
_Trials = dict[int, dict[int, tuple[tuple[Tiling, ...], tuple[Tiling, ...]]]]


def _one(*trials: tuple[int, int, int, int]) -> tuple[Tiling, ...]:
    """Tilings of one launch."""
    return tuple((Tile(*trial),) for trial in trials)


_FORWARD: _Trials = {
    8: {64: (_one((128, 64, 8, 2), (64, 64, 4, 3), (64, 32, 4, 3)), ()),
        128: (_one((128, 64, 8, 3), (64, 64, 4, 2), (64, 64, 8, 2)), _one((64, 32, 8, 2), (64, 64, 8, 1))),
        256: (_one((64, 32, 8, 1), (64, 32, 8, 2)), ())},
    9: {64: (_one((128, 64, 8, 3), (64, 128, 4, 3), (64, 64, 4, 3)), _one((64, 64, 4, 2))),
        128: (_one((128, 128, 8, 2), (128, 64, 8, 2), (64, 64, 4, 2)), ()),
        256: ((), ())},
    10: {64: (_one((128, 128, 8, 2), (64, 128, 4, 3), (64, 64, 4, 3)), _one((128, 32, 8, 3), (64, 64, 4, 2))),
         128: (_one((128, 128, 8, 2), (128, 64, 8, 2), (64, 64, 4, 2)), _one((128, 32, 8, 3), (64, 32, 4, 2))),
         256: (_one((64, 64, 8, 2), (64, 32, 8, 2)), ())},
}  # fmt: skip
# Those for which the lengths of packed sequences, which are no arguments, leave no registers.
_TOO_LARGE_PACKED = {(8, 128, Tile(128, 64, 8, 3)), (9, 128, Tile(128, 128, 8, 2)), (10, 128, Tile(128, 128, 8, 2))}
_DQ: _Trials = {
    8: {64: (_one((128, 64, 8, 3), (64, 64, 4, 3), (64, 32, 4, 3)), ()),
        128: (_one((64, 64, 8, 2), (64, 32, 8, 2), (32, 64, 4, 2)), _one((64, 32, 8, 1), (32, 64, 8, 2))),
        256: (_one((32, 32, 8, 2), (64, 32, 8, 1)), ())},
    9: {64: (_one((128, 128, 8, 2), (64, 64, 4, 3), (128, 32, 8, 3)), _one((64, 64, 8, 2))),
        128: (_one((128, 64, 8, 2), (64, 128, 8, 2), (128, 32, 8, 3)), ()),
        256: ((), ())},
    10: {64: (_one((128, 128, 8, 2), (64, 64, 4, 3), (128, 32, 8, 3)), _one((128, 32, 8, 3), (64, 64, 8, 2))),
         128: (_one((128, 64, 8, 2), (64, 128, 8, 2), (128, 32, 8, 3)), _one((64, 32, 8, 2), (64, 32, 4, 2))),
         256: (_one((64, 32, 8, 2), (64, 64, 8, 1)), ())},
}  # fmt: skip
_DKDV: _Trials = {
    8: {64: (_one((32, 128, 8, 3), (32, 64, 4, 2), (16, 128, 8, 2)), ()),
        128: (_one((32, 64, 8, 2)), _one((16, 64, 8, 2))),
        256: ((), ())},
    9: {64: (_one((32, 128, 8, 3), (64, 64, 8, 2), (16, 128, 8, 2)), _one((32, 64, 8, 2))),
        128: (_one((16, 128, 8, 3)), ()),
        256: ((), ())},
    10: {64: (_one((32, 128, 8, 3), (64, 64, 8, 2), (16, 128, 8, 2)), _one((16, 128, 8, 2), (32, 64, 8, 2))),
         128: ((), ()),
         256: ((), ())},
}  # fmt: skip
_FORWARD_TMA: dict[int, tuple[Tiling, ...]] = {
    64: _one((128, 128, 8, 3), (64, 128, 4, 3)), 128: _one((128, 64, 8, 3), (128, 128, 8, 2), (64, 64, 4, 2)),
}  # fmt: skip
# The tables' functions are looked up by name, for tests may have put others in their place.
_TABLES = {
    "attention_fwd_kernel": ("forward", _FORWARD),
    "attention_dq_kernel": ("dq", _DQ),
    "attention_dkdv_kernel": ("dkdv", _DKDV),
}
_INTERPRETED = ((Tile(32, 32, 4, 1),), (Tile(16, 64, 4, 1),), (Tile(64, 32, 4, 1),))


def candidates(gpu: tiles.Gpu, launch: Launch) -> tuple[Tiling, ...]:
    """What is timed for the kernel and arguments of ``launch``; the tables' tiling comes first."""
    shape, is_packed = shape_of_tiles(launch.arguments), launch.arguments["PACKED"]
    found = tilings(gpu, launch.kernel.__name__, *shape, is_packed=is_packed)
    if launch.kernel.__name__ != "attention_fwd_kernel" or is_packed:
        return found
    by_tma = all(has_descriptor(launch.arguments[operand]) for operand in ("k_ptr", "v_ptr"))
    return found + _tma_tilings(gpu, *shape[1:]) if by_tma else found


def tilings(
    gpu: tiles.Gpu, kernel: str, dtype: torch.dtype, block_d: int, features: int, is_packed: bool = False
) -> tuple[Tiling, ...]:
    if gpu is tiles.INTERPRETER:
        return _INTERPRETED
    table, trials = _TABLES[kernel]
    default = getattr(tiles, table)(gpu, dtype, block_d, features)
    major = gpu.capability[0]
    if dtype == torch.float32 or features > 1 or major not in trials:
        return (default,)
    without = _TOO_LARGE_PACKED if is_packed and trials is _FORWARD else ()
    of_shape = (
        tiling for tiling in trials[major][tiles.width(block_d)][features] if (major, block_d, *tiling) not in without
    )
    tried = (tuple(tiles.fit(tile, gpu) for tile in tiling) for tiling in of_shape)
    return (default, *(tiling for tiling in dict.fromkeys(tried) if tiling != default))


def _tma_tilings(gpu: tiles.Gpu, block_d: int, features: int) -> tuple[Tiling, ...]:
    if gpu is tiles.INTERPRETER:
        return ((Tile(32, 32, 4, 1, tma=True),),)
    if gpu.capability[0] not in (9, 10) or features > 0:
        return ()
    tried = _FORWARD_TMA.get(tiles.width(block_d), ())
    return tuple((tiles.fit(tile, gpu)._replace(tma=True),) for (tile,) in tried)
