"""From a call of attention to launches of its Triton kernels: which variant of a kernel, which tiles, which arguments.

Everything here works on meta tensors too: tests compile the planned launches for GPUs that are not there.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastattn.ops import attention_triton_tiles as tiles
from fastattn.ops.attention_triton_bwd import attention_dkdv_kernel, attention_dq_kernel
from fastattn.ops.attention_triton_dmask import attention_dmask_kernel
from fastattn.ops.attention_triton_exact_rows import attention_exact_rows_kernel
from fastattn.ops.attention_triton_fwd import attention_fwd_kernel
from fastattn.ops.attention_triton_mask import ceil_div, mask_arguments, plan_lists
from fastattn.ops.attention_triton_packed import STATISTICS_ROWS
from fastattn.ops.attention_triton_rows import attention_delta_kernel, attention_rows_kernel
from fastattn.ops.attention_triton_scores import MASK_ADD, MASK_NONE
from fastattn.ops.attention_triton_tiles import Tile, Tiling
from fastattn.ops.attention_triton_weights import attention_weights_kernel
from fastattn.ops.triton_launch import Launch, descriptor, neighbours

LOG2_E = math.log2(math.e)
# How many programs share the batches and heads that add to one tile of a mask's gradient, so that a small mask fills a
# GPU. A constant, not the GPU's size: the order of sums is the same on every machine.
_DMASK_PROGRAMS = 512
# Up to so many keys, float32 gradients are made of the rows' own sums (attention_triton_exact_rows.py).
_EXACT_KEYS = 256


class Packing(NamedTuple):
    """Of operands that are packed sequences, as one batch entry: (1, heads, total, head_dim), whose stride of batches
    is that of rows (attention_triton_packed.py)."""

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int

    @property
    def batch(self) -> int:
        return self.cu_seqlens_q.shape[0] - 1


class Scoring(NamedTuple):
    """What shapes the scores, in the order of the ops' schemas."""

    attn_mask: Tensor | None
    alibi_slopes: Tensor | None
    sinks: Tensor | None
    rng_state: Tensor | None
    dropout_p: float
    is_causal: bool
    scale: float
    window_left: int
    window_right: int
    bottom_right: bool
    softcap: float
    packing: Packing | None = None

    def extent(self, query: Tensor, key: Tensor) -> tuple[int, int, int]:
        """(batch, seqlen_q, seqlen_k); of packed sequences, their number and the longest."""
        packing = self.packing
        if packing is None:
            return query.shape[0], query.shape[2], key.shape[2]
        return packing.batch, packing.max_seqlen_q, packing.max_seqlen_k


def padded(head_dim: int) -> int:
    """tl.dot wants powers of two, at least 16."""
    return max(16, 1 << (head_dim - 1).bit_length())


def _strides(name: str, tensor: Tensor) -> dict[str, int]:
    """Of a (batch, heads, rows, head_dim) operand with contiguous last dim."""
    batch, head, row, _ = tensor.stride()
    return {f"stride_{name}_batch": batch, f"stride_{name}_head": head, f"stride_{name}_row": row}


