"""models.gpt: the formulas of its two dialects, the cache, and sampling."""

from __future__ import annotations

import pytest
import torch
from accuracy import assert_as_accurate_as_eager, assert_model_as_accurate_as_eager
from devices import dtype_for

import fastattn
from models.gpt import Gpt, GptConfig, causal_lm_loss, sample
from models.gpt_weights import config_from_dict, convert_state_dict
from models.layers import set_backend

pytestmark = pytest.mark.usefixtures("tensors_where_the_backend_runs")
KERNELS = [name for name in ("cpu", "cuda", "triton") if fastattn.available_backends()[name] is None]
TINY = {"vocab_size": 61, "max_positions": 48, "dim": 32, "num_heads": 4, "hidden_dim": 48, "dropout": 0.0}
CONFIGS = {
    "gpt2": GptConfig(num_layers=2, **TINY),
    "llama": GptConfig.llama(num_layers=2, num_kv_heads=2, **TINY),
    "window": GptConfig.llama(num_layers=2, window=5, **TINY),
    "shared": GptConfig(num_layers=4, share_layers=2, **TINY),
    "prompt": GptConfig(num_layers=2, prompt_tokens=3, **TINY),
    "prompt_llama": GptConfig.llama(num_layers=2, prompt_tokens=3, num_kv_heads=1, **TINY),
}


def make(config: GptConfig, backend: str = "auto") -> Gpt:
    torch.manual_seed(0)
    model = Gpt(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
    return set_backend(model, backend)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("name", CONFIGS)
def test_kernels_are_as_accurate_as_eager(name, backend):
    config = CONFIGS[name]
    ids = torch.randint(config.vocab_size, (3, 17))
    outcomes = []
    models = [make(config, name).to(dtype_for(backend)) for name in (backend, "eager", "eager")]
    for model in (*models[:2], models[2].double()):
        logits = model(ids)
        gradients = torch.autograd.grad(causal_lm_loss(model, ids), list(model.parameters()))
        outcomes.append([logits, *gradients])
    assert_model_as_accurate_as_eager(*outcomes)


def test_backends_share_the_state_dict():
    before = make(CONFIGS["gpt2"], "eager").state_dict()
    after = make(CONFIGS["gpt2"], "cpu" if "cpu" in KERNELS else "eager").state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("backend", [*KERNELS, "eager"])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_cache_continues_as_the_whole_sequence_does(name, backend):
    model, dtype = make(CONFIGS[name], backend).to(dtype_for(backend)), dtype_for(backend)
    prompts = [[5, 9, 2], [7, 7, 1, 30, 8, 44], [3]]
    # Triton's interpreter takes half a second a token.
    tokens = 2 if backend == "triton" and not torch.cuda.is_available() else 8
    generated = model.generate(prompts, tokens, temperature=0)
    assert generated.shape == (3, tokens)
    for prompt, tokens in zip(prompts, generated.tolist(), strict=True):
        sequence = list(prompt)
        for token in tokens:
            with torch.no_grad():
                logits = model(torch.tensor([sequence]))[0, -1]
            # In 16 bits two tokens may be equally likely but for rounding.
            assert logits[token] >= logits.max() - (0.0 if dtype == torch.float32 else 0.03)
            sequence.append(token)


def test_a_stopped_sequence_stays_stopped():
    model = make(CONFIGS["gpt2"])
    free = model.generate([[5, 9], [8, 8]], 6, temperature=0)
    stop = free[0, 2].item()
    tokens = model.generate([[5, 9], [8, 8]], 6, temperature=0, stop=stop).tolist()
    for row, unstopped in zip(tokens, free.tolist(), strict=True):
        end = row.index(stop) if stop in row else len(row)
        assert row[:end] == unstopped[:end]
        assert set(row[end:]) <= {stop}
    assert stop in tokens[0]


@pytest.mark.parametrize("temperature", [1e-6, 1e-40, 1e-60, 5e-324])
def test_at_a_temperature_close_to_0_the_likeliest_token_is_sampled(temperature):
    logits = torch.tensor([[1.0, 3.0, 2.0], [-1e30, -2e30, -torch.inf]])
    assert sample(logits, temperature).tolist() == [1, 0]


def test_sampling_keeps_to_top_k_and_top_p():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().expand(4000, 4)
    assert sample(logits, top_k=2).unique().tolist() == [0, 1]
    assert sample(logits, top_p=0.6).unique().tolist() == [0, 1]
    assert sample(logits, top_p=0.5).unique().tolist() == [0]
    assert sample(logits, temperature=0).unique().tolist() == [0]
    shares = sample(logits).bincount(minlength=4) / 4000
    torch.testing.assert_close(shares, torch.tensor([0.5, 0.3, 0.15, 0.05]), atol=0.04, rtol=0)


def test_no_tokens_and_no_probability_are_limits_too():
    model = make(CONFIGS["gpt2"])
    assert model.generate([[1, 2], [3]], 0).shape == (2, 0)
    logits = torch.tensor([[0.5, 0.3, 0.2]]).log().expand(50, 3)
    assert sample(logits, top_p=0.0).unique().tolist() == [0]
    for options in ({"temperature": -1.0}, {"temperature": float("nan")}, {"top_k": 0}, {"top_p": 1.5}):
        with pytest.raises(ValueError, match="sample: temperature must be at least 0, top_k at least 1 and top_p"):
            sample(logits, **options)
    with pytest.raises(ValueError, match="max_new_tokens must be at least 0, got -1"):
        model.generate([[1]], -1)


def test_one_seed_gives_one_text():
    model = make(CONFIGS["llama"])
    texts = [model.generate([[1, 2]], 10, generator=torch.Generator().manual_seed(4)) for _ in range(2)]
    assert torch.equal(*texts)
    assert not torch.equal(texts[0], model.generate([[1, 2]], 10, generator=torch.Generator().manual_seed(5)))


def test_int8_follows_float():
    model, quantised = make(CONFIGS["llama"]), set_backend(make(CONFIGS["llama"]), int8=True)
    assert not [m for m in quantised.modules() if type(m) is torch.nn.Linear]
    ids = torch.randint(61, (2, 20))
    with torch.no_grad():
        similarity = torch.nn.functional.cosine_similarity(model(ids), quantised(ids), dim=-1)
    assert similarity.min() > 0.98


def test_names_what_is_wrong():
    model = make(CONFIGS["gpt2"])
    with pytest.raises(ValueError, match="49 tokens; the model has positions for 48"):
        model(torch.zeros(1, 49, dtype=torch.long))
    with pytest.raises(ValueError, match="40 \\+ 20 tokens; the model has positions for 48"):
        model.generate([[1] * 40], 20)
    with pytest.raises(ValueError, match="at least one token"):
        model.generate([[1], []], 4)
    with pytest.raises(ValueError, match="num_layers 3 must be a multiple of share_layers 2"):
        GptConfig(num_layers=3, share_layers=2)
    with pytest.raises(ValueError, match="backend must be one of"):
        set_backend(model, "tpu")


# --- Hugging Face ----------------------------------------------------------------------------------------------------


def test_reproduces_hugging_face_gpt2():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=61, n_positions=48, n_embd=32, n_layer=2, n_head=4)
    ).eval()
    assert_same_logits(theirs)


