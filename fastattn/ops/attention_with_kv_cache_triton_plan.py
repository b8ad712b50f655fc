"""From a step of decoding to launches of its Triton kernels: tiles, parts of the keys, arguments.

Plans work on meta tensors too: tests compile the planned launches for GPUs that are not there.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastattn.ops import attention_triton_tiles as tiles
from fastattn.ops import attention_triton_tuning as tuning
from fastattn.ops.attention_triton import rows_of
from fastattn.ops.attention_triton_mask import ceil_div
from fastattn.ops.attention_triton_plan import LOG2_E, Scoring, allows_tf32, padded, plan_forward
from fastattn.ops.attention_with_kv_cache_triton_kernels import (
    attention_cached_kernel,
    combine_parts_kernel,
    kv_append_kernel,
)
from fastattn.ops.triton_launch import Launch, device_of, neighbours

# Programs for each multiprocessor that the keys are parted to reach, and how few tiles of keys a part has.
_PROGRAMS, _PART_TILES = 2, 2
_MAX_PARTS = 64  # a power of two
# Queries from which on the forward's own tiles are worth more than heads that share keys in one tile.
_PROMPT = 64
# Rows of new tokens' heads that one program copies: of 64 elements, 32 a thread.
_APPEND_ELEMENTS, _APPEND_WARPS = 4096, 4


class Cache(NamedTuple):
    """Caches of keys and values, (entries, block_size, heads_kv, head_dim), and where a sequence's tokens are."""

    key: Tensor
    value: Tensor
    lengths: Tensor | None  # before the append; None: ``length`` of every sequence
    length: int
    appended: int
    table: Tensor | None  # None: an entry is a sequence

    @property
    def block_size(self) -> int:
        return self.key.shape[1]

    @property
    def capacity(self) -> int:
        if self.table is None:
            return self.block_size
        return self.table.shape[1] * self.block_size if self.key.shape[0] > 0 else 0

    @property
    def longest(self) -> int:
        """Keys of a sequence at most, as far as the host knows."""
        return self.capacity if self.lengths is not None else self.length + self.appended

    def arguments(self) -> dict[str, Any]:
        lengths, table = self.lengths, self.table
        return {
            "k_ptr": self.key, "v_ptr": self.value, "lengths_ptr": lengths, "table_ptr": table,
            **_strides("k", self.key, "entry"), **_strides("v", self.value, "entry"),
            "stride_length": 0 if lengths is None else lengths.stride(0),
            "stride_table": 0 if table is None else table.stride(0),
            "stride_block": 0 if table is None else table.stride(1),
            "length": self.length, "appended": self.appended, "capacity": self.capacity,
            "block_size": self.block_size, "entries": self.key.shape[0],
            "PAGED": table is not None, "LENGTHS": lengths is not None,
        }  # fmt: skip


class Rotation(NamedTuple):
    cos: Tensor  # (positions, rotary_dim / 2)
    sin: Tensor
    interleaved: bool


class Scores(NamedTuple):
    """What shapes the scores, in the order of the op's schema."""

    alibi_slopes: Tensor | None
    sinks: Tensor | None
    is_causal: bool
    scale: float
    window_left: int
    window_right: int
    softcap: float


def _strides(name: str, tensor: Tensor, outer: str = "batch") -> dict[str, int]:
    """Of (batch, tokens, heads, head_dim)."""
    batch, token, head, _ = tensor.stride()
    return {f"stride_{name}_{outer}": batch, f"stride_{name}_head": head, f"stride_{name}_token": token}