def _scoring_arguments(query: Tensor, key: Tensor, scoring: Scoring) -> dict[str, Any]:
    """Arguments of every kernel that computes scores."""
    heads, heads_kv, head_dim = query.shape[1], key.shape[1], query.shape[3]
    _, seqlen_q, seqlen_k = scoring.extent(query, key)
    mask = mask_arguments(scoring.attn_mask)
    # A side of the window that reaches past every key limits nothing.
    longest = seqlen_q + seqlen_k
    right = 0 if scoring.is_causal else scoring.window_right
    softcap, scale, dropout_p = scoring.softcap, scoring.scale, scoring.dropout_p
    slopes = None if scoring.alibi_slopes is None else neighbours(scoring.alibi_slopes)
    plain = scale > 0 and softcap == 0 and slopes is None and mask["MASK"] != MASK_ADD.value
    return mask | {
        "alibi_ptr": slopes,
        "stride_alibi_batch": slopes.stride(0) if slopes is not None and slopes.dim() == 2 else 0,
        "rng_state_ptr": scoring.rng_state,
        "heads": heads,
        "group": heads // max(heads_kv, 1),
        "seqlen_q": seqlen_q,
        "seqlen_k": seqlen_k,
        "diagonal": seqlen_k - seqlen_q if scoring.bottom_right and scoring.packing is None else 0,
        "window_left": min(max(scoring.window_left, 0), longest),
        "window_right": min(max(right, 0), longest),
        "LEFT": 0 <= scoring.window_left < longest,
        "RIGHT": 0 <= right < longest,
        "scale": scale,
        "unit": scale * LOG2_E if plain else LOG2_E,
        "softcap": softcap,
        "threshold": int(dropout_p * 65536.0 + 0.5),
        "keep_scale": 1.0 / (1.0 - dropout_p) if dropout_p < 1 else 0.0,
        "HEAD_DIM": head_dim,
        "ALIBI": slopes is not None,
        "SOFTCAP": softcap > 0,
        "DROPOUT": scoring.rng_state is not None,
        "PLAIN": plain,
        "PRECISION": "tf32" if allows_tf32(query) else "ieee",
    }


def _packing_arguments(query: Tensor, key: Tensor, scoring: Scoring) -> dict[str, Any]:
    """Those of the forward's and backward's kernels: absent, they become constants of the compiled kernel."""
    packing = scoring.packing
    return {
        "cu_seqlens_q_ptr": None if packing is None else packing.cu_seqlens_q,
        "cu_seqlens_k_ptr": None if packing is None else packing.cu_seqlens_k,
        "total_q": None if packing is None else query.shape[2],
        "total_k": None if packing is None else key.shape[2],
        "PACKED": packing is not None,
        "BOTTOM_RIGHT": packing is not None and scoring.bottom_right,
    }


def allows_tf32(query: Tensor) -> bool:
    """float32 products are exact unless the user told PyTorch that TensorFloat-32 will do."""
    if query.dtype != torch.float32 or not query.is_cuda or torch.version.hip is not None:
        return False  # of AMD's GPUs, few have it
    # Not torch.get_float32_matmul_precision(), which raises where the user told it by this newer attribute.
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def _key_mask(arguments: dict[str, Any], mask_states: Tensor | None) -> bool:
    """Whether a program looks up by itself which tiles are hidden at the ends of a mask of one row (key padding)."""
    return mask_states is None and arguments["MASK"] != MASK_NONE.value and arguments["stride_mask_q"] == 0


def _features(arguments: dict[str, Any]) -> int:
    """How many of those that take registers: what makes scores of dot products, and dropout. Tiles depend on it."""
    costly = (arguments["DROPOUT"], arguments["SOFTCAP"], arguments["ALIBI"], arguments["MASK"] == MASK_ADD.value)
    return max(sum(costly), int(not arguments["PLAIN"] or arguments["MASK"] != MASK_NONE.value))


def _one_walk(arguments: dict[str, Any], mask_states: Tensor | None, widest: int) -> bool:
    """Whether a kernel has one loop that compares positions in every tile, not one for the cut and one for the full.

    What loops share stays in registers through all of them: more than there are where scores take many to compute. So
    do the lengths of packed sequences, which are no arguments, and where a list of tiles is: above head_dim ``widest``
    there is no room for them.
    """
    _, head_dim, features = shape_of_tiles(arguments)
    return features > 1 or ((arguments["PACKED"] or mask_states is not None) and head_dim > widest)


def _widest_of_two_walks(gpu: tiles.Gpu) -> int:
    """Of the forward, and of dk and dv of a mask's listed tiles."""
    return 128 if gpu.capability[0] == 9 else 256


def _with_lengths(tile: Tile, arguments: dict[str, Any]) -> Tile:
    """Of the widest float32 sums, half as many rows leave registers for the lengths of packed sequences."""
    dtype, head_dim, _ = shape_of_tiles(arguments)
    wide = arguments["PACKED"] and dtype == torch.float32 and head_dim > 128
    return tile._replace(block_q=min(tile.block_q, 32)) if wide else tile


