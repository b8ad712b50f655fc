"""accelerate on models of transformers: their norms and Conv1D, the rule for INT8, the report."""

import copy
import pickle

import pytest
import torch
from torch import nn

import fastattn
from fastattn import Int8Linear, modules_foreign
from fastattn.modules_foreign import ForeignNorm, norm_swap

transformers = pytest.importorskip("transformers")

from transformers_models import make_inputs, make_model  # noqa: E402


def norm_classes() -> dict[str, type[nn.Module]]:
    from transformers.models.cohere.modeling_cohere import CohereLayerNorm
    from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm
    from transformers.models.t5.modeling_t5 import T5LayerNorm

    return {
        "llama": LlamaRMSNorm, "gemma2": Gemma2RMSNorm, "gpt_oss": GptOssRMSNorm, "t5": T5LayerNorm,
        "cohere": CohereLayerNorm,
    }  # fmt: skip


def make_norm(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    norm = norm_classes()[name](48, eps=1e-3)
    nn.init.uniform_(norm.weight)
    return norm.to(dtype)


NORMS = ("llama", "gemma2", "gpt_oss", "t5", "cohere")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weight_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NORMS)
def test_norms_keep_their_formula_and_dtype(name, weight_dtype, dtype):
    norm = make_norm(name, weight_dtype)
    x = (0.05 * torch.randn(2, 7, 48)).to(dtype)
    expected = norm(x)
    exact = copy.deepcopy(norm).double()
    swapped = fastattn.accelerate(copy.deepcopy(norm))
    assert isinstance(swapped, ForeignNorm)
    actual = swapped(x)
    assert actual.dtype == expected.dtype
    # Classes that compute in float32 do so for float64 too: a rounding of float32 is allowed besides.
    reference = exact(x.double()).double()
    error, theirs = ((y.double() - reference).abs().max() for y in (actual, expected))
    assert error <= 2 * theirs + 2 * torch.finfo(torch.float32).eps * reference.abs().max()


@pytest.mark.parametrize("name", NORMS)
def test_gradients_of_norms_match(name):
    norm = make_norm(name)
    swapped = fastattn.accelerate(copy.deepcopy(norm))
    gradients = []
    x, dout = torch.randn(2, 3, 48), torch.randn(2, 3, 48)
    for module in (norm, swapped):
        leaf = x.clone().requires_grad_()
        gradients.append(torch.autograd.grad(module(leaf), (leaf, module.weight), dout))
    for actual, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_swapped_norms_survive_copies_and_are_restored():
    norm = make_norm("gemma2")
    weight, before = norm.weight, dict(norm.__dict__)
    fastattn.accelerate(norm)
    x = torch.randn(4, 48)
    for twin in (copy.deepcopy(norm), pickle.loads(pickle.dumps(norm))):
        assert torch.equal(twin(x), norm(x))
    assert "RMS norm of 48, eps=0.001, weight + 1" in repr(norm)
    assert torch.equal(torch.compile(copy.deepcopy(norm), fullgraph=True, backend="aot_eager")(x), norm(x))
    fastattn.restore(norm)
    assert type(norm) is norm_classes()["gemma2"] and norm.weight is weight and dict(norm.__dict__) == before


@pytest.mark.parametrize("device, dtype", [("meta", torch.float32), ("cpu", torch.float64), ("cpu", torch.bfloat16)])
def test_norms_are_known_whatever_the_defaults(device, dtype, monkeypatch):
    """As after torch.set_default_device("cuda"), which is where a model is made, but not where norms are tried out."""
    norm = make_norm("llama")
    monkeypatch.setattr(modules_foreign, "_known", {})
    before = torch.get_default_dtype()
    try:
        torch.set_default_device(device)
        torch.set_default_dtype(dtype)
        assert isinstance(fastattn.accelerate(norm), ForeignNorm)
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(before)


class AnotherNorm(nn.Module):
    """A norm that is none of the formulas: it takes the mean of absolute values."""

    def __init__(self):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(8)), 1e-5

    def forward(self, x):
        return x / (x.abs().mean(-1, keepdim=True) + self.eps) * self.weight