@pytest.mark.parametrize("tied", [False, True])
def test_reproduces_hugging_face_llama(tied):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=61, max_position_embeddings=48, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, intermediate_size=48, tie_word_embeddings=tied,
        )
    ).eval()  # fmt: skip
    assert_same_logits(theirs)


def assert_same_logits(theirs: torch.nn.Module) -> None:
    config = config_from_dict(theirs.config.to_dict())
    ours = Gpt(config).eval()
    ours.load_state_dict(convert_state_dict(theirs.state_dict(), config))
    ids = torch.randint(61, (2, 19))
    with torch.no_grad():
        expected, exact = theirs(ids).logits, theirs.double()(ids).logits
        assert_as_accurate_as_eager(ours(ids), expected, exact)


def test_reproduces_hugging_face_gpt2_with_a_head_of_its_own():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    sizes = {"vocab_size": 61, "n_positions": 48, "n_embd": 32, "n_layer": 2, "n_head": 4}
    assert_same_logits(transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, tie_word_embeddings=False)).eval())


def test_unknown_hugging_face_features_are_refused():
    with pytest.raises(ValueError, match="model_type must be 'gpt2' or 'llama', got 'opt'"):
        config_from_dict({"model_type": "opt"})
    with pytest.raises(ValueError, match="rope_type 'yarn' is not supported"):
        config_from_dict({"model_type": "llama", "rope_parameters": {"rope_type": "yarn"}})
    with pytest.raises(ValueError, match="rope_type 'linear' is not supported"):
        config_from_dict({"model_type": "llama", "rope_scaling": {"type": "linear"}})
    with pytest.raises(ValueError, match=r"quantization_config .*fp8.* is not supported"):
        config_from_dict({"model_type": "llama", "quantization_config": {"quant_method": "fp8"}})
    with pytest.raises(ValueError, match="activation_function 'relu' is not supported"):
        config_from_dict({"model_type": "gpt2", "activation_function": "relu"})
