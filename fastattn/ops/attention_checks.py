"""What the arguments of the attention ops mean, checked: errors name op, argument, what was expected and what came.

Every call pays for the checks, so they are quick comparisons; what is wrong is looked for only when one fails.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from numbers import Integral
from typing import Any, NoReturn

import torch
from torch import Tensor

from fastattn.ops.tensor_checks import FLOATING, check_dense, check_number, check_probability

_NAMES = "query", "key", "value"

# By op, what to do with nested operands.
_FOR_NESTED = {
    "attention": "call varlen_attention with the .values() and .offsets() of one of layout torch.jagged, or pad it "
    "with .to_padded_tensor(0.0) and mask the padding",
    "varlen_attention": "of one of layout torch.jagged pass .values(), and .offsets() as cu_seqlens",
}

# torch.compile of PyTorch 2.11 cannot trace torch.amp.is_autocast_available.
_AUTOCAST_DEVICES = tuple(filter(torch.amp.is_autocast_available, ("cpu", "cuda", "xpu", "mps", "hpu", "mtia", "xla")))


def autocast_is_on(device: torch.device) -> bool:
    """``torch.is_autocast_enabled`` raises for devices that have no autocast, such as meta."""
    return device.type in _AUTOCAST_DEVICES and torch.is_autocast_enabled(device.type)


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """A context in which torch.autocast rounds no product to 16 bits."""
    return torch.autocast(device.type, enabled=False) if autocast_is_on(device) else nullcontext()


def operands(
    op: str, query: Any, key: Any, value: Any, names: tuple[str, str, str] = _NAMES
) -> tuple[Tensor, Tensor, Tensor]:
    """query, key and value, converted if torch.autocast is on: floating tensors of one dtype on one device."""
    if not (isinstance(query, Tensor) and isinstance(key, Tensor) and isinstance(value, Tensor)):
        name, other = next(
            pair for pair in zip(names, (query, key, value), strict=True) if not isinstance(pair[1], Tensor)
        )
        raise TypeError(f"{op}: {name} must be a Tensor, got {type(other).__name__}.")
    if autocast_is_on(query.device):
        query, key, value = _autocast(query), _autocast(key), _autocast(value)
    if not (query.dtype == key.dtype == value.dtype and query.device == key.device == value.device):
        _raise_mixed(op, query, ((names[1], key), (names[2], value)))
    dense = query.layout == key.layout == value.layout == torch.strided
    if not dense or query.is_nested or key.is_nested or value.is_nested:
        for name, operand in zip(names, (query, key, value), strict=True):
            check_dense(op, name, operand, _FOR_NESTED.get(op, ""))
    if query.dtype not in FLOATING:
        raise TypeError(f"{op}: query must be float32, float16, bfloat16 or float64, got {name_of(query.dtype)}.")
    return query, key, value


# Wider than any sequence, and what an int64 of the kernels holds.
_WIDEST_WINDOW = 2**62


def flag(op: str, name: str, value: Any) -> None:
    """That ``value`` is a bool; compiled code's symbolic one, 0 and 1, and NumPy's stand for themselves."""
    if not isinstance(value, (bool, int, torch.SymBool)) and type(value).__name__ not in ("bool_", "bool"):
        raise TypeError(f"{op}: {name} must be True or False, got {type(value).__name__}.")


def whole_number(value: Any) -> Any:
    """An int for what stands for one: NumPy's integers, and compiled code's symbolic ones as they are. None for others,
    and for bool."""
    if isinstance(value, (int, torch.SymInt)):
        return None if isinstance(value, bool) else value
    return int(value) if isinstance(value, Integral) else None


def options(
    op: str, head_dim: int, dropout_p: float, scale: float | None, softcap: float, window: Any, alignment: str
) -> tuple[float, int, int]:
    """(scale, window_left, window_right)."""
    if head_dim < 1:
        raise ValueError(f"{op}: query must have a head_dim of at least 1, got 0.")
    if scale is None:
        scale = head_dim**-0.5
    else:
        check_number(op, "scale", scale, "fold a tensor into query", kind="a number or None")
    check_probability(op, "dropout_p", dropout_p)
    check_number(op, "softcap", softcap, "0 switches it off")
    if softcap != 0.0 and not 1e-37 <= softcap <= 1e38:
        # Beyond, it or its reciprocal is not finite in float32, in base 2, and the scores would be NaN.
        raise ValueError(f"{op}: softcap must be 0 (none) or a number from 1e-37 to 1e38, got {softcap}.")
    if alignment != "top_left" and alignment != "bottom_right":
        raise ValueError(f"{op}: alignment must be 'top_left' or 'bottom_right', got {alignment!r}.")
    return float(scale), *window_sides(op, window)


def window_sides(op: str, window: Any) -> tuple[int, int]:
    """(window_left, window_right), -1 where there is no limit."""
    if window is None:
        return -1, -1
    valid = isinstance(window, (tuple, list)) and len(window) == 2
    if not (valid and all(isinstance(side, Integral) and int(side) >= -1 for side in window)):
        raise ValueError(
            f"{op}: window must be (left, right), two integers >= -1, with -1 for no limit; got {window!r}. "
            "For no window pass None."
        )
    return min(int(window[0]), _WIDEST_WINDOW), min(int(window[1]), _WIDEST_WINDOW)


def attn_mask(
    op: str, mask: Any, query: Tensor, scores: tuple[int, ...], lead: tuple[int, ...] | None = None
) -> Tensor:
    """The mask with at most 4 dims; ``scores`` is (batch, heads, seqlen_q, seqlen_k)."""
    if not isinstance(mask, Tensor) or not (mask.dtype == torch.bool or mask.is_floating_point()):
        got = name_of(mask.dtype) if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(
            f"{op}: attn_mask must be a bool Tensor (True = attend) or a floating one (added to the scores), "
            f"got {got}; convert 0/1 masks with .bool()."
        )
    check_dense(op, "attn_mask", mask)
    if mask.device != query.device:
        raise ValueError(f"{op}: query is on {query.device} but attn_mask on {mask.device}; move it there.")
    expected = scores if lead is None else (*lead, *scores[2:])
    shape = mask.shape
    if len(shape) > len(expected) or any(
        size not in (1, full) for size, full in zip(reversed(shape), reversed(expected), strict=False)
    ):
        raise ValueError(f"{op}: attn_mask {tuple(shape)} does not broadcast to the scores, {tuple(expected)}.")
    if lead is None or len(shape) <= 3:
        return mask
    # More leading dims than one batch: merge them.
    mask = mask[(None,) * (len(expected) - len(shape))]
    return mask.expand(*lead[:-1], *mask.shape[-3:]).reshape(scores[0], *mask.shape[-3:])


def alibi_slopes(
    op: str, slopes: Any, query: Tensor, batch_and_heads: tuple[int, int], lead: tuple[int, ...] | None = None
) -> Tensor:
    """(heads,) or (batch, heads); ``lead`` = (batch..., heads) of a call that had more leading dims."""
    _floating_on_device(op, "alibi_slopes", slopes, query)
    batch, heads = batch_and_heads
    if slopes.shape == (heads,) or slopes.shape == (batch, heads):
        return slopes
    if lead and tuple(slopes.shape) == lead:
        return slopes.reshape(batch, heads)
    raise ValueError(
        f"{op}: alibi_slopes must be (heads,) = ({heads},) or (batch, heads) = ({batch}, {heads}), "
        f"got shape {tuple(slopes.shape)}."
    )


def sinks(op: str, sinks: Any, query: Tensor, heads: int) -> Tensor:
    _floating_on_device(op, "sinks", sinks, query)
    if sinks.shape != (heads,):
        raise ValueError(f"{op}: sinks must be (heads,) = ({heads},), got shape {tuple(sinks.shape)}.")
    return sinks


def _floating_on_device(op: str, name: str, tensor: Any, query: Tensor) -> None:
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        got = name_of(tensor.dtype) if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(f"{op}: {name} must be a floating Tensor, got {got}.")
    check_dense(op, name, tensor)
    if tensor.device != query.device:
        raise ValueError(f"{op}: query is on {query.device} but {name} on {tensor.device}; move it there.")


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _autocast(operand: Tensor) -> Tensor:
    """What torch.autocast does to SDPA's operands: everything floating but float64 to the lower precision."""
    if not operand.is_floating_point() or operand.dtype == torch.float64:
        return operand
    return operand.to(torch.get_autocast_dtype(operand.device.type))


