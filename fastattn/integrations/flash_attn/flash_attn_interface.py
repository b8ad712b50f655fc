"""The seven functions of flash-attn 2 (``flash_attn.flash_attn_interface``) over fastattn's ops.

Layouts are (batch, seqlen, heads, head_dim) and (total, heads, head_dim). When the lengths differ, ``causal``,
``window_size`` and ``alibi_slopes`` count from the bottom right: the last query stands at the last key.
``softmax_scale=None`` is ``head_dim ** -0.5``; ``window_size=(-1, -1)`` is no window; ``dropout_p`` counts whatever the
mode of the model. ``return_attn_probs=True`` returns three tensors:

- the output;
- the log-sum-exp, float32 (float64 for float64), (batch, heads, seqlen_q) or, packed, (heads, total_q);
- with dropout, the probabilities before dropout, (batch, heads, seqlen_q, seqlen_k), negative where they were dropped;
  without, an empty tensor. (This costs the memory of the scores; packed sequences refuse it.)

What differs from flash-attn:

- Any device, float32 and float64 too, any head_dim up to 256 and more on ``eager``, softcap together with dropout.
- A row that may attend to nothing has log-sum-exp -inf; its output is 0, as there. The log-sum-exp is differentiable.
- Dropout keeps other elements for the same seed.
- ``deterministic`` and ``num_splits`` are accepted and change nothing: our backward is deterministic, on Hopper under
  ``torch.use_deterministic_algorithms(True)``, and how the work of a long cache is split is the kernel's affair.
- ``block_table`` of ``flash_attn_varlen_func`` is refused; ``flash_attn_with_kvcache`` takes one, of any block size.
"""

from __future__ import annotations

from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from fastattn.dispatch import select
from fastattn.ops import attention as attention_ops
from fastattn.ops import attention_checks as checks
from fastattn.ops.attention import attention
from fastattn.ops.attention_with_kv_cache import _append, _prepare, _rotate, attention_with_kv_cache, kv_cache_positions
from fastattn.ops.philox import draw_rng_state, dropout_mask
from fastattn.ops.tensor_checks import check_tensor
from fastattn.ops.varlen_attention import varlen_attention

Result = Tensor | tuple[Tensor, Tensor, Tensor]


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """Attention of q (batch, seqlen_q, heads, head_dim) over k and v (batch, seqlen_k, heads_kv, head_dim).

    Returns: (batch, seqlen_q, heads, head_dim), or three tensors; this module's docstring says which.
    """
    _check_operands("flash_attn_func", "(batch, seqlen, heads, head_dim)", q=q, k=k, v=v)
    options = _options(softmax_scale, causal, window_size, softcap, alibi_slopes)
    options |= {"alignment": "bottom_right", "enable_gqa": True}
    query, key, value = (x.transpose(1, 2) for x in (q, k, v))
    if return_attn_probs and dropout_p > 0:
        out, lse, probabilities = _with_probabilities(query, key, value, dropout_p, options)
        return out.transpose(1, 2), lse, probabilities
    result = attention(query, key, value, dropout_p=dropout_p, return_lse=return_attn_probs, **options)
    if isinstance(result, Tensor):
        return result.transpose(1, 2)
    return result[0].transpose(1, 2), result[1], q.new_empty(0)


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """``flash_attn_func`` with kv (batch, seqlen_k, 2, heads_kv, head_dim)."""
    k, v = _unpack("flash_attn_kvpacked_func", "(batch, seqlen_k, 2, heads_kv, head_dim)", kv=kv)
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """``flash_attn_func`` with qkv (batch, seqlen, 3, heads, head_dim)."""
    q, k, v = _unpack("flash_attn_qkvpacked_func", "(batch, seqlen, 3, heads, head_dim)", qkv=qkv)
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Result:
    """Attention within sequences packed as q (total_q, heads, head_dim), k and v (total_k, heads_kv, head_dim).

    Args:
        cu_seqlens_q, cu_seqlens_k: (batch + 1,) int32, where each sequence starts and the last one ends.
        max_seqlen_q, max_seqlen_k: ints, no less than the longest sequence.
        block_table: must be None; ``flash_attn_with_kvcache`` takes one.
    Returns: (total_q, heads, head_dim), or three tensors; this module's docstring says which.
    """
    if block_table is not None:
        raise NotImplementedError(
            "flash_attn_varlen_func: block_table is not supported; use flash_attn_with_kvcache for paged keys."
        )
    if return_attn_probs and dropout_p > 0:
        raise NotImplementedError(
            "flash_attn_varlen_func: return_attn_probs with dropout_p > 0 is not supported for packed sequences; use "
            "flash_attn_func, or dropout_p=0 to get the log-sum-exp."
        )
    result = varlen_attention(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=dropout_p,
        return_lse=return_attn_probs, **_options(softmax_scale, causal, window_size, softcap, alibi_slopes),
    )  # fmt: skip
    return result if isinstance(result, Tensor) else (*result, q.new_empty(0))


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """``flash_attn_varlen_func`` with kv (total_k, 2, heads_kv, head_dim)."""
    k, v = _unpack("flash_attn_varlen_kvpacked_func", "(total_k, 2, heads_kv, head_dim)", kv=kv)
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal, window_size,
        softcap, alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """``flash_attn_varlen_func`` with qkv (total, 3, heads, head_dim)."""
    q, k, v = _unpack("flash_attn_varlen_qkvpacked_func", "(total, 3, heads, head_dim)", qkv=qkv)
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, dropout_p, softmax_scale, causal, window_size,
        softcap, alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip


