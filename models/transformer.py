"""The Transformer of Vaswani et al. 2017 (arXiv:1706.03762): an encoder and a decoder, for translation.

Post-norm as in the paper, or pre-norm (arXiv:2002.04745); sinusoidal positions; one embedding matrix for source, target
and output, as in the paper's section 3.4. Greedy and beam search decode with a cache.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers import Attention, FeedForward, KeyValueCache, Norm, at_least_float32

Memory = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class TransformerConfig:
    """The shape of an encoder-decoder; the defaults are the paper's base model."""

    vocab_size: int = 37000
    max_positions: int = 512
    dim: int = 512
    num_encoder_layers: int = 6
    num_decoder_layers: int = 6
    num_heads: int = 8
    hidden_dim: int = 2048
    activation: str = "relu"
    pre_norm: bool = False
    dropout: float = 0.1
    pad_id: int = 0
    start_id: int = 1
    stop_id: int = 2

    def __post_init__(self) -> None:
        if self.max_positions < 1 or max(self.pad_id, self.start_id, self.stop_id) >= self.vocab_size:
            raise ValueError(
                "TransformerConfig: max_positions must be at least 1, and pad_id, start_id, stop_id below vocab_size "
                f"{self.vocab_size}, got {self.max_positions}, {self.pad_id}, {self.start_id} and {self.stop_id}."
            )