def _raise_mixed(op: str, query: Tensor, others: tuple[tuple[str, Tensor], ...]) -> NoReturn:
    for name, other in others:
        if other.device != query.device:
            raise ValueError(f"{op}: query is on {query.device} but {name} on {other.device}; move them to one device.")
        if other.dtype != query.dtype:
            raise TypeError(
                f"{op}: query is {name_of(query.dtype)} but {name} {name_of(other.dtype)}; convert them to one dtype."
            )
    raise AssertionError("operands agree")


def broadcast(
    op: str, query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool
) -> tuple[Tensor, Tensor, Tensor, tuple[int, ...] | None]:
    """4-dim operands by SDPA's rules: heads are the third dim from the end, leading dims and one head broadcast."""
    operands = {"query": query, "key": key, "value": value}
    for name, operand in operands.items():
        if operand.dim() < 2:
            raise ValueError(f"{op}: {name} must have at least 2 dims (seqlen, head_dim), got {tuple(operand.shape)}.")
    if query.shape[-1] != key.shape[-1]:
        raise ValueError(
            f"{op}: query has head_dim {query.shape[-1]} but key has head_dim {key.shape[-1]} "
            f"(key: {tuple(key.shape)}); they must be equal."
        )
    if key.shape[-2] != value.shape[-2]:
        raise ValueError(
            f"{op}: key has seqlen {key.shape[-2]} but value has seqlen {value.shape[-2]} "
            f"(value: {tuple(value.shape)}); they must be equal."
        )

    dims = max(operand.dim() for operand in operands.values())
    heads, heads_k, heads_v = (x.shape[-3] if x.dim() > 2 else 1 for x in (query, key, value))
    heads_kv = heads_k if heads_v == 1 else heads_v
    if heads_k not in (1, heads_kv):
        raise ValueError(f"{op}: key has {heads_k} heads but value has {heads_v}; they must be equal.")
    heads = heads_kv if heads == 1 else heads
    if heads != heads_kv and heads_kv != 1:
        if not enable_gqa:
            raise ValueError(
                f"{op}: query has {heads} heads but key and value have {heads_kv}; "
                "pass enable_gqa=True to share each of theirs among several query heads."
            )
        if heads_kv == 0 or heads % heads_kv:
            raise ValueError(
                f"{op}: query has {heads} heads, which is not a multiple of the {heads_kv} heads of key and value."
            )
    try:
        batch = torch.broadcast_shapes(*(operand.shape[:-3] for operand in operands.values()))
    except RuntimeError:
        shapes = ", ".join(f"{name} {tuple(operand.shape)}" for name, operand in operands.items())
        raise ValueError(f"{op}: the leading dims must be equal or 1, got {shapes}.") from None

    def expand(operand: Tensor, operand_heads: int) -> Tensor:
        expanded = operand.expand(*batch, operand_heads, *operand.shape[-2:])
        if len(batch) == 1:
            return expanded
        return expanded.reshape(math.prod(batch), *expanded.shape[-3:]) if batch else expanded[None]

    lead = None if dims == 4 else (*batch, heads) if dims > 2 else ()
    return expand(query, heads), expand(key, heads_kv), expand(value, heads_kv), lead


