"""What the models are built of, over fastattn's ops: attention, norms, feed-forward networks, and one switch.

``set_backend(model, "cpu", int8=True)`` says which kernels run every attention, norm and linear layer of a model. The
parameters, and so the state dict, are the same on every backend; INT8 replaces the weights of linear layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import fastattn
from fastattn.modules import Linear
from fastattn.ops.linear import ACTIVATION_FUNCTIONS

BACKENDS = ("auto", "cuda", "triton", "cpu", "eager", "emulated")


def at_least_float32(x: Tensor) -> Tensor:
    """Half precision widened, for a loss."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def set_backend(model: nn.Module, backend: str = "auto", *, int8: bool = False) -> nn.Module:
    """Chooses the kernels of ``model``, in place.

    Args:
        model: a model of this package, or any of ``torch.nn`` modules: those are swapped by ``fastattn.accelerate``.
        backend: "auto" or a backend's name; "eager" is plain PyTorch.
        int8: also quantise the weights of every linear layer, for inference. There is no way back.
    Returns: ``model``.
    Raises: ValueError for an unknown backend; NotImplementedError, with the reason, for one that cannot run here.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}.")
    reason = None if backend == "auto" else fastattn.available_backends()[backend]
    if reason is not None:
        raise NotImplementedError(f"backend {backend!r} cannot run here: {reason}.")
    if backend != "eager" or int8:
        fastattn.accelerate(model, linear=not int8, verbose=False)
    for module in model.modules():
        if hasattr(module, "backend"):
            module.backend = backend
        if int8 and isinstance(module, FeedForward):
            module.fuse_activation()
    if int8:
        fastattn.accelerate(model, int8=True, filter_fn=lambda module, name: True, verbose=False)
        for module in model.modules():
            if isinstance(module, fastattn.Int8Linear):
                module.backend = backend
    return model


@contextmanager
def another_backend(model: nn.Module, backend: str) -> Iterator[None]:
    """Within the block the modules of ``model`` run on ``backend``."""
    before = [(module, module.backend) for module in model.modules() if hasattr(module, "backend")]
    try:
        for module, _ in before:
            module.backend = backend  # type: ignore[assignment]
        yield
    finally:
        for module, own in before:
            module.backend = own


# --- Norms -----------------------------------------------------------------------------------------------------------


class Norm(nn.Module):
    """Layer norm, or with ``rms`` RMS norm (arXiv:1910.07467), that can add the residual in the same pass."""

    def __init__(self, dim: int, *, rms: bool = False, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = None if rms else nn.Parameter(torch.zeros(dim))
        self.rms, self.eps, self.backend = rms, eps, "auto"

    def forward(self, x: Tensor) -> Tensor:
        if self.rms:
            return fastattn.rms_norm(x, self.weight.shape, self.weight, self.eps, backend=self.backend)
        return fastattn.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps, backend=self.backend)

    def add(self, branch: Tensor | None, residual: Tensor, dropout_p: float = 0.0) -> tuple[Tensor, Tensor]:
        """(norm(s), s) of ``s = residual + dropout(branch)``, or of the residual alone."""
        if branch is None:
            return self(residual), residual
        options = {"dropout_p": dropout_p if self.training else 0.0, "backend": self.backend}
        if self.rms:
            return fastattn.add_rms_norm(branch, residual, self.weight.shape, self.weight, self.eps, **options)
        return fastattn.add_layer_norm(branch, residual, self.weight.shape, self.weight, self.bias, self.eps, **options)


# --- Feed-forward networks -------------------------------------------------------------------------------------------


class FeedForward(nn.Module):
    """Two linear layers with an activation between them, or SwiGLU (arXiv:2002.05202), which has three."""

    def __init__(self, dim: int, hidden_dim: int, activation: str = "gelu", *, bias: bool = True) -> None:
        super().__init__()
        self.up = nn.Linear(dim, hidden_dim, bias)
        self.gate = nn.Linear(dim, hidden_dim, bias) if activation == "swiglu" else None
        self.down = nn.Linear(hidden_dim, dim, bias)
        self.activation = "silu" if activation == "swiglu" else activation

    def fuse_activation(self) -> None:
        """Makes the layer in front of the activation an INT8 one that applies it in the pass that writes its result."""
        name = "up" if self.gate is None else "gate"
        setattr(self, name, fastattn.Int8Linear.from_linear(getattr(self, name), self.activation))

    def forward(self, x: Tensor) -> Tensor:
        gated = self.up if self.gate is None else self.gate
        if isinstance(gated, Linear):
            hidden = gated(x, self.activation)
        elif isinstance(gated, fastattn.Int8Linear):
            hidden = gated(x)
        else:
            hidden = ACTIVATION_FUNCTIONS[self.activation](gated(x))
        return self.down(hidden if self.gate is None else hidden * self.up(x))


# --- Rotary position embeddings --------------------------------------------------------------------------------------


class Rotary(nn.Module):
    """Angles of rotary position embeddings (arXiv:2104.09864), pairs (i, i + head_dim / 2)."""

    cos: Tensor
    sin: Tensor

    def __init__(self, head_dim: int, max_positions: int, theta: float = 10000.0) -> None:
        super().__init__()
        if head_dim % 2:
            raise ValueError(f"Rotary: head_dim must be even, got {head_dim}: pairs are rotated.")
        # In float64: at long distances the angle's own rounding would show.
        frequencies = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
        angles = torch.outer(torch.arange(max_positions, dtype=torch.float64), frequencies)
        self.register_buffer("cos", angles.cos().float(), persistent=False)  # (max_positions, head_dim / 2)
        self.register_buffer("sin", angles.sin().float(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Rotates (batch, seqlen, heads, head_dim), whose row i stands at position i."""
        cos, sin = (table[: x.shape[1], None, :].to(x.dtype) for table in (self.cos, self.sin))
        left, right = x.chunk(2, dim=-1)
        return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1)


