"""Decoding steps of the models, each against the same model on plain PyTorch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from types import MethodType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.case import Case, Subject, Verdict, as_accurate_as_eager
from bench.memory import peak_megabytes
from models.gpt import Gpt, GptConfig
from models.layers import Attention, KeyValueCache, set_backend
from models.transformer import Transformer, TransformerConfig

GROUP = "models"
# GPT-2's smallest; its weights are random, which changes nothing about the time.
GPT2 = GptConfig(dropout=0.0)
MIN_COSINE = 0.99


def cases() -> Iterator[Case]:
    for batch in (1, 8):
        for int8 in (False, True):
            yield decoding_step(batch, 512, int8)
    yield translation_step(4, 32)


# --- Generation ------------------------------------------------------------------------------------------------------


def decoding_step(batch: int, length: int, int8: bool) -> Case:
    """One token for each sequence behind ``length`` cached ones, logits included: the whole of a generated token.

    Peers, all in float32: SDPA on a cache that is written in place; plain PyTorch's attention on a cache that grows by
    torch.cat; the same on ours (fastattn's definition); and, once, a model that computes the whole sequence again.
    """

    def build() -> Subject:
        eager = set_backend(random_gpt(), "eager")
        ours = set_backend(copy.deepcopy(eager), "auto", int8=int8)
        sdpa = with_sdpa(copy.deepcopy(eager))
        ids = torch.randint(GPT2.vocab_size, (batch, length), generator=torch.Generator().manual_seed(1))
        token = ids[:, -1:]
        caches = filled_caches(eager, ids)

        @torch.no_grad()
        def step(model: Gpt, caches: list[KeyValueCache]) -> Tensor:
            return model(token, caches, length)[:, -1]

        @torch.no_grad()
        def without_cache() -> Tensor:
            return eager.head(eager.hidden_states(torch.cat([ids, token], 1))[:, -1])

        def exact() -> Tensor:
            wide = copy.deepcopy(eager).double()
            return step(wide, [KeyValueCache(cache.key.double(), cache.value.double()) for cache in caches])

        grown = with_growing_cache(copy.deepcopy(eager))
        run = {model: partial(step, model, copy.deepcopy(caches)) for model in (ours, eager, sdpa, grown)}
        peers = {"SDPA, cache": run[sdpa], "eager, torch.cat": run[grown], "eager, cache": run[eager]}
        if batch == 1 and not int8:
            peers["eager, no cache"] = without_cache
        check = similar_logits(run[ours], exact) if int8 else as_accurate_as_eager(run[ours], run[eager], exact)
        return Subject(run[ours], peers, with_memory(check, run[ours], run[sdpa]))

    weights = 12 * 12 * GPT2.dim**2 + GPT2.dim * GPT2.vocab_size
    cached = 2 * batch * length * GPT2.num_layers * GPT2.dim
    return Case(
        GROUP, "GPT-2 124M decoding", f"{batch}×1 behind {length}{', int8' if int8 else ''}", "float32", build,
        flops=2 * batch * weights + 2 * cached, bytes=(1 if int8 else 4) * weights + 4 * cached,
        compute_dtype="int8" if int8 else None, quick=batch == 1,
        headline=f"GPT-2 124M, a token{', int8' if int8 else ''}" if batch == 1 else "",
    )  # fmt: skip


def random_gpt() -> Gpt:
    torch.manual_seed(0)
    return Gpt(GPT2).eval().requires_grad_(False)


def filled_caches(model: Gpt, ids: Tensor) -> list[KeyValueCache]:
    caches = model.empty_caches(len(ids), ids.shape[1] + 16)
    with torch.no_grad():
        model.hidden_states(ids, caches, 0)
    return caches


def with_sdpa(model: nn.Module) -> nn.Module:
    """The model as libraries write it: F.scaled_dot_product_attention on a cache that is written in place."""

    def attend(self, query, key, value, attn_mask, is_causal):
        return F.scaled_dot_product_attention(query, key, value, attn_mask, self.dropout if self.training else 0.0,
                                              is_causal, enable_gqa=self.num_kv_heads != self.num_heads)  # fmt: skip

    def attend_cached(self, query, key, value, cache, lengths):
        end = lengths + query.shape[1]
        cache.key[:, lengths:end], cache.value[:, lengths:end] = key, value
        key, value = cache.key[:, :end].transpose(1, 2), cache.value[:, :end].transpose(1, 2)
        gqa = self.num_kv_heads != self.num_heads
        assert query.shape[1] == 1, "one query sees every key"
        return F.scaled_dot_product_attention(query.transpose(1, 2), key, value, enable_gqa=gqa).transpose(1, 2)

    for module in model.modules():
        if isinstance(module, Attention):
            module.attend = MethodType(attend, module)
            module.attend_cached = MethodType(attend_cached, module)
    return model


def with_growing_cache(model: nn.Module) -> nn.Module:
    """The model as one writes it first: scores, softmax and values one by one, on a cache that torch.cat makes anew."""

    def attend_cached(self, query, key, value, cache, lengths):
        key, value = torch.cat([cache.key[:, :lengths], key], 1), torch.cat([cache.value[:, :lengths], value], 1)
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        assert query.shape[2] == 1 and key.shape[1] == query.shape[1], "one query sees every key of its own head"
        weights = (query @ key.transpose(-1, -2) * self.head_dim**-0.5).softmax(-1)
        return (weights @ value).transpose(1, 2)

    for module in model.modules():
        if isinstance(module, Attention):
            module.attend_cached = MethodType(attend_cached, module)
    return model


def similar_logits(ours: Callable[[], Tensor], exact: Callable[[], Tensor]) -> Callable[[], Verdict]:
    def check() -> Verdict:
        least = F.cosine_similarity(ours().double(), exact(), dim=-1).min().item()
        assert least >= MIN_COSINE, f"cosine similarity of the logits to float64 is {least:.4f}, below {MIN_COSINE}"
        return Verdict(1 - least, 1 - MIN_COSINE, f"cosine to float64 {least:.4f}")

    return check


def with_memory(check: Callable[[], Verdict], ours: Callable, theirs: Callable) -> Callable[[], Verdict]:
    """The check, with both peaks of memory in its note."""

    def checked() -> Verdict:
        verdict = check()
        note = f"tensors at the peak: {peak_megabytes(ours):.1f} MB, PyTorch {peak_megabytes(theirs):.1f} MB"
        return verdict._replace(note="; ".join(filter(None, (verdict.note, note))))

    return checked


def translation_step(batch: int, length: int) -> Case:
    """One token for each of ``batch`` translations by the paper's base model, behind ``length`` tokens, of sources half
    of which are padding."""
    config = TransformerConfig(dropout=0.0)

    def build() -> Subject:
        torch.manual_seed(0)
        eager = set_backend(Transformer(config).eval().requires_grad_(False), "eager")
        ours = set_backend(copy.deepcopy(eager), "auto")
        source, target = translation_pairs(batch, 2 * length, length + 1, config)

        with torch.no_grad():
            memories, visible = eager.encode(source)
            caches = eager._empty_caches(batch, length + 16)
            eager.decode(target[:, :length], memories, visible, caches)

        @torch.no_grad()
        def step(model: Transformer, dtype: torch.dtype = torch.float32) -> Tensor:
            return model.decode(target[:, length:], *inputs[dtype], length)[:, -1]

        inputs = {
            dtype: (
                [(key.to(dtype), value.to(dtype)) for key, value in memories],
                visible,
                [KeyValueCache(cache.key.to(dtype), cache.value.to(dtype)) for cache in caches],
            )
            for dtype in (torch.float32, torch.float64)
        }
        check = as_accurate_as_eager(
            partial(step, ours), partial(step, eager), lambda: step(copy.deepcopy(eager).double(), torch.float64)
        )
        peers = {"SDPA": partial(step, with_sdpa(copy.deepcopy(eager))), "eager": partial(step, eager)}
        return Subject(partial(step, ours), peers, check)

    decoder = config.num_decoder_layers * (6 * config.dim**2 + 2 * config.dim * config.hidden_dim)
    weights = decoder + config.dim * config.vocab_size
    return Case(
        GROUP, "Transformer decoding", f"{batch}×1 behind {length}, source {2 * length} padded", "float32", build,
        flops=2 * batch * weights, bytes=4 * weights,
    )  # fmt: skip


def translation_pairs(
    batch: int, source_length: int, target_length: int, config: TransformerConfig
) -> tuple[Tensor, Tensor]:
    """Random ids: sources of lengths spread evenly, half of the whole; targets without padding."""
    generator = torch.Generator().manual_seed(1)
    source = torch.randint(3, config.vocab_size, (batch, source_length), generator=generator)
    lengths = torch.linspace(source_length / (2 * batch), source_length * (1 - 1 / (2 * batch)), batch).long()
    source[torch.arange(source_length) >= lengths[:, None]] = config.pad_id
    target = torch.randint(3, config.vocab_size, (batch, target_length), generator=generator)
    target[:, 0] = config.start_id
    return source, target