def _blocks(tile: Tile) -> dict[str, int]:
    return {"BLOCK_Q": tile.block_q, "BLOCK_K": tile.block_k, "SLICE": tile.head_dim_slice}


def _whole_rows(query: Tensor, value: Tensor) -> dict[str, int]:
    """Of the kernels that multiply whole rows: sums as wide as head_dim."""
    head_dim_v = value.shape[3]
    return {"HEAD_DIM_V": head_dim_v, "BLOCK_D": padded(query.shape[3]), "BLOCK_DV": padded(head_dim_v)}


def shape_of_tiles(arguments: dict[str, Any]) -> tuple[torch.dtype, int, int]:
    """What the tables of tiles know a launch of these arguments by: dtype, padded head_dim, features."""
    return arguments["q_ptr"].dtype, max(arguments["BLOCK_D"], arguments["BLOCK_DV"]), _features(arguments)


# --- Plans -----------------------------------------------------------------------------------------------------------
#
# Operands have contiguous last dims, and there are rows and heads. ``tiling`` takes the place of the tables' tiles.


def plan_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    scoring: Scoring,
    mask_states: Tensor | None,
    gpu: tiles.Gpu,
    tiling: Tiling | None = None,
) -> list[Launch]:
    """Writes out and lse. ``mask_states``, here and below: of attention_triton_mask.py."""
    arguments = _scoring_arguments(query, key, scoring) | _whole_rows(query, value)
    arguments |= _packing_arguments(query, key, scoring) | {"q_ptr": query}
    sinks = None if scoring.sinks is None else neighbours(scoring.sinks)
    if sinks is not None:
        # The sink is a natural logit, so the others are too.
        arguments |= {"PLAIN": False, "unit": LOG2_E}
    arguments |= {
        "k_ptr": key, "v_ptr": value, "out_ptr": out, "lse_ptr": lse, "sinks_ptr": sinks,
        **_strides("q", query), **_strides("k", key), **_strides("v", value), **_strides("out", out),
        "KEY_MASK": _key_mask(arguments, mask_states),
        "ONE_WALK": _one_walk(arguments, mask_states, _widest_of_two_walks(gpu)),
        "SINKS": sinks is not None,
    }  # fmt: skip
    (tile,) = tiling or tiles.forward(gpu, *shape_of_tiles(arguments))
    tile = _with_lengths(tile, arguments)
    batch, seqlen_q, seqlen_k = scoring.extent(query, key)
    programs = batch * query.shape[1] * ceil_div(seqlen_q, tile.block_q)
    launches, lists = plan_lists(mask_states, tile, (seqlen_q, seqlen_k))
    arguments |= _blocks(tile) | lists | {"TMA": tile.tma}
    if tile.tma:
        of_keys, of_values = ((1, 1, tile.block_k, arguments[block]) for block in ("BLOCK_D", "BLOCK_DV"))
        arguments |= {"k_ptr": descriptor(key, of_keys), "v_ptr": descriptor(value, of_values)}
    return [*launches, Launch(attention_fwd_kernel, (programs,), arguments, tile.launch_options())]


def plan_weights(
    query: Tensor, key: Tensor, lse: Tensor, weights: Tensor, scoring: Scoring, average_heads: bool, gpu: tiles.Gpu
) -> Launch:
    arguments = _scoring_arguments(query, key, scoring)
    tile = tiles.scores(gpu, query.dtype, padded(query.shape[3]))
    arguments |= {
        "q_ptr": query, "k_ptr": key, "lse_ptr": lse, "weights_ptr": weights,
        **_strides("q", query), **_strides("k", key), **_blocks(tile), "AVERAGE": average_heads,
    }  # fmt: skip
    batch, heads, seqlen_q, _ = query.shape
    matrices = batch * (1 if average_heads else heads)
    programs = matrices * ceil_div(seqlen_q, tile.block_q) * ceil_div(key.shape[2], tile.block_k)
    return Launch(attention_weights_kernel, (programs,), arguments, tile.launch_options())