def run_step(
    query: Tensor, fresh: tuple[Tensor, Tensor] | None, cache: Cache, rotation: Rotation | None, out: Tensor,
    lse: Tensor, scores: Scores,
) -> None:  # fmt: skip
    """Appends ``fresh``, the new keys and values, and writes out (batch, seqlen_q, heads, head_dim_v) and lse."""
    if fresh is not None or (rotation is not None and query.numel() > 0):
        launch, query = plan_append(query, fresh, cache, rotation)
        launch.run(query)
    if lse.numel() == 0:
        return
    if cache.lengths is None and cache.table is None and query.shape[1] >= _PROMPT:
        _run_forward(query, cache, out, lse, scores)
        return
    gpu, multiprocessors = tiles.gpu_of(query), device_of(query).multiprocessors
    for launch in plan_attention(query, cache, out, lse, scores, gpu, multiprocessors):
        launch.run(query)


def _run_forward(query: Tensor, cache: Cache, out: Tensor, lse: Tensor, scores: Scores) -> None:
    """A prompt whose keys are in one piece, as the host knows, is general attention, with its larger tiles."""
    slopes, sinks, is_causal, scale, left, right, softcap = scores
    call = Scoring(None, slopes, sinks, None, 0.0, is_causal, scale, left, right, True, softcap)
    keys, values = (x[:, : cache.longest].transpose(1, 2) for x in (cache.key, cache.value))
    operands = rows_of(query.transpose(1, 2)), rows_of(keys), rows_of(values), out.transpose(1, 2)
    tuning.run(query, plan_forward, *operands, lse, call, None)


