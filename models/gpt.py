"""GPT: a decoder-only Transformer in two dialects, GPT-2's and Llama's, trained and sampled by the same code.

GPT-2 (Radford et al. 2019): learned positions, layer norm, GELU. Llama (Touvron et al. 2023, arXiv:2302.13971): rotary
positions, RMS norm, SwiGLU, no biases, grouped key/value heads. Both load Hugging Face state dicts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers import Attention, FeedForward, KeyValueCache, Norm, Rotary, at_least_float32


@dataclass(frozen=True)
class GptConfig:
    """The shape of a decoder; the defaults are GPT-2's 124M parameters, ``llama`` gives the other dialect."""

    vocab_size: int = 50257
    max_positions: int = 1024
    dim: int = 768
    num_layers: int = 12
    num_heads: int = 12
    num_kv_heads: int | None = None
    hidden_dim: int = 3072
    activation: str = "gelu_tanh"
    rms: bool = False
    eps: float = 1e-5
    bias: bool = True
    rope_theta: float | None = None  # None = learned positions
    tie_embeddings: bool = True
    dropout: float = 0.1
    window: int | None = None  # how many keys before its own a token sees: sparse attention
    share_layers: int = 1  # consecutive layers that share their parameters (arXiv:1909.11942)
    prompt_tokens: int = 0  # learned vectors in front of every sequence (arXiv:2104.08691)

    def __post_init__(self) -> None:
        if self.share_layers < 1 or self.num_layers % self.share_layers:
            raise ValueError(
                f"GptConfig: num_layers {self.num_layers} must be a multiple of share_layers {self.share_layers}."
            )

    @classmethod
    def llama(cls, **options: object) -> GptConfig:
        """Llama's dialect; ``options`` as for the class."""
        dialect = {"activation": "swiglu", "rms": True, "bias": False, "rope_theta": 10000.0, "dropout": 0.0}
        return cls(**(dialect | {"tie_embeddings": False} | options))  # type: ignore[arg-type]


class GptBlock(nn.Module):
    """Pre-norm attention and feed-forward. A branch is added to the residual by the norm that reads the sum."""

    def __init__(self, config: GptConfig, rotary: Rotary | None) -> None:
        super().__init__()
        window = None if config.window is None else (config.window, -1)
        self.norm1 = Norm(config.dim, rms=config.rms, eps=config.eps)
        self.attention = Attention(
            config.dim, config.num_heads, num_kv_heads=config.num_kv_heads, bias=config.bias, dropout=config.dropout,
            window=window, rotary=rotary,
        )  # fmt: skip
        self.norm2 = Norm(config.dim, rms=config.rms, eps=config.eps)
        self.feed_forward = FeedForward(config.dim, config.hidden_dim, config.activation, bias=config.bias)
        self.dropout = config.dropout

    def forward(
        self, residual: Tensor, branch: Tensor | None, cache: KeyValueCache | None, lengths: int | Tensor
    ) -> tuple[Tensor, Tensor]:
        """The residual, (batch, seqlen, dim), and the branch that is still to be added to it."""
        x, residual = self.norm1.add(branch, residual, self.dropout)
        branch = self.attention(x, is_causal=True) if cache is None else self.attention.extend(x, cache, lengths)
        x, residual = self.norm2.add(branch, residual, self.dropout)
        return residual, self.feed_forward(x)