def sinusoidal_positions(max_positions: int, dim: int) -> Tensor:
    """(max_positions, dim): sine in the even columns, cosine in the odd ones (section 3.5)."""
    position = torch.arange(max_positions, dtype=torch.float64)[:, None]
    frequency = 10000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    table = torch.empty(max_positions, dim, dtype=torch.float64)
    table[:, 0::2] = (position * frequency).sin()
    table[:, 1::2] = (position * frequency).cos()[:, : dim // 2]
    return table.float()


class Sublayer(nn.Module):
    """What stands around attention and feed-forward: dropout, the residual and a norm, before or after."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.norm = Norm(config.dim)
        self.pre_norm, self.dropout_p = config.pre_norm, config.dropout

    def before(self, x: Tensor) -> Tensor:
        return self.norm(x) if self.pre_norm else x

    def after(self, branch: Tensor, x: Tensor) -> Tensor:
        if self.pre_norm:
            return x + F.dropout(branch, self.dropout_p, self.training)
        return self.norm.add(branch, x, self.dropout_p)[0]


class EncoderLayer(nn.Module):
    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.attention = Attention(config.dim, config.num_heads, dropout=config.dropout)
        self.feed_forward = FeedForward(config.dim, config.hidden_dim, config.activation)
        self.around_attention, self.around_feed_forward = Sublayer(config), Sublayer(config)

    def forward(self, x: Tensor, visible: Tensor | None) -> Tensor:
        attended = self.attention(self.around_attention.before(x), attn_mask=visible)
        x = self.around_attention.after(attended, x)
        return self.around_feed_forward.after(self.feed_forward(self.around_feed_forward.before(x)), x)


class DecoderLayer(nn.Module):
    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.attention = Attention(config.dim, config.num_heads, dropout=config.dropout)
        self.cross_attention = Attention(config.dim, config.num_heads, dropout=config.dropout)
        self.feed_forward = FeedForward(config.dim, config.hidden_dim, config.activation)
        self.around_attention, self.around_cross, self.around_feed_forward = (Sublayer(config) for _ in range(3))

    def forward(
        self, x: Tensor, memory: Memory, visible: Tensor | None, cache: KeyValueCache | None, length: int
    ) -> Tensor:
        normed = self.around_attention.before(x)
        if cache is None:
            attended = self.attention(normed, is_causal=True)
        else:
            attended = self.attention.extend(normed, cache, length)
        x = self.around_attention.after(attended, x)
        attended = self.cross_attention(self.around_cross.before(x), memory=memory, attn_mask=visible)
        x = self.around_cross.after(attended, x)
        return self.around_feed_forward.after(self.feed_forward(self.around_feed_forward.before(x)), x)


class Transformer(nn.Module):
    """Source ids and the target so far to logits of the target's next token."""

    positions: Tensor

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.encoder = nn.ModuleList(EncoderLayer(config) for _ in range(config.num_encoder_layers))
        self.decoder = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_decoder_layers))
        # Pre-norm leaves the residual stream unnormalised at its end.
        self.encoder_norm = Norm(config.dim) if config.pre_norm else nn.Identity()
        self.decoder_norm = Norm(config.dim) if config.pre_norm else nn.Identity()
        self.head = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.dropout = nn.Dropout(config.dropout)
        self.register_buffer("positions", sinusoidal_positions(config.max_positions, config.dim), persistent=False)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        nn.init.normal_(self.embedding.weight, std=config.dim**-0.5)
        self.head.weight = self.embedding.weight

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """(batch, seqlen_source) and (batch, seqlen_target) ids to (batch, seqlen_target, vocab_size) logits.

        Sources may end in ``pad_id``. Raises: ValueError if the positions do not reach that far.
        """
        memories, visible = self.encode(source)
        return self.decode(target, memories, visible)

    def encode(self, source: Tensor) -> tuple[list[Memory], Tensor]:
        """Keys and values of the source for each decoder layer, and which of them are no padding."""
        visible = (source != self.config.pad_id)[:, None, None, :]
        x = self._embed(source, 0)
        for layer in self.encoder:
            x = layer(x, visible)
        x = self.encoder_norm(x)
        return [layer.cross_attention.project(x) for layer in self.decoder], visible

    def decode(
        self, target: Tensor, memories: list[Memory], visible: Tensor, caches: list[KeyValueCache] | None = None,
        length: int = 0,
    ) -> Tensor:  # fmt: skip
        """Logits of (batch, seqlen) target ids, which stand behind the ``length`` tokens of the caches."""
        x = self._embed(target, length)
        for i, layer in enumerate(self.decoder):
            x = layer(x, memories[i], visible, None if caches is None else caches[i], length)
        return self.head(self.decoder_norm(x))

    def _embed(self, ids: Tensor, length: int) -> Tensor:
        end, limit = length + ids.shape[1], self.config.max_positions
        if end > limit:
            raise ValueError(f"Transformer: {end} tokens; the model has positions for {limit}.")
        return self.dropout(self.embedding(ids) * math.sqrt(self.config.dim) + self.positions[length:end])

    # --- Search ------------------------------------------------------------------------------------------------------

    def translate(
        self, source: Tensor, max_new_tokens: int, *, beams: int = 1, length_penalty: float = 0.6
    ) -> list[list[int]]:
        """Target ids of each row of ``source``, without the start and stop tokens: greedy, or with ``beams`` > 1 the
        best hypothesis of a beam search.

        Raises: ValueError for fewer than no tokens, or no beams.
        """
        if max_new_tokens < 0 or beams < 1:
            raise ValueError(
                f"Transformer.translate: max_new_tokens must be at least 0 and beams at least 1, got {max_new_tokens} "
                f"and {beams}."
            )
        if beams == 1:
            return self.greedy_search(source, max_new_tokens)
        return self.beam_search(source, max_new_tokens, beams, length_penalty)

    @torch.no_grad()
    def greedy_search(self, source: Tensor, max_new_tokens: int) -> list[list[int]]:
        memories, visible = self.encode(source)
        caches = self._empty_caches(len(source), max_new_tokens)
        token = source.new_full((len(source), 1), self.config.start_id)
        stopped = torch.zeros_like(token, dtype=torch.bool)
        tokens = [token[:, :0]]
        for length in range(max_new_tokens):
            token = self.decode(token, memories, visible, caches, length)[:, -1:].argmax(-1)
            token = token.masked_fill(stopped, self.config.stop_id)
            stopped |= token == self.config.stop_id
            tokens.append(token)
            if bool(stopped.all()):
                break
        return [self._until_stop(row) for row in torch.cat(tokens, 1).tolist()]

    @torch.no_grad()
    def beam_search(
        self, source: Tensor, max_new_tokens: int, beams: int, length_penalty: float = 0.6
    ) -> list[list[int]]:
        """The hypotheses of best log-probability / ((5 + length) / 6)^length_penalty (Wu et al. 2016, eq. 14)."""
        batch, device = len(source), source.device
        memories, visible = self.encode(source.repeat_interleave(beams, 0))
        caches = self._empty_caches(batch * beams, max_new_tokens)
        # Before the first step all beams are equal: only one may be continued.
        scores = torch.full((batch, beams), -torch.inf, device=device)
        scores[:, 0] = 0.0
        history = torch.empty(batch, beams, 0, dtype=torch.long, device=device)
        token = source.new_full((batch * beams, 1), self.config.start_id)
        finished: list[list[tuple[float, list[int]]]] = [[] for _ in range(batch)]
        first = torch.arange(batch, device=device)[:, None] * beams
        for length in range(max_new_tokens):
            logits = at_least_float32(self.decode(token, memories, visible, caches, length)[:, -1])
            candidates = scores[:, :, None] + logits.log_softmax(-1).view(batch, beams, self.config.vocab_size)
            # Twice as many as beams: even if every beam stops, as many go on.
            best, index = candidates.flatten(1).topk(2 * beams)
            origin, choice = index // self.config.vocab_size, index % self.config.vocab_size
            stops = choice == self.config.stop_id
            penalty = ((6 + length) / 6) ** length_penalty
            # Best first. Beams that are none yet, of probability 0, end nothing; and a sentence that has its hypotheses
            # takes no more while others of the batch go on.
            for row, rank in (stops & best.isfinite())[:, :beams].nonzero().tolist():
                if len(finished[row]) < beams:
                    hypothesis = history[row, origin[row, rank]].tolist()
                    finished[row].append((best[row, rank].item() / penalty, hypothesis))
            # The best that go on, in order.
            kept = best.masked_fill(stops, -torch.inf).topk(beams)
            origin, choice = origin.gather(1, kept.indices), choice.gather(1, kept.indices)
            scores = kept.values
            history = torch.cat([history.gather(1, origin[:, :, None].expand_as(history)), choice[:, :, None]], -1)
            caches = [cache.select((first + origin).flatten()) for cache in caches]
            token = choice.reshape(-1, 1)
            if all(len(found) >= beams for found in finished):
                break
        penalty = ((5 + history.shape[-1]) / 6) ** length_penalty
        for row, found in enumerate(finished):
            if not found:
                found.append((scores[row, 0].item() / penalty, history[row, 0].tolist()))
        return [max(found)[1] for found in finished]

    def _empty_caches(self, batch: int, capacity: int) -> list[KeyValueCache]:
        like = self.embedding.weight
        return [KeyValueCache.empty(batch, capacity, layer.attention, like) for layer in self.decoder]

    def _until_stop(self, tokens: list[int]) -> list[int]:
        return tokens[: tokens.index(self.config.stop_id)] if self.config.stop_id in tokens else tokens


def translation_loss(
    model: nn.Module, source: Tensor, target: Tensor, pad_id: int, label_smoothing: float = 0.1
) -> Tensor:
    """Label-smoothed cross-entropy (section 5.4) of every token of ``target`` after its first, padding left out."""
    logits = model(source, target[:, :-1])
    return F.cross_entropy(
        at_least_float32(logits.flatten(0, 1)),
        target[:, 1:].flatten(),
        ignore_index=pad_id,
        label_smoothing=label_smoothing,
    )