def restore(result: Tensor, lead: tuple[int, ...]) -> Tensor:
    """(batch, heads, ...) with the caller's leading dims (batch..., heads)."""
    if len(lead) == 0:
        return result[0, 0]
    return result[0] if len(lead) == 1 else result.unflatten(0, lead[:-1])


def heads_and_dims(
    op: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: str,
    heads_dim: int,
    names: tuple[str, str, str] = _NAMES,
) -> None:
    """That operands in ``layout`` have its dims, one head_dim, and heads that are a multiple of those of key."""
    _, key_name, value_name = names
    for name, operand in zip(names, (query, key, value), strict=True):
        if operand.dim() != layout.count(",") + 1:
            raise ValueError(f"{op}: {name} must be {layout}, got shape {tuple(operand.shape)}.")
    if query.shape[-1] != key.shape[-1]:
        raise ValueError(
            f"{op}: query has head_dim {query.shape[-1]} but {key_name} has head_dim {key.shape[-1]} "
            f"({key_name}: {tuple(key.shape)}); they must be equal."
        )
    heads, heads_kv = query.shape[heads_dim], key.shape[heads_dim]
    if value.shape[heads_dim] != heads_kv:
        raise ValueError(
            f"{op}: {key_name} has {heads_kv} heads but {value_name} has {value.shape[heads_dim]}; they must be equal."
        )
    if heads != heads_kv and (heads_kv == 0 or heads % heads_kv):
        raise ValueError(
            f"{op}: query has {heads} heads, which is not a multiple of the {heads_kv} heads of {key_name}."
        )