class Gpt(nn.Module):
    """Token ids to logits of the next token."""

    def __init__(self, config: GptConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.position = None if config.rope_theta else nn.Embedding(config.max_positions, config.dim)
        self.prompt = nn.Parameter(torch.empty(config.prompt_tokens, config.dim)) if config.prompt_tokens else None
        rotary = None
        if config.rope_theta:
            rotary = Rotary(config.dim // config.num_heads, config.max_positions, config.rope_theta)
        blocks = config.num_layers // config.share_layers
        self.blocks = nn.ModuleList(GptBlock(config, rotary) for _ in range(blocks))
        self.norm = Norm(config.dim, rms=config.rms, eps=config.eps)
        self.head = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.dropout = nn.Dropout(config.dropout)
        self._initialise()
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight

    def _initialise(self) -> None:
        """GPT-2's: normal with deviation 0.02, less for what is added to the residual."""
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                into_residual = name.endswith(("out_proj.weight", "down.weight"))
                nn.init.normal_(parameter, std=0.02 / ((2 * self.config.num_layers) ** 0.5 if into_residual else 1))
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(
        self, input_ids: Tensor, caches: list[KeyValueCache] | None = None, lengths: int | Tensor = 0
    ) -> Tensor:
        """(batch, seqlen) ids to (batch, seqlen, vocab_size) logits.

        Args:
            caches: one a layer, from ``empty_caches``; the tokens are appended behind its first ``lengths`` tokens.
            lengths: an int, or (batch,) int32.
        Raises: ValueError if the positions do not reach that far.
        """
        return self.head(self.hidden_states(input_ids, caches, lengths))

    def hidden_states(
        self, input_ids: Tensor, caches: list[KeyValueCache] | None = None, lengths: int | Tensor = 0
    ) -> Tensor:
        """What ``head`` reads: (batch, seqlen, dim)."""
        x = self.embedding(input_ids)
        # The prompt stands in front of what is first put into a cache.
        prompted = self.prompt is not None and (caches is None or (isinstance(lengths, int) and lengths == 0))
        if prompted:
            x = torch.cat([self.prompt.expand(len(x), -1, -1), x], dim=1)
        residual = self.dropout(self._with_positions(x, lengths))
        branch = None
        for i in range(self.config.num_layers):
            block = self.blocks[i // self.config.share_layers]
            residual, branch = block(residual, branch, None if caches is None else caches[i], lengths)
        x, _ = self.norm.add(branch, residual, self.config.dropout)
        return x[:, self.config.prompt_tokens :] if prompted else x

    def _with_positions(self, x: Tensor, lengths: int | Tensor) -> Tensor:
        seqlen, limit = x.shape[1], self.config.max_positions
        if isinstance(lengths, int) and lengths + seqlen > limit:
            raise ValueError(f"Gpt: {lengths + seqlen} tokens; the model has positions for {limit}.")
        if self.position is None:
            return x
        if isinstance(lengths, int):
            return x + self.position.weight[lengths : lengths + seqlen]
        return x + self.position(lengths[:, None] + torch.arange(seqlen, device=x.device))

    def empty_caches(self, batch: int, capacity: int) -> list[KeyValueCache]:
        """Caches for ``capacity`` tokens, prompt included, one a layer."""
        like = self.embedding.weight
        attentions = [self.blocks[i // self.config.share_layers].attention for i in range(self.config.num_layers)]
        return [KeyValueCache.empty(batch, capacity, attention, like) for attention in attentions]

    # --- Generation --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def stream(
        self, prompts: list[list[int]], max_new_tokens: int, *, temperature: float = 1.0, top_k: int | None = None,
        top_p: float | None = None, stop: int | None = None, generator: torch.Generator | None = None,
    ) -> Iterator[Tensor]:  # fmt: skip
        """Yields the next token of every sequence, (batch,) int64, until ``max_new_tokens`` or all have stopped.

        Args:
            prompts: token ids, of any lengths above 0.
            temperature: divides the logits; 0 = the likeliest token.
            top_k: sample among the likeliest ``top_k`` only.
            top_p: sample among the likeliest tokens that together have this probability (arXiv:1904.09751).
            stop: a token after which a sequence yields nothing but itself.
        """
        if not prompts or min(map(len, prompts)) == 0:
            raise ValueError("Gpt.stream: prompts must hold at least one sequence, and each at least one token.")
        if max_new_tokens < 0:
            raise ValueError(f"Gpt.stream: max_new_tokens must be at least 0, got {max_new_tokens}.")
        device, extra = self.embedding.weight.device, self.config.prompt_tokens
        tokens = torch.tensor([len(prompt) for prompt in prompts], device=device, dtype=torch.int32)
        longest = max(map(len, prompts))
        capacity = extra + longest + max_new_tokens
        if capacity > self.config.max_positions:
            raise ValueError(
                f"Gpt.stream: {longest} + {max_new_tokens} tokens; the model has positions for "
                f"{self.config.max_positions - extra}."
            )
        # Shorter prompts are padded behind their end; what they generate then overwrites the padding in the cache.
        ids = torch.tensor([prompt + [0] * (longest - len(prompt)) for prompt in prompts], device=device)
        caches = self.empty_caches(len(prompts), capacity)
        states = self.hidden_states(ids, caches, 0)
        states = states[torch.arange(len(prompts), device=device), tokens.long() - 1]
        # Equal lengths stay a number: it needs no look at the device.
        ragged = any(len(prompt) != longest for prompt in prompts)
        lengths: int | Tensor = tokens + extra if ragged else longest + extra
        stopped = torch.zeros(len(prompts), dtype=torch.bool, device=device)
        for i in range(max_new_tokens):
            token = sample(at_least_float32(self.head(states)), temperature, top_k, top_p, generator)
            if stop is not None:
                token = torch.where(stopped, stop, token)
                stopped |= token == stop
            yield token
            if i + 1 == max_new_tokens or (stop is not None and bool(stopped.all())):
                return
            states = self.hidden_states(token[:, None], caches, lengths)[:, 0]
            lengths = lengths + 1

    def generate(self, prompts: list[list[int]], max_new_tokens: int, **options: object) -> Tensor:
        """What ``stream`` yields, (batch, new tokens); same arguments."""
        tokens = list(self.stream(prompts, max_new_tokens, **options))  # type: ignore[arg-type]
        none = torch.empty(len(prompts), 0, dtype=torch.long, device=self.embedding.weight.device)
        return torch.stack(tokens, dim=1) if tokens else none


def sample(
    logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:  # fmt: skip
    """One token a row of (batch, vocab_size) logits: (batch,) int64; the options are those of ``Gpt.stream``.

    Raises: ValueError for a temperature below 0, a top_k below 1, or a top_p that is no probability.
    """
    if not (temperature >= 0 and (top_k is None or top_k >= 1) and (top_p is None or 0 <= top_p <= 1)):
        raise ValueError(
            f"sample: temperature must be at least 0, top_k at least 1 and top_p from 0 to 1, got temperature "
            f"{temperature}, top_k {top_k} and top_p {top_p}."
        )
    if temperature == 0:
        return logits.argmax(-1)
    # Of the likeliest 0 is left: however low the temperature, the others fall to -inf at most, and nothing becomes NaN.
    logits = (logits - logits.amax(-1, keepdim=True)) / max(temperature, torch.finfo(logits.dtype).tiny)
    if top_k is not None and top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    if top_p is not None and top_p < 1:
        ordered, order = logits.sort(descending=True)
        probabilities = ordered.softmax(-1)
        # A token stays if the likelier ones do not reach top_p, and the first, also where that is 0.
        dropped = probabilities.cumsum(-1) - probabilities >= top_p
        dropped[:, 0] = False
        logits = torch.empty_like(logits).scatter_(-1, order, ordered.masked_fill(dropped, -torch.inf))
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


def causal_lm_loss(model: nn.Module, input_ids: Tensor, ignore_index: int = -100) -> Tensor:
    """Mean cross-entropy, in nats, of every token after the first of (batch, seqlen)."""
    logits = model(input_ids[:, :-1])
    return F.cross_entropy(
        at_least_float32(logits.flatten(0, 1)), input_ids[:, 1:].flatten(), ignore_index=ignore_index
    )