@torch.no_grad()
def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Appends k and v to the caches in place and attends to what they hold. No gradients.

    Args:
        q: (batch, seqlen_q, heads, head_dim).
        k_cache, v_cache: (batch_cache, seqlen_cache, heads_kv, head_dim), or with ``block_table`` (blocks, block_size,
            heads_kv, head_dim).
        k, v: (batch, seqlen_new, heads_kv, head_dim), or neither.
        rotary_cos, rotary_sin: (positions, rotary_dim / 2). New key i is rotated at position ``cache_seqlens + i``;
            query i too if ``causal`` or a window is set, else all queries at ``cache_seqlens``.
        cache_seqlens: tokens in the cache before the append, int or (batch,) int32; without k the default is all.
        cache_batch_idx: (batch,), which row of the caches belongs to each sequence; default the first ``batch``.
        cache_leftpad: (batch,), where each sequence starts in its cache; ``cache_seqlens`` counts from 0 nevertheless.
        block_table: (batch, blocks_per_sequence) int32, the blocks of each sequence.
        rotary_interleaved: rotate neighbouring elements together (GPT-J), else halves (GPT-NeoX).

    Returns: (batch, seqlen_q, heads, head_dim), and if asked the log-sum-exp (batch, heads, seqlen_q).
    """
    op = "flash_attn_with_kvcache"
    _check_operands(op, "(batch, seqlen, heads, head_dim)", q=q, k_cache=k_cache, v_cache=v_cache)
    if block_table is not None and (cache_batch_idx is not None or cache_leftpad is not None):
        raise NotImplementedError(f"{op}: block_table cannot be combined with cache_batch_idx or cache_leftpad.")
    if cache_seqlens is None:
        if k is not None:
            raise ValueError(f"{op}: k is given, so cache_seqlens must say where to append it.")
        cache_seqlens = k_cache.shape[1] if block_table is None else block_table.shape[1] * k_cache.shape[1]
    if cache_leftpad is not None:
        cache_leftpad = _checked_leftpad(op, cache_leftpad, q)
    if cache_batch_idx is not None:
        _check_one_for_each(op, "cache_batch_idx", cache_batch_idx, q)
        # A cache row is one block as long as the cache.
        block_table = cache_batch_idx[:, None]
    elif block_table is None and k_cache.shape[0] > q.shape[0]:
        k_cache, v_cache = k_cache[: q.shape[0]], v_cache[: q.shape[0]]
    options = _options(softmax_scale, causal, window_size, softcap, alibi_slopes) | {"return_lse": return_softmax_lse}
    arguments = {
        "cache_seqlens": cache_seqlens, "block_table": block_table, "rotary_cos": rotary_cos, "rotary_sin": rotary_sin,
        "rotary_interleaved": rotary_interleaved, **options,
    }  # fmt: skip
    advancing = causal or options["window"] is not None or q.shape[1] == 1
    if cache_leftpad is None and (rotary_cos is None or advancing):
        return attention_with_kv_cache(q, k_cache, v_cache, k, v, **arguments)

    # What the op does not do is done before it: it finds the tokens appended, rotated and shifted to the cache's start.
    # It would object too late, to what is written by then.
    rotary = _prepare(q, k_cache, v_cache, k, v, **arguments).rotary
    blocks, block_size = k_cache.shape[:2]
    capacity = block_size * (1 if block_table is None else block_table.shape[1])
    lengths = torch.as_tensor(cache_seqlens, device=q.device).expand(q.shape[0])
    new = 0 if k is None else k.shape[1]
    rotated = max(new, q.shape[1] if advancing else 1)
    positions = -1 if rotary is None else rotary[0].shape[0]
    lengths, table = kv_cache_positions(lengths, block_table, new, rotated, capacity, block_size, blocks, positions)
    first, table = lengths[:, None], None if block_table is None else table
    if rotary is not None:
        # A sequence of one query with all heads: every query of the sequence is at one position.
        row = q if advancing else q.reshape(q.shape[0], 1, -1, q.shape[-1])
        q = _rotate(row, first, rotary, rotary_interleaved).view_as(q)
        k = None if k is None else _rotate(k, first, rotary, rotary_interleaved)
    if k is not None and v is not None:
        _append(k_cache, k, first, table)
        _append(v_cache, v, first, table)
    lengths = lengths + new
    if table is not None:
        k_cache, v_cache = k_cache[table].flatten(1, 2), v_cache[table].flatten(1, 2)
    if cache_leftpad is not None:
        row = (torch.arange(capacity, device=q.device) + cache_leftpad[:, None]).clamp(0, max(capacity - 1, 0))
        sequence = torch.arange(q.shape[0], device=q.device)[:, None]
        k_cache, v_cache = k_cache[sequence, row], v_cache[sequence, row]
        lengths = (lengths - cache_leftpad).clamp(min=0)
    return attention_with_kv_cache(q, k_cache, v_cache, cache_seqlens=lengths, **options)


# --- From flash-attn's arguments to ours ------------------------------------------------------------------------------


def _check_operands(op: str, layout: str, **operands: Any) -> None:
    for name, x in operands.items():
        check_tensor(op, name, x)
        if x.dim() != layout.count(",") + 1:
            raise ValueError(f"{op}: {name} must be {layout}, got shape {tuple(x.shape)}.")


def _unpack(op: str, layout: str, **packed: Any) -> tuple[Tensor, ...]:
    """The 2 or 3 operands that lie one beside the other in the third dim from the end, as ``layout`` says."""
    _check_operands(op, layout, **packed)
    ((name, x),) = packed.items()
    if x.shape[-3] != int(layout.split(", ")[-3]):
        raise ValueError(f"{op}: {name} must be {layout}, got shape {tuple(x.shape)}.")
    return x.unbind(-3)  # type: ignore[no-any-return]


def _options(
    softmax_scale: float | None, causal: bool, window_size: tuple[int, int], softcap: float, alibi_slopes: Tensor | None
) -> dict[str, Any]:
    # Other negative numbers are no limit, either; what is no window at all is for the ops to name.
    window: Any = window_size
    if isinstance(window_size, (tuple, list)) and all(
        isinstance(side, (Integral, torch.SymInt)) for side in window_size
    ):
        window = tuple(max(side, -1) for side in window_size)
    return {
        "scale": softmax_scale,
        "is_causal": causal,
        "window": None if window == (-1, -1) else window,
        "softcap": softcap,
        "alibi_slopes": alibi_slopes,
    }


def _check_one_for_each(op: str, name: str, tensor: Any, q: Tensor) -> None:
    checks.integers_on_device(op, name, tensor, q)
    if tensor.shape != q.shape[:1]:
        raise ValueError(f"{op}: {name} must be (batch,) = ({q.shape[0]},), got shape {tuple(tensor.shape)}.")


def _checked_leftpad(op: str, cache_leftpad: Any, q: Tensor) -> Tensor:
    _check_one_for_each(op, "cache_leftpad", cache_leftpad, q)
    if q.is_cpu and not torch.compiler.is_compiling() and (cache_leftpad < 0).any():
        raise ValueError(f"{op}: cache_leftpad must be >= 0, got {int(cache_leftpad.min())}.")
    return cache_leftpad.clamp(min=0)


def _with_probabilities(
    query: Tensor, key: Tensor, value: Tensor, dropout_p: float, options: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """(out, lse, probabilities before dropout, negative where dropped)."""
    call = attention_ops.prepare(query, key, value, dropout_p=dropout_p, **options)
    rng_state = draw_rng_state(query.device)
    call = call._replace(rng_state=rng_state)
    out, lse = select("attention", call).run(call)
    with torch.no_grad():
        whole = call._replace(rng_state=None, dropout_p=0.0)
        probabilities = select("attention_weights", whole).run(whole, lse, False)
        batch, heads, seqlen_q, seqlen_k = probabilities.shape
        kept = dropout_mask(rng_state, batch, heads, seqlen_q, seqlen_k, dropout_p)
    return out, lse, torch.where(kept, probabilities, -probabilities)