def integers_on_device(op: str, name: str, tensor: Any, query: Tensor) -> None:
    if not isinstance(tensor, Tensor) or tensor.dtype not in (torch.int32, torch.int64):
        got = name_of(tensor.dtype) if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(f"{op}: {name} must be an int32 or int64 Tensor, got {got}.")
    check_dense(op, name, tensor)
    if tensor.device != query.device:
        raise ValueError(f"{op}: query is on {query.device} but {name} on {tensor.device}; move it there.")


def sequence_lengths(op: str, name: str, cu_seqlens: Tensor, max_seqlen: int, total: int) -> None:
    """Raises where the values of ``cu_seqlens``, on the CPU, do not fit ``max_seqlen`` and ``total`` rows."""
    if cu_seqlens[0] != 0:
        raise ValueError(f"{op}: {name} must start with 0, got {int(cu_seqlens[0])}.")
    lengths = cu_seqlens.diff()
    if (lengths < 0).any():
        raise ValueError(f"{op}: {name} must not fall, but sequence {int(lengths.argmin())} has a negative length.")
    if cu_seqlens[-1] > total:
        raise ValueError(f"{op}: {name} ends at {int(cu_seqlens[-1])}, but there are only {total} rows.")
    if lengths.numel() and lengths.max() > max_seqlen:
        raise ValueError(
            f"{op}: max_seqlen_{name[-1]} is {max_seqlen}, but sequence {int(lengths.argmax())} of {name} has "
            f"{int(lengths.max())} rows; pass at least that."
        )


def cache_length(op: str, length: int, new: int, rotated: int, capacity: int, positions: int) -> None:
    """A sequence's length before ``new`` tokens go to its cache. ``positions``: as of ``cache_values``."""
    if length < 0:
        raise ValueError(f"{op}: cache_seqlens must be >= 0, got {length}.")
    if length + new > capacity:
        raise ValueError(f"{op}: cache_seqlens {length} and {new} new tokens exceed the cache, which holds {capacity}.")
    if 0 <= positions < length + rotated:
        raise ValueError(
            f"{op}: rotary_cos has {positions} positions, but {length + rotated} are needed "
            f"(cache_seqlens {length} and {rotated} tokens)."
        )


def cache_values(
    op: str, lengths: Tensor, block_table: Tensor | None, new: int, rotated: int, capacity: int,
    cache_shape: Sequence[int], positions: int,
) -> None:  # fmt: skip
    """Reads what lengths and tables hold: for the CPU, where that is no synchronisation.

    Args:
        new, rotated: how many tokens are appended, and how many positions from the old length on are rotated.
        capacity: tokens that a sequence's part of the cache can hold.
        cache_shape: (blocks, block_size, ...).
        positions: rows of the rotation's tables, or -1 if there is no rotation.
    """
    if lengths.numel() == 0:
        return
    cache_length(op, int(lengths.min()), new, rotated, capacity, -1)
    cache_length(op, int(lengths.max()), new, rotated, capacity, positions)
    if block_table is None:
        return
    blocks, block_size, *_ = cache_shape
    used = torch.arange(block_table.shape[1]) * block_size < (lengths + new)[:, None]
    outside = used & ((block_table < 0) | (block_table >= blocks))
    if outside.any():
        b, i = outside.nonzero()[0].tolist()
        raise ValueError(
            f"{op}: block_table[{b}, {i}] is {int(block_table[b, i])}, but key_cache has blocks 0 to {blocks - 1}."
        )