class NormThatAddsEpsLast(AnotherNorm):
    def forward(self, x):
        return x / (x.square().mean(-1, keepdim=True).sqrt() + self.eps) * self.weight


class NormWithResidual(AnotherNorm):
    def forward(self, x, residual=None):
        return super().forward(x)


class NormWithMethods(AnotherNorm):
    def fused(self, x):
        return x


class NormOfOneDtype(AnotherNorm):
    """As F.layer_norm, it raises where the dtypes of input and weight differ, on some devices or on all."""

    def forward(self, x):
        if x.dtype != self.weight.dtype:
            raise RuntimeError("expected scalar type")
        return torch.nn.functional.layer_norm(x, (8,), self.weight, None, self.eps)


def test_a_norm_that_takes_one_dtype_is_swapped():
    norm, x = NormOfOneDtype(), torch.randn(3, 8)
    expected = norm(x)
    assert isinstance(fastattn.accelerate(norm), ForeignNorm) and norm.formula.centred
    torch.testing.assert_close(norm(x), expected)
    assert norm.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "kind, reason",
    [
        (AnotherNorm, "its result is neither"),
        (NormThatAddsEpsLast, "its result is neither"),
        (NormWithResidual, "its forward takes more than the input"),
        (NormWithMethods, "it has fused"),
    ],
)
def test_norms_that_differ_are_left_with_the_reason(kind, reason):
    model = fastattn.accelerate(nn.Sequential(kind()))
    assert type(model[0]) is kind
    assert reason in norm_swap(model[0])
    left = fastattn.accelerate_report(model).left
    assert left["0"][0] == kind.__name__ and reason in left["0"][1]


