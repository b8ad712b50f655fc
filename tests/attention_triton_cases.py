"""Launches of attention's Triton kernels, planned on meta tensors, for tests that compile them ahead of time."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch

from fastattn.ops.triton_launch import Launch

HEAD_DIMS = (16, 32, 64, 80, 128, 192, 256)
# What shapes the scores; the last, which has all of it, needs the most registers.
VARIANTS = ("plain", "causal", "key_mask", "bool_mask", "float_mask", "softcap", "alibi", "dropout", "everything")
# Packed sequences have no masks. (head_dims that share tiles, once.)
PACKED_VARIANTS = ("packed_causal", "packed_softcap", "packed_alibi", "packed_dropout", "packed_everything")
PACKED_HEAD_DIMS = (64, 80, 128, 192, 256)
# The gradients of float32 with few keys have kernels of their own.
FEW_KEYS_VARIANTS = ("few_keys_causal", "few_keys_everything", "few_keys_packed_everything")
TUNED_VARIANTS = ("causal", "bool_mask", "float_mask", "softcap", "alibi", "dropout", *PACKED_VARIANTS[:-1])


def _scoring(variant: str, batch: int, heads: int, seqlen: int):
    from fastattn.ops.attention_triton_plan import Packing, Scoring

    variant = variant.removeprefix("few_keys_")
    packed, variant = variant.startswith("packed"), variant.removeprefix("packed_")
    everything = variant == "everything"
    mask = slopes = sinks = rng_state = packing = None
    if packed:
        cu_seqlens = torch.empty(batch + 1, dtype=torch.int32, device="meta")
        packing = Packing(cu_seqlens, cu_seqlens, seqlen, seqlen)
    if variant == "key_mask":
        mask = torch.empty(batch, 1, 1, seqlen, dtype=torch.bool, device="meta")
    if variant == "bool_mask":
        mask = torch.empty(batch, 1, seqlen, seqlen, dtype=torch.bool, device="meta")
    if variant == "float_mask" or (everything and not packed):
        mask = torch.empty(1, heads, seqlen, seqlen, device="meta")
    if variant in ("alibi", "everything"):
        slopes = torch.empty(heads, device="meta")
    if everything:
        sinks = torch.empty(heads, device="meta")
    if variant in ("dropout", "everything"):
        rng_state = torch.empty(2, dtype=torch.int64, device="meta")
    dropout_p, softcap = 0.0 if rng_state is None else 0.1, 30.0 if variant in ("softcap", "everything") else 0.0
    causal, window_left = variant in ("causal", "everything"), 500 if everything else -1
    return Scoring(mask, slopes, sinks, rng_state, dropout_p, causal, 0.125, window_left, -1, True, softcap, packing)


def launches(
    capability: tuple[int, int], dtype: torch.dtype, head_dim: int, variant: str, candidates: bool = False
) -> Iterator[Launch]:
    """Every kernel of a call with 16 query heads for 4 key heads, as projections leave them in memory.

    ``candidates``: those that are tuned, in what tuning tries besides the tables' tiles.
    """
    from fastattn.ops import attention_triton_plan as plan
    from fastattn.ops import attention_triton_tuning as tuning
    from fastattn.ops.attention_triton_mask import plan_mask_states
    from fastattn.ops.attention_triton_tiles import Gpu
    from fastattn.ops.varlen_attention_triton import as_entry

    batch, heads, heads_kv, seqlen = 4, 16, 4, 256 if variant.startswith("few_keys") else 4096
    query, out, dout, dq = (
        torch.empty(batch, seqlen, heads, head_dim, dtype=dtype, device="meta").transpose(1, 2) for _ in range(4)
    )
    key, value, dk, dv = (
        torch.empty(batch, seqlen, heads_kv, head_dim, dtype=dtype, device="meta").transpose(1, 2) for _ in range(4)
    )
    lse, row_lse, delta = (torch.empty(batch, heads, seqlen, device="meta") for _ in range(3))
    scoring, gpu = _scoring(variant, batch, heads, seqlen), Gpu(capability)
    if scoring.packing is not None:
        operands = query, out, dout, dq, key, value, dk, dv
        query, out, dout, dq, key, value, dk, dv = (as_entry(x.transpose(1, 2).flatten(0, 1)) for x in operands)
        padded = plan.padded_rows(batch * seqlen, scoring.packing)
        lse = torch.empty(heads, batch * seqlen, device="meta")
        row_lse, delta = (torch.empty(1, heads, padded, device="meta") for _ in range(2))
    mask_launches, states = plan_mask_states(query, value, scoring.attn_mask, gpu)
    if variant == "key_mask":
        # As of short sequences; longer ones have lists, as other masks do.
        mask_launches, states = [], None
    # What needs the most registers sums up rows, too.
    row_sums = torch.empty_like(delta) if scoring.sinks is not None else None
    inputs = plan.BackwardInputs(query, key, value, dout, row_lse, delta, states, row_sums)
    if plan.wants_exact_rows(query, key, scoring):
        inputs = inputs._replace(row_sums=None, row_inverse=torch.empty_like(delta), row_dlse=torch.empty_like(delta))
    for planned in (
        functools.partial(plan.plan_forward, query, key, value, out, lse, scoring, states, gpu),
        functools.partial(plan.plan_dq, inputs, dq, scoring, gpu),
        functools.partial(plan.plan_dkdv, inputs, dk, dv, scoring, gpu),
    ):
        defaults = planned()
        for tiling in tuning.candidates(gpu, defaults[-1])[1:] if candidates else ():
            yield from (launch for launch in planned(tiling) if "q_ptr" in launch.arguments)
        if not candidates:
            yield from defaults
    if candidates:
        return
    yield from mask_launches
    yield plan.plan_delta(out, dout, None if inputs.is_exact else lse, lse, row_lse, delta, scoring.packing)
    if inputs.is_exact:
        yield from plan.plan_exact_rows(inputs, lse, scoring, gpu)
    if row_sums is not None:
        yield plan.plan_rows(inputs, lse, scoring, True, scoring.packing is None)[0]
    if scoring.attn_mask is not None and scoring.attn_mask.is_floating_point():
        yield plan.plan_dmask(inputs, scoring, gpu)[0]
    if scoring.packing is not None:
        return
    weights = torch.empty(batch, seqlen, seqlen, dtype=dtype, device="meta")
    yield plan.plan_weights(query, key, lse, weights, scoring, True, gpu)


def aot_cases(capability: tuple[int, int], quick: bool) -> Iterator[tuple[str, Launch]]:
    """Each kernel in each of the tables' tiles; head_dims that share one, in float16 alone."""
    for dtype in (torch.float16, torch.float32) if quick else (torch.float16, torch.bfloat16, torch.float32):
        for head_dim in (64,) if quick else HEAD_DIMS if dtype == torch.float16 else (64, 128, 256):
            packed = PACKED_VARIANTS if head_dim in PACKED_HEAD_DIMS else ()
            few_keys = FEW_KEYS_VARIANTS if dtype == torch.float32 else ()
            for variant in ("everything",) if quick else (*VARIANTS, *packed, *few_keys):
                for launch in launches(capability, dtype, head_dim, variant):
                    yield _name(launch, dtype, head_dim, variant), launch


def aot_candidates(capability: tuple[int, int]) -> Iterator[tuple[str, Launch]]:
    for head_dim in (64, 128, 256):
        for variant in TUNED_VARIANTS:
            for launch in launches(capability, torch.float16, head_dim, variant, candidates=True):
                yield _name(launch, torch.float16, head_dim, variant), launch


def _name(launch: Launch, dtype: torch.dtype, head_dim: int, variant: str) -> str:
    tile = f"{launch.arguments.get('BLOCK_Q', '-')}x{launch.arguments.get('BLOCK_K', '-')}"
    tile += "_tma" if launch.arguments.get("TMA") else ""
    dtype_name = str(dtype).removeprefix("torch.")
    name = launch.kernel.__name__.removesuffix("_kernel")
    if name == "attention_dkdv":
        name = "attention_" + "dk" * launch.arguments["DK"] + "dv" * launch.arguments["DV"]
    return f"{name} {dtype_name} {head_dim} {variant} {tile} s{launch.options['num_stages']}"