def padded_rows(seqlen_q: int, packing: Packing | None = None) -> int:
    """How many rows the backward's statistics have for each (batch, head), or head of packed sequences: every kernel's
    tiles of rows divide those of a sequence."""
    sequences = 0 if packing is None else packing.batch
    return (ceil_div(seqlen_q, STATISTICS_ROWS.value) + sequences) * STATISTICS_ROWS.value


def plan_delta(
    out: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    lse: Tensor,
    row_lse: Tensor,
    delta: Tensor,
    packing: Packing | None = None,
) -> Launch:
    """Writes row_lse and delta."""
    batch, heads, seqlen_q, head_dim_v = out.shape
    if packing is not None:
        batch, seqlen_q = packing.batch, packing.max_seqlen_q
    block_dv = padded(head_dim_v)
    # 4096 elements of each operand: 32 a thread, which keeps enough loads in flight. But no more rows than other tiles
    # have, whose offsets are 32-bit numbers.
    block_q = min(max(16, 4096 // block_dv), 128)
    row_tiles = padded_rows(seqlen_q) // block_q
    arguments = {
        "out_ptr": out, "dout_ptr": dout, "dlse_ptr": dlse, "lse_ptr": lse, "row_lse_ptr": row_lse, "delta_ptr": delta,
        **_strides("out", out), **_strides("dout", dout), "heads": heads,
        "seqlen_q": seqlen_q, "padded_rows": delta.shape[2], "HEAD_DIM_V": head_dim_v, "BLOCK_Q": block_q,
        "BLOCK_DV": block_dv, "DLSE": dlse is not None, "PACKED": packing is not None,
        "cu_seqlens_q_ptr": None if packing is None else packing.cu_seqlens_q,
        "total_q": None if packing is None else out.shape[2],
    }  # fmt: skip
    # With all registers: for one more block of 64 each, ptxas would spill some.
    options = Tile(block_q, 0, 4, 1, True).launch_options()
    return Launch(attention_delta_kernel, (batch * heads * row_tiles,), arguments, options)


class BackwardInputs(NamedTuple):
    """What every kernel of the backward reads. row_lse, delta: (batch, heads, padded_rows), from ``plan_delta``; the
    batch is 1 for packed sequences. The others are like them, where there are any: row_inverse and row_dlse from
    ``plan_exact_rows``, which corrects delta, and row_sums, of ds, from ``plan_dq``."""

    query: Tensor
    key: Tensor
    value: Tensor
    dout: Tensor
    row_lse: Tensor
    delta: Tensor
    mask_states: Tensor | None
    row_sums: Tensor | None = None
    row_inverse: Tensor | None = None
    row_dlse: Tensor | None = None

    @property
    def is_exact(self) -> bool:
        return self.row_inverse is not None

    def arguments(self, scoring: Scoring) -> dict[str, Any]:
        return _scoring_arguments(self.query, self.key, scoring) | {
            "q_ptr": self.query, "k_ptr": self.key, "v_ptr": self.value, "dout_ptr": self.dout,
            "row_lse_ptr": self.row_lse, "delta_ptr": self.delta, "padded_rows": self.delta.shape[2],
            "row_inverse_ptr": self.row_inverse, "row_dlse_ptr": self.row_dlse, "EXACT": self.is_exact,
            **_strides("q", self.query), **_strides("k", self.key), **_strides("v", self.value),
            **_strides("dout", self.dout),
        }  # fmt: skip


def wants_exact_rows(query: Tensor, key: Tensor, scoring: Scoring) -> bool:
    _, _, seqlen_k = scoring.extent(query, key)
    return query.dtype == torch.float32 and not allows_tf32(query) and seqlen_k <= _EXACT_KEYS


def plan_exact_rows(inputs: BackwardInputs, dlse: Tensor | None, scoring: Scoring, gpu: tiles.Gpu) -> list[Launch]:
    """Corrects delta, which ``plan_delta`` made without dlse, and writes row_inverse and row_dlse."""
    batch, *seqlens = scoring.extent(inputs.query, inputs.key)
    head_dim, head_dim_v = inputs.query.shape[3], inputs.value.shape[3]
    tile = tiles.scores(gpu, inputs.query.dtype, padded(max(head_dim, head_dim_v)))
    arguments = inputs.arguments(scoring) | _packing_arguments(inputs.query, inputs.key, scoring) | _blocks(tile)
    launches, lists = plan_lists(inputs.mask_states, tile, seqlens)
    arguments |= lists | {
        "dlse_ptr": dlse, "DLSE": dlse is not None, "HEAD_DIM_V": head_dim_v,
        "sinks_ptr": None if scoring.sinks is None else neighbours(scoring.sinks), "SINKS": scoring.sinks is not None,
        "KEY_MASK": _key_mask(arguments, inputs.mask_states),
    }  # fmt: skip
    del arguments["EXACT"]
    programs = batch * inputs.query.shape[1] * (padded_rows(seqlens[0]) // tile.block_q)
    return [*launches, Launch(attention_exact_rows_kernel, (programs,), arguments, tile.launch_options())]


def plan_dq(
    inputs: BackwardInputs, dq: Tensor, scoring: Scoring, gpu: tiles.Gpu, tiling: Tiling | None = None
) -> list[Launch]:
    arguments = inputs.arguments(scoring) | _whole_rows(inputs.query, inputs.value)
    arguments |= _packing_arguments(inputs.query, inputs.key, scoring)
    arguments |= {
        "dq_ptr": dq,
        **_strides("dq", dq),
        "row_sums_ptr": inputs.row_sums,
        "ROW_SUMS": inputs.row_sums is not None,
        "KEY_MASK": _key_mask(arguments, inputs.mask_states),
        "ONE_WALK": _one_walk(arguments, inputs.mask_states, 256),
    }
    (tile,) = tiling or tiles.dq(gpu, *shape_of_tiles(arguments))
    tile = _with_lengths(tile, arguments)
    batch, *seqlens = scoring.extent(inputs.query, inputs.key)
    programs = batch * dq.shape[1] * ceil_div(seqlens[0], tile.block_q)
    launches, lists = plan_lists(inputs.mask_states, tile, seqlens)
    arguments |= _blocks(tile) | lists
    return [*launches, Launch(attention_dq_kernel, (programs,), arguments, tile.launch_options())]


class RowGradients(NamedTuple):
    """What ``plan_rows`` writes, where asked: shares of the sinks' gradient (batch, heads, shares), and the gradient of
    a mask that broadcasts over keys, (batch, heads, seqlen_q)."""

    dsinks: Tensor | None
    dmask: Tensor | None


def plan_rows(
    inputs: BackwardInputs, dlse: Tensor | None, scoring: Scoring, wants_dsinks: bool, wants_dmask: bool
) -> tuple[Launch, RowGradients]:
    """Corrects delta by the sums of rows, behind ``plan_dq``."""
    batch, seqlen_q, _ = scoring.extent(inputs.query, inputs.key)
    heads, packing, delta = inputs.query.shape[1], scoring.packing, inputs.delta
    block_q = STATISTICS_ROWS.value
    row_tiles = padded_rows(seqlen_q) // block_q
    # Programs past the end of their packed sequence write no share.
    allocate = delta.new_empty if packing is None else delta.new_zeros
    gradients = RowGradients(
        allocate((batch, heads, row_tiles)) if wants_dsinks else None,
        delta.new_empty((batch, heads, seqlen_q)) if wants_dmask else None,
    )
    sinks = None if scoring.sinks is None else neighbours(scoring.sinks)
    arguments = {
        "row_lse_ptr": inputs.row_lse, "delta_ptr": delta, "row_sums_ptr": inputs.row_sums, "dlse_ptr": dlse,
        "sinks_ptr": sinks, "dsinks_ptr": gradients.dsinks, "dmask_ptr": gradients.dmask, "heads": heads,
        "seqlen_q": seqlen_q, "padded_rows": delta.shape[2], "BLOCK_Q": block_q, "DLSE": dlse is not None,
        "ROW_SUMS": inputs.row_sums is not None, "SINKS": sinks is not None, "DSINKS": wants_dsinks,
        "DMASK": wants_dmask, "EXACT": inputs.is_exact, "PACKED": packing is not None,
        "cu_seqlens_q_ptr": None if packing is None else packing.cu_seqlens_q,
        "total_q": None if packing is None else inputs.query.shape[2],
    }  # fmt: skip
    options = Tile(block_q, 0, 4, 1).launch_options()
    return Launch(attention_rows_kernel, (batch * heads * row_tiles,), arguments, options), gradients


def plan_dkdv(
    inputs: BackwardInputs,
    dk: Tensor,
    dv: Tensor,
    scoring: Scoring,
    gpu: tiles.Gpu,
    tiling: Tiling | None = None,
) -> list[Launch]:
    arguments = inputs.arguments(scoring) | _whole_rows(inputs.query, inputs.value)
    arguments |= _packing_arguments(inputs.query, inputs.key, scoring)
    widest = _widest_of_two_walks(gpu) if scoring.packing is None else 0
    arguments |= {
        "dk_ptr": dk, "dv_ptr": dv, **_strides("dk", dk), **_strides("dv", dv),
        "KEY_MASK": _key_mask(arguments, inputs.mask_states),
        "ONE_WALK": _one_walk(arguments, inputs.mask_states, widest),
    }  # fmt: skip
    passes = tiling or tiles.dkdv(gpu, *shape_of_tiles(arguments))
    batch, *seqlens = scoring.extent(inputs.query, inputs.key)
    written = ((True, True),) if len(passes) == 1 else ((False, True), (True, False))
    launches = []
    for tile, (DK, DV) in zip(passes, written, strict=True):
        listing, lists = plan_lists(inputs.mask_states, tile, seqlens, by_keys=True)
        programs = batch * dk.shape[1] * ceil_div(seqlens[1], tile.block_k)
        of_pass = arguments | _blocks(tile) | lists | {"DK": DK, "DV": DV}
        launches += [*listing, Launch(attention_dkdv_kernel, (programs,), of_pass, tile.launch_options())]
    return launches


def plan_dmask(inputs: BackwardInputs, scoring: Scoring, gpu: tiles.Gpu) -> tuple[Launch, Tensor, list[int]]:
    """(launch, what it writes, the dims of that to sum over): (splits, mask_batches, mask_heads, rows, keys)."""
    mask = scoring.attn_mask
    assert mask is not None
    arguments = inputs.arguments(scoring)
    batch, heads, seqlen_q, _ = inputs.query.shape
    seqlen_k = inputs.key.shape[2]
    mask_batches, mask_heads, mask_q, _ = (1,) * (4 - mask.dim()) + tuple(mask.shape)
    head_dim_v = inputs.value.shape[3]
    tile = tiles.scores(gpu, inputs.query.dtype, padded(max(arguments["HEAD_DIM"], head_dim_v)))
    row_tiles, key_tiles = ceil_div(seqlen_q, tile.block_q), ceil_div(seqlen_k, tile.block_k)
    sum_rows = mask_q < seqlen_q

    programs = mask_batches * mask_heads * row_tiles * key_tiles
    shared = (batch // mask_batches) * (heads // mask_heads)
    pairs = ceil_div(shared, max(1, min(shared, _DMASK_PROGRAMS // programs)))
    splits = ceil_div(shared, pairs)
    sums = [dim for dim, summed in ((0, splits > 1), (3, sum_rows)) if summed]
    rows = row_tiles if sum_rows else seqlen_q
    dtype = torch.float32 if sums or mask.dtype == torch.float64 else mask.dtype
    partial = torch.empty(splits, mask_batches, mask_heads, rows, seqlen_k, dtype=dtype, device=mask.device)
    arguments |= {
        "dmask_ptr": partial, "mask_batches": mask_batches, "mask_heads": mask_heads,
        "heads_shared": heads // mask_heads, "batches_shared": batch // mask_batches, "pairs": pairs,
        "SUM_ROWS": sum_rows, **_blocks(tile), "HEAD_DIM_V": head_dim_v,
    }  # fmt: skip
    return Launch(attention_dmask_kernel, (splits * programs,), arguments, tile.launch_options()), partial, sums