# --- Whole models -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "gemma2", "qwen3", "gpt_oss", "t5", "vit"])
def test_accelerated_models_compute_the_same(name):
    model = make_model(name, "eager")
    inputs, meant = make_inputs(name)
    expected = model(**inputs).logits
    parameters = dict(model.named_parameters())
    fastattn.accelerate(model)
    torch.testing.assert_close(model(**inputs).logits[meant], expected[meant], rtol=2e-4, atol=2e-4)
    assert not [m for m in model.modules() if "Norm" in type(m).__name__ and not type(m).__module__.startswith("fast")]
    assert all(parameters[n] is p for n, p in model.named_parameters())
    restored = fastattn.restore(model)
    assert not [m for m in restored.modules() if type(m).__module__.startswith("fastattn")]
    torch.testing.assert_close(restored(**inputs).logits, expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_int8_leaves_the_output_head_and_small_layers(name):
    model = make_model(name, "eager")
    inputs, meant = make_inputs(name)
    expected = model(**inputs).logits
    fastattn.accelerate(model, int8=True)
    head = model.get_output_embeddings()
    assert type(head) is nn.Linear
    linears = [m for m in model.modules() if type(m) is nn.Linear or type(m).__name__ == "Conv1D"]
    assert linears == [head] and sum(isinstance(m, Int8Linear) for m in model.modules()) >= 8
    cosine = nn.functional.cosine_similarity(model(**inputs).logits[meant], expected[meant], dim=-1)
    assert cosine.min() > 0.98
    torch.testing.assert_close(fastattn.restore(model)(**inputs).logits, expected, rtol=0, atol=0)


def test_filter_fn_replaces_the_rule():
    model = nn.ModuleDict({"lm_head": nn.Linear(32, 64), "gate": nn.Linear(32, 4), "up": nn.Linear(32, 64)})
    fastattn.accelerate(model, int8=True)
    assert [n for n, m in model.items() if isinstance(m, Int8Linear)] == ["up"]
    fastattn.accelerate(model, int8=True, filter_fn=lambda module, name: name != "gate")
    assert [n for n, m in model.items() if isinstance(m, Int8Linear)] == ["lm_head", "up"]


def test_head_tied_to_an_embedding_keeps_its_precision():
    model = nn.Sequential(nn.Embedding(64, 32), nn.Linear(32, 32), nn.Linear(32, 64))
    model[2].weight = model[0].weight
    fastattn.accelerate(model, int8=True)
    assert isinstance(model[1], Int8Linear) and type(model[2]) is nn.Linear


def test_conv1d_matches_its_float_form():
    from transformers.pytorch_utils import Conv1D

    conv, x = Conv1D(48, 32), torch.randn(3, 5, 32)
    nn.init.normal_(conv.bias)
    expected, weight = conv(x), conv.weight
    fastattn.accelerate(conv, int8=True)
    assert isinstance(conv, Int8Linear) and (conv.in_features, conv.out_features) == (32, 48)
    assert (conv(x) - expected).abs().max() < 0.02 * expected.abs().max()
    assert fastattn.restore(conv).weight is weight and torch.equal(conv(x), expected)


# --- The report -------------------------------------------------------------------------------------------------------


def test_report_names_what_was_swapped_and_what_was_left_and_why():
    model = make_model("llama", "eager")
    model.model.layers[0].mlp.up_proj = nn.utils.parametrizations.weight_norm(model.model.layers[0].mlp.up_proj)
    model.model.layers[1].mlp.up_proj.forward = lambda x: x
    fastattn.accelerate(model, int8=True, filter_fn=None)
    report = fastattn.accelerate_report(model)
    assert report.swapped["model.norm"] == ("LlamaRMSNorm", "ForeignNorm")
    assert report.swapped["model.layers.0.mlp.down_proj"] == ("Linear", "Int8Linear")
    reasons = {name: reason for name, (_, reason) in report.left.items()}
    assert "output head" in reasons["lm_head"]
    assert "subclass" in reasons["model.layers.0.mlp.up_proj"]
    assert "forward was replaced" in reasons["model.layers.1.mlp.up_proj"]
    assert "set_attn_implementation" in reasons["model.layers.0.self_attn"]
    text = str(report)
    assert (
        "model.norm: LlamaRMSNorm -> fastattn's ForeignNorm" in text and "lm_head: Linear left: the output head" in text
    )
    assert not set(report.swapped) & set(report.left)

    fastattn.restore(model)
    assert not fastattn.accelerate_report(model).swapped and not fastattn.accelerate_report(model).left


def test_report_does_not_promise_an_exchange_that_transformers_refuses():
    from transformers import DebertaV2Config, DebertaV2Model

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    model = fastattn.accelerate(DebertaV2Model(DebertaV2Config(vocab_size=20, **sizes)), verbose=False)
    (reason,) = {reason for _, reason in fastattn.accelerate_report(model).left.values()}
    assert reason == "transformers does not let the attention of this model be exchanged"
    with pytest.raises(TypeError, match=r"accelerate_report: model must be a torch\.nn\.Module, got int"):
        fastattn.accelerate_report(3)


def test_what_was_swapped_is_printed(capsys):
    """A line by default, all of it with verbose=True, nothing with verbose=False; the repr shows it too."""
    summary = "fastattn.accelerate: swapped 5 ForeignNorm, 14 Int8Linear; left 3, accelerate_report(model) says why\n"
    model = make_model("llama", "eager")
    for verbose in (None, False, True):
        fastattn.accelerate(model, int8=True, verbose=verbose)
        report = str(fastattn.accelerate_report(model))
        assert capsys.readouterr().out == {None: summary, False: "", True: f"fastattn.accelerate: {report}\n"}[verbose]
    assert repr(model).count("ForeignNorm(RMS norm of 32") == 3 and repr(model).count("Int8Linear(in_features=") == 7
    assert "model.layers.1.self_attn: LlamaAttention left: call fastattn.integrations" in report
    fastattn.accelerate(nn.Sequential(nn.ReLU()))
    assert capsys.readouterr().out == "fastattn.accelerate: swapped nothing\n"


def test_report_of_what_filter_fn_refused_and_of_attention_that_is_ours():
    fastattn.integrations.transformers.register()
    model = fastattn.accelerate(make_model("llama", "fastattn"), filter_fn=lambda module, name: "layers.0" in name)
    report = fastattn.accelerate_report(model)
    assert {n.rpartition(".")[0] for n in report.swapped} == {"model.layers.0"}
    assert set(reason for _, reason in report.left.values()) == {"filter_fn said no"}
    assert fastattn.accelerate_report(copy.deepcopy(model)) == report