# --- Attention -------------------------------------------------------------------------------------------------------


@dataclass
class KeyValueCache:
    """Keys and values of one layer: (batch, capacity, heads_kv, head_dim) each; what is past a length is not read."""

    key: Tensor
    value: Tensor

    @classmethod
    def empty(cls, batch: int, capacity: int, attention: Attention, like: Tensor) -> KeyValueCache:
        shape = (batch, capacity, attention.num_kv_heads, attention.head_dim)
        return cls(like.new_empty(shape), like.new_empty(shape))

    def select(self, rows: Tensor) -> KeyValueCache:
        """The cache with its sequences replaced by ``rows`` (indices) of itself, as beam search reorders them."""
        return KeyValueCache(self.key[rows], self.value[rows])


class Attention(nn.Module):
    """Multi-head attention: to itself, to a memory, or to a cache that it extends.

    Args:
        num_kv_heads: fewer than ``num_heads`` = grouped-query attention (arXiv:2305.13245).
        window: (left, right) keys that a query sees to each side; -1 = unlimited.
        rotary: rotates queries and keys by their positions.
    """

    def __init__(
        self, dim: int, num_heads: int, *, num_kv_heads: int | None = None, bias: bool = True, dropout: float = 0.0,
        window: tuple[int, int] | None = None, rotary: Rotary | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.num_heads, self.num_kv_heads = num_heads, num_heads if num_kv_heads is None else num_kv_heads
        if min(num_heads, self.num_kv_heads) < 1 or dim % num_heads or num_heads % self.num_kv_heads:
            raise ValueError(
                f"Attention: dim {dim} must be a multiple of num_heads {num_heads}, and that of num_kv_heads "
                f"{self.num_kv_heads}."
            )
        self.head_dim = dim // num_heads
        self.q_proj = nn.Linear(dim, dim, bias)
        self.k_proj = nn.Linear(dim, self.num_kv_heads * self.head_dim, bias)
        self.v_proj = nn.Linear(dim, self.num_kv_heads * self.head_dim, bias)
        self.out_proj = nn.Linear(dim, dim, bias)
        self.dropout, self.window, self.rotary, self.backend = dropout, window, rotary, "auto"

    def forward(
        self, x: Tensor, *, attn_mask: Tensor | None = None, is_causal: bool = False,
        memory: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:  # fmt: skip
        """(batch, seqlen, dim) to the same.

        Args:
            attn_mask: True = may attend, broadcastable to (batch, heads, seqlen_q, seqlen_k).
            memory: keys and values to attend to, from ``project``; absent = those of ``x``.
        """
        query = self._heads(self.q_proj(x))
        key, value = self.project(x) if memory is None else memory
        if self.rotary is not None:
            query = self.rotary(query)
        # (batch, seqlen, heads, head_dim) is read through its strides: the transposes copy nothing.
        attended = self.attend(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), attn_mask, is_causal)
        return self.out_proj(attended.transpose(1, 2).flatten(2))

    def project(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of ``x``: (batch, seqlen, heads_kv, head_dim) each."""
        key, value = self._heads(self.k_proj(x)), self._heads(self.v_proj(x))
        return (key if self.rotary is None else self.rotary(key)), value

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, is_causal: bool
    ) -> Tensor:  # fmt: skip
        """(batch, heads, seqlen, head_dim) each; key and value may have fewer heads."""
        return fastattn.attention(
            query, key, value, attn_mask, self.dropout if self.training else 0.0, is_causal,
            enable_gqa=self.num_kv_heads != self.num_heads, window=self.window, backend=self.backend,
        )  # fmt: skip

    def extend(self, x: Tensor, cache: KeyValueCache, lengths: int | Tensor) -> Tensor:
        """Causal self-attention of new tokens, which are appended to the cache behind its first ``lengths`` tokens.

        Args:
            x: (batch, seqlen, dim).
            lengths: an int, or (batch,) int32.
        """
        query, key, value = self._heads(self.q_proj(x)), self._heads(self.k_proj(x)), self._heads(self.v_proj(x))
        return self.out_proj(self.attend_cached(query, key, value, cache, lengths).flatten(2))

    def attend_cached(
        self, query: Tensor, key: Tensor, value: Tensor, cache: KeyValueCache, lengths: int | Tensor
    ) -> Tensor:  # fmt: skip
        """(batch, seqlen, heads, head_dim) each; key and value are what to append."""
        angles = {} if self.rotary is None else {"rotary_cos": self.rotary.cos, "rotary_sin": self.rotary.sin}
        return fastattn.attention_with_kv_cache(
            query, cache.key, cache.value, key, value, cache_seqlens=lengths, window=self.window,
            backend=self.backend, **angles,
        )  # fmt: skip

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim))