def plan_append(
    query: Tensor, fresh: tuple[Tensor, Tensor] | None, cache: Cache, rotation: Rotation | None
) -> tuple[Launch, Tensor]:
    """(launch, the query that attends: rotated, if there is a rotation)."""
    batch, seqlen_q, heads, head_dim = query.shape
    heads_kv, head_dim_v = cache.value.shape[2:]
    key, value = fresh if fresh is not None else (cache.key, cache.value)
    rotated = query if rotation is None else torch.empty(query.shape, dtype=query.dtype, device=query.device)
    cos, sin = (None, None) if rotation is None else (rotation.cos, rotation.sin)
    block_d, block_dv = padded(head_dim), padded(head_dim_v)
    block_rows = max(1, _APPEND_ELEMENTS // max(block_d, block_dv))
    arguments = cache.arguments() | {
        "q_ptr": query, "rotated_ptr": rotated, "key_ptr": key, "value_ptr": value, "cos_ptr": cos, "sin_ptr": sin,
        **_strides("q", query), **_strides("rotated", rotated), **_strides("key", key), **_strides("value", value),
        "stride_cos": 0 if cos is None else cos.stride(0), "stride_sin": 0 if sin is None else sin.stride(0),
        "heads": heads, "heads_kv": heads_kv, "seqlen_q": seqlen_q, "positions": 0 if cos is None else cos.shape[0],
        "HEAD_DIM": head_dim, "HEAD_DIM_V": head_dim_v, "BLOCK_D": block_d, "BLOCK_DV": block_dv,
        "BLOCK_ROWS": block_rows, "ROTARY_DIM": 0 if cos is None else 2 * cos.shape[1],
        "INTERLEAVED": rotation is not None and rotation.interleaved, "APPENDS": fresh is not None,
    }  # fmt: skip
    rows = max(cache.appended * heads_kv if fresh is not None else 0, seqlen_q * heads if rotation is not None else 0)
    row_tiles = ceil_div(rows, block_rows)
    options = {"num_warps": _APPEND_WARPS, "num_stages": 1, "enable_fp_fusion": True}
    return Launch(kv_append_kernel, (row_tiles * 3 * batch,), arguments | {"row_tiles": row_tiles}, options), rotated


def plan_attention(
    query: Tensor,
    cache: Cache,
    out: Tensor,
    lse: Tensor,
    scores: Scores,
    gpu: tiles.Gpu,
    multiprocessors: int,
) -> list[Launch]:
    """Writes out and lse: parts of the keys first, and what joins them, where rows alone leave the GPU idle."""
    batch, seqlen_q, heads, head_dim = query.shape
    heads_kv, head_dim_v = cache.value.shape[2:]
    rows = seqlen_q * heads // max(heads_kv, 1)
    block_d, block_dv = padded(head_dim), padded(head_dim_v)
    tile = tiles.cached(gpu, query.dtype, max(block_d, block_dv), rows)
    programs = batch * heads_kv * ceil_div(rows, tile.block_q)
    splits = _parts(programs, ceil_div(cache.longest, tile.block_k), multiprocessors)
    part_out, part_lse = out, lse
    if splits > 1:
        part_out = torch.empty(splits, *out.shape, dtype=torch.float32, device=out.device)
        part_lse = torch.empty(splits, *lse.shape, dtype=torch.float32, device=out.device)
    arguments = _score_arguments(query, cache, scores) | cache.arguments()
    arguments |= {
        "q_ptr": query, "out_ptr": part_out, "lse_ptr": part_lse, **_strides("q", query), "splits": splits,
        "HEAD_DIM": head_dim, "HEAD_DIM_V": head_dim_v, "BLOCK_D": block_d, "BLOCK_DV": block_dv,
        "BLOCK_Q": tile.block_q, "BLOCK_K": tile.block_k, "SLICE": tile.head_dim_slice,
        # Where few rows read many keys, memory takes the time, not comparisons. The widest heads leave no registers.
        "ONE_WALK": rows <= 32 or block_dv > 128 or not _is_plain(scores),
        "ONE_BLOCK": cache.table is not None and cache.block_size % tile.block_k == 0,
    }  # fmt: skip
    launches = [Launch(attention_cached_kernel, (programs * splits,), arguments, tile.launch_options())]
    if splits > 1:
        arguments = {
            "part_out_ptr": part_out, "part_lse_ptr": part_lse, "out_ptr": out, "lse_ptr": lse, "heads": heads,
            "seqlen_q": seqlen_q, "splits": splits, "HEAD_DIM_V": head_dim_v, "BLOCK_DV": block_dv,
            "BLOCK_SPLITS": _MAX_PARTS,
        }  # fmt: skip
        options = {"num_warps": 1 if block_dv <= 64 else 2, "num_stages": 1, "enable_fp_fusion": True}
        launches.append(Launch(combine_parts_kernel, (batch * seqlen_q * heads,), arguments, options))
    return launches


def _parts(programs: int, key_tiles: int, multiprocessors: int) -> int:
    wanted = _PROGRAMS * multiprocessors // programs
    return max(1, min(wanted, key_tiles // _PART_TILES, _MAX_PARTS))


def _is_plain(scores: Scores) -> bool:
    return scores.scale > 0 and scores.softcap == 0 and scores.alibi_slopes is None and scores.sinks is None


def _score_arguments(query: Tensor, cache: Cache, scores: Scores) -> dict[str, Any]:
    heads, heads_kv = query.shape[2], cache.key.shape[2]
    slopes, sinks = (
        None if numbers is None else neighbours(numbers) for numbers in (scores.alibi_slopes, scores.sinks)
    )
    plain = _is_plain(scores)
    # A side of the window that reaches past every key limits nothing.
    longest = query.shape[1] + cache.capacity
    right = 0 if scores.is_causal else scores.window_right
    return {
        "alibi_ptr": slopes, "sinks_ptr": sinks,
        "stride_alibi_batch": slopes.stride(0) if slopes is not None and slopes.dim() == 2 else 0,
        "heads": heads, "group": heads // max(heads_kv, 1), "seqlen_q": query.shape[1],
        "window_left": min(max(scores.window_left, 0), longest), "window_right": min(max(right, 0), longest),
        "LEFT": 0 <= scores.window_left < longest, "RIGHT": 0 <= right < longest,
        "scale": scores.scale, "unit": scores.scale * LOG2_E if plain else LOG2_E, "softcap": scores.softcap,
        "ALIBI": slopes is not None, "SOFTCAP": scores.softcap > 0, "SINKS": sinks is not None, "PLAIN": plain,
        "PRECISION": "tf32" if allows_tf32(query) else "ieee",
    }  # fmt: skip
