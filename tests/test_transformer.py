"""models.transformer: the encoder-decoder's formulas, its searches, and translation learned by heart."""

from __future__ import annotations

import math

import pytest
import torch
from accuracy import assert_model_as_accurate_as_eager
from devices import dtype_for, triton_is_slow

import fastattn
from models import data, measures
from models.layers import set_backend
from models.training import TrainingConfig, train
from models.transformer import Transformer, TransformerConfig, sinusoidal_positions, translation_loss

pytestmark = pytest.mark.usefixtures("tensors_where_the_backend_runs")
KERNELS = [name for name in ("cpu", "cuda", "triton") if fastattn.available_backends()[name] is None]
TINY = {"vocab_size": 60, "dim": 32, "num_encoder_layers": 2, "num_decoder_layers": 2, "num_heads": 4, "hidden_dim": 48}


def make(backend: str = "auto", **options) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(TransformerConfig(**(TINY | {"dropout": 0.0} | options))).eval()
    return set_backend(model, backend)


def batch_of_ids() -> tuple[torch.Tensor, torch.Tensor]:
    source, target = torch.randint(3, 60, (3, 11)), torch.randint(3, 60, (3, 9))
    source[1, 6:] = 0
    target[:, 0] = 1
    target[2, 5:] = 0
    return source, target


# Interpreted, a model takes many seconds.
QUICK_KERNELS = [backend for backend in KERNELS if backend != "triton" or not triton_is_slow()]


@pytest.mark.parametrize(
    "pre_norm, backend", [(True, backend) for backend in KERNELS] + [(False, backend) for backend in QUICK_KERNELS]
)
def test_kernels_are_as_accurate_as_eager(pre_norm, backend):
    source, target = batch_of_ids()
    outcomes = []
    dtype = dtype_for(backend)
    options = {"pre_norm": pre_norm, "activation": "relu" if dtype == torch.float32 else "gelu"}
    models = [make(name, **options).to(dtype) for name in (backend, "eager", "eager")]
    for model in (*models[:2], models[2].double()):
        loss = translation_loss(model, source, target, 0)
        outcomes.append([model(source, target), loss, *torch.autograd.grad(loss, list(model.parameters()))])
    assert_model_as_accurate_as_eager(*outcomes)


def test_is_the_paper_s_layer():
    """One post-norm layer of each kind against torch.nn's, which share weights with it."""
    model = make("eager", num_encoder_layers=1, num_decoder_layers=1)
    theirs = torch.nn.Transformer(32, 4, 1, 1, 48, 0.0, "relu", batch_first=True).eval()
    encoder, decoder = theirs.encoder.layers[0], theirs.decoder.layers[0]
    # torch.nn puts one more norm behind each stack.
    theirs.encoder.norm = theirs.decoder.norm = None
    pairs = [(encoder.self_attn, model.encoder[0].attention), (decoder.self_attn, model.decoder[0].attention),
             (decoder.multihead_attn, model.decoder[0].cross_attention)]  # fmt: skip
    for nn_attention, ours in pairs:
        for name, part in zip("qkv", nn_attention.in_proj_weight.data.chunk(3), strict=True):
            getattr(ours, f"{name}_proj").weight.data = part.clone()
            getattr(ours, f"{name}_proj").bias.data = torch.zeros(32)
        torch.nn.init.zeros_(nn_attention.in_proj_bias)
        ours.out_proj.load_state_dict(nn_attention.out_proj.state_dict())
    for layer, ours in ((encoder, model.encoder[0]), (decoder, model.decoder[0])):
        ours.feed_forward.up.load_state_dict(layer.linear1.state_dict())
        ours.feed_forward.down.load_state_dict(layer.linear2.state_dict())
    source, target = batch_of_ids()

    def embed(ids):
        return model.embedding(ids) * math.sqrt(32) + model.positions[: ids.shape[1]]

    causal = torch.nn.Transformer.generate_square_subsequent_mask(target.shape[1])
    states = theirs(
        embed(source), embed(target), tgt_mask=causal, src_key_padding_mask=source == 0,
        memory_key_padding_mask=source == 0, tgt_is_causal=True,
    )  # fmt: skip
    torch.testing.assert_close(model(source, target), states @ model.embedding.weight.T, atol=2e-5, rtol=2e-5)


def test_positions_are_the_paper_s():
    table = sinusoidal_positions(50, 8)
    assert table[7, 4].item() == pytest.approx(math.sin(7 / 10000 ** (4 / 8)), abs=1e-7)
    assert table[7, 5].item() == pytest.approx(math.cos(7 / 10000 ** (4 / 8)), abs=1e-7)


