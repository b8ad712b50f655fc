"""How attention's Triton kernels read a mask: through its strides and, where it pays, by lists of its visible tiles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastattn.ops import attention_triton_tiles as tiles
from fastattn.ops.attention_triton_mask_tiles import attention_mask_lists_kernel, attention_mask_states_kernel
from fastattn.ops.attention_triton_scores import MASK_ADD, MASK_BOOL, MASK_NONE
from fastattn.ops.attention_triton_tiles import Tile
from fastattn.ops.triton_launch import Launch

# What attention_mask_states_kernel looks at: the rows and keys of a state, and the states of a program.
_STATE_Q, _STATE_K, _STATES_Q, _STATES_K = 16, 32, 4, 8
# Below so many scores of a (batch, head), two more launches cost more than hidden tiles on the way of one program, and
# below so many of all of them more than those of all programs (floors: csrc/attention/attention_sm80.md).
_LISTED_ELEMENTS, _LISTED_SCORES = 1 << 18, 1 << 26
# A walk over fewer keys has a tile or two.
_LISTED_KEYS = 256
# Of a mask of one row (key padding), a program finds the first and last visible keys by itself, which is all there is
# to skip where only the ends are hidden; from so many scores on, lists also skip what it hides in between.
_LISTED_ELEMENTS_OF_ONE_ROW = 1 << 22
_LIST_CHUNK = 128
_OPTIONS = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def mask_arguments(mask: Tensor | None) -> dict[str, Any]:
    """A mask is read through its strides, 0 where it broadcasts."""
    strides: tuple[int, ...] = (0, 0, 0, 0)
    kind = MASK_NONE
    if mask is not None:
        mask = mask[(None,) * (4 - mask.dim())]
        if mask.dtype == torch.bool:
            mask, kind = mask.view(torch.uint8), MASK_BOOL
        else:
            kind = MASK_ADD
            mask = mask if mask.dtype in (torch.float32, torch.bfloat16, torch.float16) else mask.float()
        strides = tuple(0 if n == 1 else stride for n, stride in zip(mask.shape, mask.stride(), strict=True))
    names = ("stride_mask_batch", "stride_mask_head", "stride_mask_q", "stride_mask_k")
    return {"mask_ptr": mask, "MASK": kind.value, **dict(zip(names, strides, strict=True))}


# --- A mask's visible tiles ------------------------------------------------------------------------------------------


def plan_mask_states(
    query: Tensor, value: Tensor, attn_mask: Tensor | None, gpu: tiles.Gpu
) -> tuple[list[Launch], Tensor | None]:
    """(launches, what they write), for ``plan_lists``; none where it would not pay.

    The states are (mask_batches, mask_heads, row states, key states) bytes (attention_triton_mask_tiles.py).
    """
    mask = mask_arguments(attn_mask)
    (batch, heads, seqlen_q, _), seqlen_k = query.shape, value.shape[2]
    if attn_mask is None:
        return [], None
    scores = seqlen_q * seqlen_k
    if mask["stride_mask_q"] == 0:
        pays = scores >= _LISTED_ELEMENTS_OF_ONE_ROW
    else:
        many = seqlen_k >= _LISTED_KEYS and batch * heads * scores >= _LISTED_SCORES
        pays = many or scores >= _LISTED_ELEMENTS or gpu is tiles.INTERPRETER
    if not pays:
        return [], None
    mask_batches = 1 if mask["stride_mask_batch"] == 0 else batch
    mask_heads = 1 if mask["stride_mask_head"] == 0 else heads
    rows, cols = ceil_div(seqlen_q, _STATE_Q), ceil_div(seqlen_k, _STATE_K)
    states = torch.empty(mask_batches, mask_heads, rows, cols, dtype=torch.int8, device=query.device)
    arguments = mask | {
        "states_ptr": states, "mask_heads": mask_heads, "seqlen_q": seqlen_q, "seqlen_k": seqlen_k, "rows": rows,
        "cols": cols, "STATE_Q": _STATE_Q, "STATE_K": _STATE_K, "STATES_Q": _STATES_Q, "STATES_K": _STATES_K,
    }  # fmt: skip
    programs = mask_batches * mask_heads * ceil_div(rows, _STATES_Q) * ceil_div(cols, _STATES_K)
    return [Launch(attention_mask_states_kernel, (programs,), arguments, _OPTIONS)], states


class _Side(NamedTuple):
    """The rows or the keys of a mask, in tiles and in states."""

    seqlen: int
    block: int
    states: int
    stride: int  # of its states
    states_of_tile: int

    @property
    def tiles(self) -> int:
        return ceil_div(self.seqlen, self.block)


def plan_lists(
    mask_states: Tensor | None, tile: Tile, seqlens: Sequence[int], by_keys: bool = False
) -> tuple[list[Launch], dict[str, Any]]:
    """(launches, what they give the kernel of these tiles: the keys that its rows see or, ``by_keys``, the reverse)."""
    if mask_states is None:
        return [], {"lists_ptr": None, "stride_lists_batch": 0, "stride_lists_head": 0, "LISTED": False}
    mask_batches, mask_heads, rows, cols = mask_states.shape
    own = _Side(seqlens[0], tile.block_q, rows, cols, tile.block_q // _STATE_Q)
    walk = _Side(seqlens[1], tile.block_k, cols, 1, tile.block_k // _STATE_K)
    if by_keys:
        own, walk = walk, own
    shape = (mask_batches, mask_heads, own.tiles, 2 * walk.tiles + 1)
    lists = torch.empty(shape, dtype=torch.int32, device=mask_states.device)
    arguments = {
        "states_ptr": mask_states, "lists_ptr": lists, "stride_own": own.stride, "stride_walk": walk.stride,
        "states_own": own.states, "states_walk": walk.states, "own_tiles": own.tiles, "walk_tiles": walk.tiles,
        "OWN": own.states_of_tile, "WALK": walk.states_of_tile, "WALK_BLOCK": walk.block, "CHUNK": _LIST_CHUNK,
    }  # fmt: skip
    launch = Launch(attention_mask_lists_kernel, (mask_batches * mask_heads * own.tiles,), arguments, _OPTIONS)
    return [launch], {
        "lists_ptr": lists,
        "stride_lists_batch": 0 if mask_batches == 1 else lists.stride(0),
        "stride_lists_head": 0 if mask_heads == 1 else lists.stride(1),
        "LISTED": True,
    }
