"""MultiHeadAttention: torch.nn.MultiheadAttention's constructor, parameters and forward, computed by fastattn's ops."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from numbers import Integral
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.parameter import Parameter

from fastattn._nested import nested_like, packed_tokens, pad_tokens, token_positions
from fastattn._tracing import as_fx_node, refuse_scripting
from fastattn.dispatch import check_name
from fastattn.ops.attention import attention, attention_and_weights
from fastattn.ops.attention_checks import autocast_is_on, window_sides
from fastattn.ops.linear import backend_of, linear
from fastattn.ops.tensor_checks import check_dense, check_probability, check_tensor
from fastattn.ops.varlen_attention import varlen_attention


class MultiHeadAttention(nn.MultiheadAttention):
    """A drop-in for ``torch.nn.MultiheadAttention`` that never stores the scores, plus grouped heads and windows.

    Same constructor, ``forward``, ``state_dict`` and, under one seed, initial values; it is a subclass. What differs:

    - A query that may attend to nothing gives 0 before the output projection, and its weights and gradients are 0;
      torch gives NaN for it if ``need_weights`` is set.
    - ``is_causal`` may be given without ``attn_mask``; with one, it promises that ``attn_mask`` is the causal mask,
      which is then not read if it is square, needs no gradient, and no keys are appended. Where ``add_bias_kv`` or
      ``add_zero_attn`` appends keys, every query sees them; torch hides them with ``need_weights=False``.
    - Masks are combined in the smallest shape that holds them: key padding stays (batch, 1, 1, seqlen_k).
    - Wrong input raises ValueError or TypeError with the remedy, where torch raises AssertionError or RuntimeError.

    Args:
        embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype:
            as in ``torch.nn.MultiheadAttention``.
        num_kv_heads: heads of key and value (grouped-query attention), a divisor of ``num_heads``, the default. If
            smaller, the parameters are ``q_proj_weight`` (embed_dim, embed_dim), ``k_proj_weight`` (kv_dim, kdim),
            ``v_proj_weight`` (kv_dim, vdim) and ``in_proj_bias`` (embed_dim + 2 * kv_dim), with
            kv_dim = num_kv_heads * head_dim.
        window: (left, right), how many keys each query sees to each side of its own position; -1 = unlimited.
        backend: as in ``fastattn.attention``.
    """

    __prepare_scriptable__ = refuse_scripting

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        num_kv_heads: int | None = None,
        window: tuple[int, int] | None = None,
        backend: str = "auto",
    ) -> None:
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        _check_configuration(embed_dim, num_heads, num_kv_heads, dropout, window, backend)
        _check_features(kdim, vdim)
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise TypeError(f"MultiHeadAttention: dtype must be a floating-point torch.dtype, got {dtype!r}.")
        # Not MultiheadAttention.__init__: num_kv_heads changes which parameters there are.
        nn.Module.__init__(self)
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = embed_dim // num_heads
        self.kdim = embed_dim if kdim is None else kdim
        self.vdim = embed_dim if vdim is None else vdim
        self.dropout = dropout
        self.batch_first = batch_first
        self.add_zero_attn = add_zero_attn
        self.window = window
        self.backend = backend

        def parameter(*shape: int) -> Parameter:
            return Parameter(torch.empty(shape, device=device, dtype=dtype))

        kv_dim = num_kv_heads * self.head_dim
        packed = self.kdim == self.vdim == kv_dim == embed_dim
        self.register_parameter("in_proj_weight", parameter(3 * embed_dim, embed_dim) if packed else None)
        self.register_parameter("q_proj_weight", None if packed else parameter(embed_dim, embed_dim))
        self.register_parameter("k_proj_weight", None if packed else parameter(kv_dim, self.kdim))
        self.register_parameter("v_proj_weight", None if packed else parameter(kv_dim, self.vdim))
        self.register_parameter("in_proj_bias", parameter(embed_dim + 2 * kv_dim) if bias else None)
        self.out_proj = NonDynamicallyQuantizableLinear(embed_dim, embed_dim, bias=bias, device=device, dtype=dtype)
        self.register_parameter("bias_k", parameter(1, 1, kv_dim) if add_bias_kv else None)
        self.register_parameter("bias_v", parameter(1, 1, kv_dim) if add_bias_kv else None)
        self._reset_parameters()

    def _reset_parameters(self) -> None:
        # torch's order, so that one seed gives one model.
        for weight in (self.in_proj_weight, self.q_proj_weight, self.k_proj_weight, self.v_proj_weight):
            if weight is not None:
                nn.init.xavier_uniform_(weight)
        if self.in_proj_bias is not None:
            nn.init.zeros_(self.in_proj_bias)
            nn.init.zeros_(self.out_proj.bias)
        for bias in (self.bias_k, self.bias_v):
            if bias is not None:
                nn.init.xavier_normal_(bias)

    @property
    def _qkv_same_embed_dim(self) -> bool:
        # Unless this is False, nn.TransformerEncoderLayer computes the whole layer in one op of its own without calling
        # self_attn. (nn.MultiheadAttention asks it which parameters there are; we ask in_proj_weight.)
        return False

    def extra_repr(self) -> str:
        text = f"embed_dim={self.embed_dim}, num_heads={self.num_heads}"
        if self.num_kv_heads != self.num_heads:
            text += f", num_kv_heads={self.num_kv_heads}"
        return text if self.window is None else f"{text}, window={self.window}"

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of ``query`` over ``key`` and ``value`` between the input and the output projections.

        Args:
            query: (seqlen_q, batch, embed_dim), or (batch, seqlen_q, embed_dim) if ``batch_first``, or unbatched
                (seqlen_q, embed_dim). Nested tensors (``torch.strided``, ``batch_first``) give nested output.
            key, value: likewise with seqlen_k, and kdim, vdim features. ``query is key is value`` takes one matmul for
                all three projections, ``key is value`` or ``query is key`` two.
            key_padding_mask: (batch, seqlen_k), or (seqlen_k,) if unbatched; bool, True = ignore the key, or float,
                added to the scores.
            need_weights: also return the attention weights, which costs their memory.
            attn_mask: (seqlen_q, seqlen_k) or (batch * num_heads, seqlen_q, seqlen_k); bool, True = ignore, or float,
                added to the scores; a float mask that requires grad gets its gradient.
            average_attn_weights: average the weights over the heads.
            is_causal: query i attends to keys 0 to i. With ``attn_mask``, the promise that it says the same.

        Returns: the output, in the layout of ``query``, and the weights after dropout, (batch, seqlen_q, seqlen_k), or
            (batch, num_heads, seqlen_q, seqlen_k) if not averaged, without batch if unbatched; None if not needed.
        Raises: ValueError, TypeError for inputs that do not fit the module or each other; NotImplementedError, with
            reasons, if ``backend`` cannot run them.
        """
        if isinstance(query, Proxy):
            options = key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            node: Any = as_fx_node(self, query, key, value, *options)
            return node
        _check_tensors(query=query, key=key, value=value, key_padding_mask=key_padding_mask, attn_mask=attn_mask)
        if query.is_nested or key.is_nested or value.is_nested:
            self._check_nested_inputs(query, key, value, key_padding_mask, attn_mask)
            return self._forward_nested(query, key, value, need_weights, average_attn_weights, is_causal)
        self._check_inputs(query, key, value, key_padding_mask, attn_mask)
        q, k, v = map(self._split_heads, self._in_projection(query, key, value))
        out, weights = self._attend(q, k, v, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal)
        if query.dim() == 2:
            out = out.squeeze(0).transpose(0, 1)
            weights = None if weights is None else weights.squeeze(0)
        else:
            out = out.transpose(1, 2) if self.batch_first else out.permute(2, 0, 1, 3)
        return self.out_proj(out.flatten(-2)), weights

    def forward_packed(self, input: Tensor, cu_seqlens: Tensor, max_seqlen: int, is_causal: bool = False) -> Tensor:
        """Self-attention of sequences that stand one behind the other, without padding.

        Args:
            input: (tokens, embed_dim).
            cu_seqlens: (batch + 1,) int32 or int64: sequence b is rows ``cu_seqlens[b]:cu_seqlens[b + 1]``.
            max_seqlen: no less than the longest sequence.
        Returns: the shape of ``input``.
        Raises: NotImplementedError for a module with ``add_bias_kv`` or ``add_zero_attn``; and as ``varlen_attention``.
        """
        op = "MultiHeadAttention.forward_packed"
        check_tensor(op, "input", input)
        if not self.embed_dim == self.kdim == self.vdim:
            raise ValueError(
                f"{op}: query, key and value are one input, but the module takes {self.embed_dim}, {self.kdim} and "
                f"{self.vdim} features (embed_dim, kdim, vdim); use forward."
            )
        if input.dim() != 2 or input.shape[1] != self.embed_dim:
            raise ValueError(f"{op}: input must be (tokens, embed_dim = {self.embed_dim}), got {_shape(input)}.")
        if self.bias_k is not None or self.add_zero_attn:
            raise NotImplementedError(f"{op}: add_bias_kv and add_zero_attn are not supported; use forward.")
        q, k, v = (
            x.view(-1, x.shape[-1] // self.head_dim, self.head_dim) for x in self._in_projection(input, input, input)
        )
        out = varlen_attention(
            q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen,
            dropout_p=self.dropout if self.training else 0.0, is_causal=is_causal, window=self.window,
            backend=self.backend,
        )  # fmt: skip
        return self.out_proj(cast(Tensor, out).flatten(1))

    def _forward_nested(
        self, query: Tensor, key: Tensor, value: Tensor, need_weights: bool, average_attn_weights: bool, is_causal: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Projects only the tokens there are; the output is nested, the weights are padded with 0, as torch's are."""
        appended = self.bias_k is not None or self.add_zero_attn
        if query is key and key is value and query.size(0) > 0 and not need_weights and not appended:
            lengths = query._nested_tensor_size()[:, 0]
            starts = F.pad(lengths.cumsum(0), (1, 0)).to(query.device)
            out = self.forward_packed(packed_tokens(query), starts, int(lengths.max()), is_causal)
            return nested_like(out, query), None
        tokens = {id(x): packed_tokens(x) for x in (query, key, value)}
        positions_q, positions_k = token_positions(query), token_positions(key)
        q, k, v = (
            self._split_heads(pad_tokens(x, positions))
            for x, positions in zip(
                self._in_projection(*(tokens[id(x)] for x in (query, key, value))),
                (positions_q, positions_k, positions_k),
                strict=True,
            )
        )
        out, weights = self._attend(q, k, v, ~positions_k, need_weights, None, average_attn_weights, is_causal)
        if weights is not None:
            present = positions_q[:, :, None] if average_attn_weights else positions_q[:, None, :, None]
            weights = weights.masked_fill(~present, 0.0)
        out = out.transpose(1, 2)[positions_q].flatten(-2)
        return nested_like(self.out_proj(out), query), weights

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_padding_mask: Tensor | None,
        need_weights: bool,
        attn_mask: Tensor | None,
        average_attn_weights: bool,
        is_causal: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of (batch, heads, seqlen, head_dim) operands; masks in torch.nn's sense."""
        batch, heads, seqlen_q, _ = q.shape
        seqlen_k, window = k.shape[2], self.window
        appended = (self.bias_k is not None) + self.add_zero_attn
        if is_causal and attn_mask is not None:
            # Where the promise cannot stand for the mask, the mask counts.
            is_causal = seqlen_q == seqlen_k and not appended and not attn_mask.requires_grad
            attn_mask = None if is_causal else attn_mask
        if appended:
            k, v = self._append_keys(k, v)
            if is_causal or window is not None:
                # Appended keys have no position: every query sees them, which only a mask can say.
                hidden = _hidden_by_position(seqlen_q, seqlen_k, is_causal, window, q.device)
                attn_mask = hidden if attn_mask is None else _combine(attn_mask, hidden)
                is_causal, window = False, None
        options: dict[str, Any] = {
            "attn_mask": _attention_mask(key_padding_mask, attn_mask, batch, heads, appended),
            "dropout_p": self.dropout if self.training else 0.0,
            "is_causal": is_causal,
            "window": window,
            "backend": self.backend,
        }
        if need_weights:
            return attention_and_weights(q, k, v, average_heads=average_attn_weights, **options)
        out = attention(q, k, v, enable_gqa=self.num_kv_heads != self.num_heads, **options)
        return cast(Tensor, out), None

    def _in_projection(self, query: Tensor, key: Tensor, value: Tensor) -> Sequence[Tensor]:
        """The projected query, key and value, in as few matmuls as their being the same tensor allows."""
        # Read once: a parametrization (weight_norm, spectral_norm) computes it anew, and may step, at every reading.
        packed = self.in_proj_weight
        weight = self.q_proj_weight if packed is None else packed
        if query.device != weight.device:
            raise ValueError(
                f"MultiHeadAttention: query is on {query.device} but the module on {weight.device}; move one of them."
            )
        if not query.dtype == key.dtype == value.dtype == weight.dtype and not autocast_is_on(query.device):
            got = ", ".join(str(x.dtype) for x in (query, key, value))
            raise TypeError(
                f"MultiHeadAttention: query, key and value are {got} but the module's weights {weight.dtype}; they "
                "must be equal. Convert one of them with .to(dtype), or use torch.autocast."
            )
        product = partial(linear, backend=backend_of(self))
        if packed is None:
            kv_dim = self.num_kv_heads * self.head_dim
            biases = _split(self.in_proj_bias, [self.embed_dim, kv_dim, kv_dim])
            weights = weight, self.k_proj_weight, self.v_proj_weight
            inputs = query, key, value
            return [product(x, w, b) for x, w, b in zip(inputs, weights, biases, strict=True)]
        if query is key and key is value:
            return product(query, weight, self.in_proj_bias).chunk(3, dim=-1)
        # (input, how many of the three projections it takes), in order
        runs = [(query, 1), (key, 1), (value, 1)]
        if key is value:
            runs = [(query, 1), (key, 2)]
        elif query is key:
            runs = [(query, 2), (value, 1)]
        rows = [count * self.embed_dim for _, count in runs]
        projected: list[Tensor] = []
        for (x, count), w, b in zip(runs, weight.split(rows), _split(self.in_proj_bias, rows), strict=True):
            projected += product(x, w, b).chunk(count, dim=-1)
        return projected

    def _split_heads(self, x: Tensor) -> Tensor:
        """A view (batch, heads, seqlen, head_dim) of a projection in the layout of the module's inputs."""
        x = x.view(*x.shape[:-1], x.shape[-1] // self.head_dim, self.head_dim)
        if x.dim() == 3:
            return x.transpose(0, 1).unsqueeze(0)
        return x.transpose(1, 2) if self.batch_first else x.permute(1, 2, 0, 3)

    def _append_keys(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Appends the learned key and value of ``add_bias_kv`` and the zero ones of ``add_zero_attn``."""
        if self.bias_k is not None:
            k, v = self._append_key(k, self.bias_k), self._append_key(v, self.bias_v)
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        return k, v

    def _append_key(self, x: Tensor, bias: Tensor | None) -> Tensor:
        assert bias is not None
        # Under autocast the projections are narrower than the parameters.
        bias = bias.to(x.dtype).view(1, self.num_kv_heads, 1, self.head_dim)
        return torch.cat([x, bias.expand(x.shape[0], -1, -1, -1)], dim=2)

    def _check_nested_inputs(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None, attn_mask: Tensor | None
    ) -> None:
        if not all(x.is_nested and x.layout == torch.strided for x in (query, key, value)):
            got = ", ".join(f"nested {x.layout}" if x.is_nested else "dense" for x in (query, key, value))
            raise TypeError(
                "MultiHeadAttention: query, key and value must all be nested with layout torch.strided, or none, got "
                f"{got}. Pad them with to_padded_tensor and give key_padding_mask, or use fastattn.varlen_attention."
            )
        if not self.batch_first:
            raise ValueError("MultiHeadAttention: nested inputs are (batch, seqlen, features): set batch_first=True.")
        if key_padding_mask is not None or attn_mask is not None:
            raise ValueError(
                "MultiHeadAttention: nested inputs carry their lengths and take no masks: remove key_padding_mask and "
                "attn_mask (is_causal is allowed), or pad the inputs with to_padded_tensor."
            )

    def _check_inputs(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None, attn_mask: Tensor | None
    ) -> None:
        dim = query.dim()
        if dim not in (2, 3) or key.dim() != dim or value.dim() != dim:
            raise ValueError(
                "MultiHeadAttention: query, key and value must all have 3 dimensions, or 2 if unbatched, got "
                f"{_shape(query)}, {_shape(key)}, {_shape(value)}. Use unsqueeze or flatten to add or join dimensions."
            )
        for name, x, option, features in (
            ("query", query, "embed_dim", self.embed_dim),
            ("key", key, "kdim", self.kdim),
            ("value", value, "vdim", self.vdim),
        ):
            if x.shape[-1] != features:
                raise ValueError(
                    f"MultiHeadAttention: {name} must have {option} = {features} features, got {_shape(x)}. Project it "
                    f"to {features} features, or make the module with {option}={x.shape[-1]}."
                )
        if key.shape[:-1] != value.shape[:-1]:
            raise ValueError(
                "MultiHeadAttention: key and value must have the same batch size and sequence length, got key "
                f"{_shape(key)}, value {_shape(value)}."
            )
        batch_dim, seq_dim = (0, 1) if self.batch_first else (1, 0)
        if dim == 3 and query.shape[batch_dim] != key.shape[batch_dim]:
            layout = "(batch, seqlen, features)" if self.batch_first else "(seqlen, batch, features)"
            raise ValueError(
                f"MultiHeadAttention: query and key must have the same batch size, got query {_shape(query)}, key "
                f"{_shape(key)}. With batch_first={self.batch_first} they are {layout}."
            )
        batch, seq_dim = (query.shape[batch_dim], seq_dim) if dim == 3 else (1, 0)
        seqlen_q, seqlen_k = query.shape[seq_dim], key.shape[seq_dim]
        if key_padding_mask is not None:
            expected: tuple[int, ...] = (batch, seqlen_k) if dim == 3 else (seqlen_k,)
            _check_mask(
                "key_padding_mask", key_padding_mask, "(batch, seqlen_k), or (seqlen_k,) if unbatched", expected
            )
        if attn_mask is not None:
            expected = (seqlen_q, seqlen_k) if attn_mask.dim() != 3 else (batch * self.num_heads, seqlen_q, seqlen_k)
            meaning = "(seqlen_q, seqlen_k) or (batch * num_heads, seqlen_q, seqlen_k)"
            _check_mask("attn_mask", attn_mask, meaning, expected)


def _split(x: Tensor | None, sizes: list[int]) -> Sequence[Tensor | None]:
    # One split, not slices: its backward writes the gradient once.
    return [None] * len(sizes) if x is None else x.split(sizes)


# --- Masks: True = ignore until _attention_mask, which alone turns the sense ------------------------------------------


def _attention_mask(
    key_padding_mask: Tensor | None, attn_mask: Tensor | None, batch: int, heads: int, appended: int
) -> Tensor | None:
    """The one mask for ``fastattn.attention`` (True = attend), in the smallest shape that says what the two say."""
    masks = []
    if key_padding_mask is not None:
        masks.append(key_padding_mask.view(batch, 1, 1, key_padding_mask.shape[-1]))
    if attn_mask is not None:
        masks.append(attn_mask.view(batch, heads, *attn_mask.shape[1:]) if attn_mask.dim() == 3 else attn_mask)
    if not masks:
        return None
    if appended:
        masks = [F.pad(mask, (0, appended)) for mask in masks]
    mask = masks[0] if len(masks) == 1 else _combine(*masks)
    return mask.logical_not() if mask.dtype == torch.bool else mask


def _combine(a: Tensor, b: Tensor) -> Tensor:
    """What both masks say together; float if either is."""
    if a.dtype == b.dtype == torch.bool:
        return a | b
    if a.dtype == torch.bool:
        a, b = b, a
    return a.masked_fill(b, -torch.inf) if b.dtype == torch.bool else a + b


def _hidden_by_position(
    seqlen_q: int, seqlen_k: int, is_causal: bool, window: tuple[int, int] | None, device: torch.device
) -> Tensor:
    """(seqlen_q, seqlen_k) bool: the keys that causality and the window hide."""
    left, right = (-1, -1) if window is None else window
    right = 0 if is_causal else right
    distance = torch.arange(seqlen_k, device=device) - torch.arange(seqlen_q, device=device)[:, None]
    hidden = torch.zeros_like(distance, dtype=torch.bool)
    if right >= 0:
        hidden |= distance > right
    if left >= 0:
        hidden |= distance < -left
    return hidden


# --- Checks -----------------------------------------------------------------------------------------------------------


def _shape(x: Tensor) -> str:
    return str(tuple(x.shape))


def _check_tensors(*, key_padding_mask: Any, attn_mask: Any, **operands: Any) -> None:
    """That the operands are tensors and the masks tensors or None, on one device."""
    device = getattr(operands["query"], "device", None)
    for name, x in (*operands.items(), ("key_padding_mask", key_padding_mask), ("attn_mask", attn_mask)):
        if x is None and name not in operands:
            continue
        if not isinstance(x, Tensor):
            raise TypeError(f"MultiHeadAttention: {name} must be a Tensor, got {type(x).__name__}.")
        if not x.is_nested:
            check_dense("MultiHeadAttention", name, x)
        if x.device != device:
            raise ValueError(f"MultiHeadAttention: query is on {device} but {name} on {x.device}; move it there.")


def _check_mask(name: str, mask: Tensor, meaning: str, expected: tuple[int, ...]) -> None:
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(
            f"MultiHeadAttention: {name} must be bool (True = ignore) or float (added to the scores), got "
            f"{mask.dtype}. If nonzero means ignore, pass {name}.bool()."
        )
    if mask.shape != expected:
        raise ValueError(f"MultiHeadAttention: {name} must be {meaning}, here {expected}, got {_shape(mask)}.")


def _check_configuration(
    embed_dim: int, num_heads: int, num_kv_heads: int, dropout: float, window: tuple[int, int] | None, backend: str
) -> None:
    sizes = {"embed_dim": embed_dim, "num_heads": num_heads, "num_kv_heads": num_kv_heads}
    for name, size in sizes.items():
        if not isinstance(size, (int, Integral)):
            raise TypeError(f"MultiHeadAttention: {name} must be an int, got {size!r}.")
    if min(embed_dim, num_heads, num_kv_heads) <= 0:
        raise ValueError(
            "MultiHeadAttention: embed_dim, num_heads and num_kv_heads must be positive, got "
            f"{embed_dim}, {num_heads}, {num_kv_heads}."
        )
    if embed_dim % num_heads:
        raise ValueError(f"MultiHeadAttention: num_heads must divide embed_dim, got {num_heads} for {embed_dim}.")
    if num_heads % num_kv_heads:
        raise ValueError(f"MultiHeadAttention: num_kv_heads must divide num_heads, got {num_kv_heads} for {num_heads}.")
    check_probability("MultiHeadAttention", "dropout", dropout)
    window_sides("MultiHeadAttention", window)
    check_name("MultiHeadAttention", backend)


def _check_features(kdim: int | None, vdim: int | None) -> None:
    for name, size in (("kdim", kdim), ("vdim", vdim)):
        if size is None:
            continue
        if not isinstance(size, (int, Integral)):
            raise TypeError(f"MultiHeadAttention: {name} must be an int or None, got {size!r}.")
        if size < 0:
            raise ValueError(f"MultiHeadAttention: {name} must not be negative, got {size}.")