def test_padding_changes_nothing():
    model = make()
    source, target = batch_of_ids()
    alone = model(source[1:2, :6], target[1:2])
    torch.testing.assert_close(model(source, target)[1:2], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pre_norm", [False, True])
def test_greedy_search_takes_the_likeliest_token(pre_norm):
    model = make(pre_norm=pre_norm)
    source, _ = batch_of_ids()
    for row, tokens in zip(source, model.translate(source, 6), strict=True):
        target = [1]
        for token in tokens:
            logits = model(row[None], torch.tensor([target]))[0, -1]
            assert logits.argmax().item() == token
            target.append(token)


def log_probability(model, source, tokens, length_penalty=0.6):
    ends = len(tokens) < 5
    target = torch.tensor([[1, *tokens, *([2] if ends else [])]])
    logits = model(source[None], target[:, :-1]).log_softmax(-1)
    total = logits.gather(-1, target[:, 1:, None]).sum().item()
    return total / ((5 + target.shape[1] - 1) / 6) ** length_penalty


def test_beam_search_finds_what_is_at_least_as_likely():
    model = make()
    with torch.no_grad():
        model.head.weight[2] *= 3  # so that some hypotheses stop
    source, _ = batch_of_ids()
    greedy, beams = model.translate(source, 5), model.translate(source, 5, beams=8)
    gains = [
        log_probability(model, row, best) - log_probability(model, row, first)
        for row, best, first in zip(source, beams, greedy, strict=True)
    ]
    assert min(gains) > -1e-4
    assert model.translate(source[:1], 5, beams=8) == beams[:1], "the batch changes the search"


def beam_search_by_definition(model, source, tokens, beams):
    """Of one sentence, without a cache."""
    alive, finished = [(0.0, [])], []
    for length in range(tokens):
        candidates = []
        for score, hypothesis in alive:
            logits = model(source[None], torch.tensor([[1, *hypothesis]]))[0, -1].log_softmax(-1)
            candidates += [(score + logit, hypothesis, token) for token, logit in enumerate(logits.tolist())]
        candidates.sort(key=lambda candidate: -candidate[0])
        finished += [(s / ((6 + length) / 6) ** 0.6, h) for s, h, token in candidates[:beams] if token == 2]
        alive = [(s, [*h, token]) for s, h, token in candidates if token != 2][:beams]
        if len(finished) >= beams:
            break
    return max(finished or alive)[1]


@pytest.mark.parametrize("seed, vocab_size, beams, tokens", [(4, 4, 8, 5), (8, 5, 2, 4), (2, 9, 3, 6)])
@torch.no_grad()
def test_beam_search_is_that_of_each_sentence(seed, vocab_size, beams, tokens):
    """Sentences that were done went on with others of the batch; beams that were none yet ended a search."""
    model = make(vocab_size=vocab_size, num_encoder_layers=1, num_decoder_layers=1)
    torch.manual_seed(seed)
    model.embedding.weight.normal_()
    model.embedding.weight[2] *= 1.5
    source = torch.randint(3, vocab_size, (6, 5))
    source[1, 3:] = 0
    expected = [beam_search_by_definition(model, row, tokens, beams) for row in source]
    assert model.translate(source, tokens, beams=beams) == expected


def test_searches_of_no_tokens_find_nothing():
    model, (source, _) = make(), batch_of_ids()
    assert model.translate(source, 0) == model.translate(source, 0, beams=2) == [[], [], []]
    for tokens, beams in ((-1, 2), (3, 0)):
        with pytest.raises(ValueError, match="max_new_tokens must be at least 0 and beams at least 1"):
            model.translate(source, tokens, beams=beams)


def test_beam_search_is_exhaustive_where_beams_cover_everything():
    model = make(vocab_size=5)
    source = torch.tensor([[3, 4, 3]])
    found = model.translate(source, 2, beams=25)[0]
    everything = [[], *([a] for a in (0, 1, 3, 4)), *([a, b] for a in (0, 1, 3, 4) for b in (0, 1, 3, 4))]

    def score(tokens):
        ends = len(tokens) < 2
        target = torch.tensor([[1, *tokens, *([2] if ends else [])]])
        logits = model(source, target[:, :-1]).log_softmax(-1)
        return logits.gather(-1, target[:, 1:, None]).sum().item() / ((5 + target.shape[1] - 1) / 6) ** 0.6

    finished = [tokens for tokens in everything if len(tokens) < 2]
    assert score(found) >= max(map(score, finished)) - 1e-5


def test_learns_fifty_real_pairs_by_heart():
    pairs = [pair for pair in data.load_pairs(None) if 10 < len(pair[0]) < 40][:50]
    tokenizer = data.train_tokenizer((text for pair in pairs for text in pair), 500, framed=True)
    config = TransformerConfig(
        vocab_size=tokenizer.get_vocab_size(), max_positions=64, dim=96, num_encoder_layers=2, num_decoder_layers=2,
        num_heads=4, hidden_dim=192, dropout=0.0, pre_norm=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = set_backend(Transformer(config))
    examples = measures.translation_data(tokenizer, pairs, 64, 25)
    loop = TrainingConfig(steps=260, learning_rate=3e-3, warmup_steps=20, weight_decay=0.0)
    train(model, lambda m, b: translation_loss(m, b["source"], b["target"], 0, 0.0), examples, loop)
    sources = data.pad(data.encode(tokenizer, [source for source, _ in pairs], 64))
    translations = [tokenizer.decode(tokens) for tokens in model.translate(sources, 60)]
    assert translations == [target for _, target in pairs]
