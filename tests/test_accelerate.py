"""accelerate and restore: what is swapped, what survives it, and that torch's encoder calls the swapped modules."""

from __future__ import annotations

import copy
import pickle
import weakref

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_as_accurate_as_eager
from torch import Tensor, nn
from torch.nn.utils import prune

import fastattn
from fastattn import multi_head_attention
from fastattn._extension import extension
from fastattn.int8_encoder import Int8MultiHeadAttention

BATCH, SEQLEN_Q, SEQLEN_K, EMBED, HEADS = 3, 5, 7, 16, 2

pytestmark = [
    pytest.mark.filterwarnings("ignore:Support for mismatched:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype:UserWarning"),
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True, but:UserWarning"),
]


def make_encoder(layers: int = 2, **options) -> nn.TransformerEncoder:
    options = {"dropout": 0.0, "batch_first": True} | options
    layer = nn.TransformerEncoderLayer(EMBED, HEADS, 2 * EMBED, **options)
    return randomised(nn.TransformerEncoder(layer, layers, nn.LayerNorm(EMBED)))


def make_transformer(**options) -> nn.Transformer:
    return randomised(nn.Transformer(EMBED, HEADS, 2, 2, 2 * EMBED, dropout=0.0, batch_first=True, **options))


def randomised(model: nn.Module) -> nn.Module:
    """Gives biases and norms values that count, and layers that were cloned values of their own."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model


def padding_mask(kind: str) -> Tensor:
    """(BATCH, SEQLEN_K) bool, True = ignore. nn.TransformerEncoder packs batches that are padded on the right."""
    mask = torch.zeros(BATCH, SEQLEN_K, dtype=torch.bool)
    if kind == "right":
        mask[0, 4:] = mask[1, 6:] = True
    else:
        mask[0, :2] = mask[1, 3] = True
    return mask


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """The modules' ops that ran, by name."""
    from fastattn import modules

    names: list[str] = []
    for module, function_name, name in (
        (multi_head_attention, "attention", "attention"),
        (multi_head_attention, "varlen_attention", "attention"),
        (multi_head_attention, "attention_and_weights", "attention_and_weights"),
        (modules, "layer_norm", "layer_norm"),
        (modules, "rms_norm", "rms_norm"),
    ):
        function = getattr(module, function_name)
        monkeypatch.setattr(
            module,
            function_name,
            lambda *args, _name=name, _function=function, **kw: names.append(_name) or _function(*args, **kw),
        )
    return names


def kinds(model: nn.Module) -> dict[str, type]:
    return {name: type(module) for name, module in model.named_modules()}


def tensors(model: nn.Module) -> dict[str, int]:
    """The identity of each parameter, with its name; tied ones have several names."""
    return {name: id(parameter) for name, parameter in model.named_parameters(remove_duplicate=False)}


# --- What is swapped --------------------------------------------------------------------------------------------------


class MyNorm(nn.LayerNorm):
    def forward(self, input: Tensor) -> Tensor:
        return input


def make_assortment() -> nn.ModuleDict:
    frozen = nn.LayerNorm(EMBED)
    frozen.forward = lambda input: input
    return nn.ModuleDict(
        {
            "attention": nn.MultiheadAttention(EMBED, HEADS),
            "layer_norm": nn.LayerNorm(EMBED),
            "rms_norm": nn.RMSNorm(EMBED),
            "linear": nn.Linear(EMBED, EMBED),
            "subclass": MyNorm(EMBED),
            "replaced_forward": frozen,
        }
    )


@pytest.mark.parametrize(
    "options, swapped",
    [
        ({}, {"attention", "layer_norm", "rms_norm"}),
        ({"attention": False}, {"layer_norm", "rms_norm"}),
        ({"layer_norm": False}, {"attention"}),
        ({"int8": True}, {"attention", "layer_norm", "rms_norm", "linear"}),
        ({"int8": True, "attention": False, "layer_norm": False}, {"linear"}),
        ({"filter_fn": lambda module, name: name == "rms_norm"}, {"rms_norm"}),
        ({"filter_fn": lambda module, name: not isinstance(module, nn.RMSNorm)}, {"attention", "layer_norm"}),
    ],
    ids=["default", "no attention", "no layer norm", "int8", "int8 only", "filter by name", "filter by kind"],
)
def test_swaps_what_it_is_asked_to(options, swapped):
    model = make_assortment()
    before = kinds(model)
    assert fastattn.accelerate(model, **options) is model
    after = kinds(model)
    assert {name for name in before if before[name] is not after.get(name) and "." not in name} == swapped
    ours = {
        "attention": Int8MultiHeadAttention if options.get("int8") else fastattn.MultiHeadAttention,
        "layer_norm": fastattn.LayerNorm,
        "rms_norm": fastattn.RMSNorm,
        "linear": fastattn.Int8Linear,
    }
    assert all(after[name] is ours[name] for name in swapped)
    assert kinds(fastattn.restore(model)) == before


def test_filter_is_asked_about_modules_that_fit_with_their_names():
    asked = {}
    fastattn.accelerate(make_encoder(1), filter_fn=lambda module, name: bool(asked.setdefault(name, type(module))))
    norms = dict.fromkeys(["layers.0.norm1", "layers.0.norm2", "norm"], nn.LayerNorm)
    assert asked == {"layers.0.self_attn": nn.MultiheadAttention} | norms


def test_the_root_is_swapped_too():
    for root, ours in (
        (nn.LayerNorm(EMBED), fastattn.LayerNorm),
        (nn.MultiheadAttention(EMBED, HEADS), fastattn.MultiHeadAttention),
    ):
        cls = type(root)
        assert fastattn.accelerate(root) is root
        assert type(root) is ours
        assert type(fastattn.restore(root)) is cls


def test_rejects_what_is_not_a_module():
    with pytest.raises(TypeError, match=r"accelerate: model must be a torch.nn.Module, got function"):
        fastattn.accelerate(make_encoder)


# --- torch's Transformer modules --------------------------------------------------------------------------------------


def assert_same_outputs(
    model: nn.Module, accelerated: nn.Module, *inputs: Tensor, valid: Tensor | None = None, **masks
):
    """Both models' outputs, and their gradients if they are training, where ``valid`` (batch, seqlen) is True."""

    def run(model: nn.Module, dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.to(dtype, copy=True).requires_grad_(model.training) for x in inputs]
        with torch.set_grad_enabled(model.training):
            out = model(*leaves, **masks)
        out = out if valid is None else out[valid]
        if not model.training:
            return [out]
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return [out, *torch.autograd.grad(out.square().mean(), [*leaves, *parameters])]

    exact = run(copy.deepcopy(model).double(), torch.float64)
    results = zip(run(accelerated, torch.float32), run(model, torch.float32), exact, strict=True)
    for i, (actual, eager, reference) in enumerate(results):
        assert_as_accurate_as_eager(actual, eager, reference, f"result {i}", terms=4.0)


@pytest.mark.parametrize("padding", [None, "right", "scattered"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_encoder_calls_ours_and_matches_torch(training, norm_first, causal, padding, calls):
    model = make_encoder(norm_first=norm_first).train(training)
    accelerated = fastattn.accelerate(copy.deepcopy(model))
    source = torch.randn(BATCH, SEQLEN_K, EMBED)
    masks = {}
    if causal:
        masks = {"mask": nn.Transformer.generate_square_subsequent_mask(SEQLEN_K), "is_causal": True}
    if padding:
        masks["src_key_padding_mask"] = padding_mask(padding)
    if causal and padding == "scattered":
        masks["src_key_padding_mask"][:, 0] = False  # torch's fast path gives NaN to a query that sees no key
    valid = ~masks["src_key_padding_mask"] if padding else None
    assert_same_outputs(model, accelerated, source, valid=valid, **masks)
    assert calls == ["attention", "layer_norm", "layer_norm"] * 2 + ["layer_norm"] or norm_first
    assert sorted(calls) == ["attention"] * 2 + ["layer_norm"] * 5


@pytest.mark.parametrize("training", [False, True])
def test_transformer_calls_ours_and_matches_torch(training, calls):
    model = make_transformer().train(training)
    accelerated = fastattn.accelerate(copy.deepcopy(model))
    source, target = torch.randn(BATCH, SEQLEN_K, EMBED), torch.randn(BATCH, SEQLEN_Q, EMBED)
    masks = {
        "tgt_mask": nn.Transformer.generate_square_subsequent_mask(SEQLEN_Q),
        "src_key_padding_mask": padding_mask("right"),
        "memory_key_padding_mask": padding_mask("right"),
    }
    assert_same_outputs(model, accelerated, source, target, **masks)
    assert sorted(calls) == ["attention"] * 6 + ["layer_norm"] * 12


def assemble_by_hand(model: nn.TransformerEncoder) -> None:
    for layer in model.layers:
        ours = fastattn.MultiHeadAttention(EMBED, HEADS, batch_first=True)
        ours.load_state_dict(layer.self_attn.state_dict())
        layer.self_attn = ours.eval()


@pytest.mark.parametrize("grad_enabled", [False, True])
@pytest.mark.parametrize("padding", [None, "right"])
@pytest.mark.parametrize(
    "swap, expected",
    [
        (lambda model: fastattn.accelerate(model, attention=False), ["layer_norm"] * 5),
        (lambda model: fastattn.accelerate(model, layer_norm=False), ["attention"] * 2),
        (lambda model: fastattn.accelerate(model.layers[0]), ["attention"] + ["layer_norm"] * 2),
        (lambda model: fastattn.accelerate(model.layers[1].self_attn), ["attention"]),
        (
            lambda model: fastattn.accelerate(model, filter_fn=lambda module, name: "1" in name),
            ["attention"] + ["layer_norm"] * 3,
        ),
        (assemble_by_hand, ["attention"] * 2),
    ],
    ids=["norms only", "attention only", "one layer", "one attention", "filtered", "by hand"],
)
def test_partly_swapped_encoder_calls_what_is_ours(swap, expected, padding, grad_enabled, calls):
    model = make_encoder().eval()
    mixed = copy.deepcopy(model)
    swap(mixed)
    masks = {"src_key_padding_mask": padding_mask(padding)} if padding else {}
    source = torch.randn(BATCH, SEQLEN_K, EMBED)
    with torch.set_grad_enabled(grad_enabled):
        out = mixed(source, **masks)
        torch.testing.assert_close(out, model(source, **masks))
    assert sorted(calls) == expected


@pytest.mark.parametrize("kind", [nn.LayerNorm, nn.RMSNorm, nn.Linear], ids=lambda kind: kind.__name__)
def test_nested_input_is_computed_token_by_token(kind):
    module = randomised(nn.Linear(EMBED, 9) if kind is nn.Linear else kind(EMBED))
    fastattn.accelerate(module, int8=True)
    sequences = [torch.randn(length, EMBED) for length in (3, 0, 5)]
    out = module(torch.nested.nested_tensor(sequences))
    assert out.is_nested
    for actual, sequence in zip(out.unbind(), sequences, strict=True):
        torch.testing.assert_close(actual, module(sequence), rtol=0, atol=0)


def test_compiles_without_graph_breaks():
    model = fastattn.accelerate(make_encoder().eval())
    source = torch.randn(BATCH, SEQLEN_K, EMBED)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(source), model(source))


# --- What survives ----------------------------------------------------------------------------------------------------


def test_parameters_stay_the_same_objects_with_their_ties_and_settings():
    model = make_encoder()
    model.layers[1].self_attn.out_proj.weight = model.layers[0].self_attn.out_proj.weight
    model.layers[0].norm1.weight.requires_grad_(False)
    model.layers[1].eval()
    model.layers[0].norm2.half()
    model.layers[0].self_attn.note = "kept"
    before, state = tensors(model), model.state_dict()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in (fastattn.accelerate, fastattn.restore):
        step(model)
        assert tensors(model) == before
        assert list(model.state_dict()) == list(state)
        assert not model.layers[0].norm1.weight.requires_grad
        assert [layer.self_attn.training for layer in model.layers] == [True, False]
        assert model.layers[0].norm2.weight.dtype == torch.float16
        assert model.layers[0].self_attn.note == "kept"
    assert {id(parameter) for group in optimizer.param_groups for parameter in group["params"]} == set(before.values())


def test_a_module_used_twice_stays_one_module():
    norm = nn.LayerNorm(EMBED)
    model = nn.Sequential(norm, nn.Linear(EMBED, EMBED), norm)
    asked = []
    fastattn.accelerate(model, filter_fn=lambda module, name: not asked.append(name))
    assert asked == ["0"]
    assert model[0] is model[2] is norm
    assert type(norm) is fastattn.LayerNorm


def test_hooks_stay():
    model = make_encoder(1)
    attention = model.layers[0].self_attn
    events: list[str] = []
    attention.register_forward_pre_hook(lambda *args: events.append("forward pre"))
    attention.register_forward_hook(lambda *args: events.append("forward"))
    attention.register_full_backward_hook(lambda *args: events.append("backward"))
    attention.register_state_dict_post_hook(lambda *args: events.append("state dict"))
    attention.register_load_state_dict_post_hook(lambda *args: events.append("load state dict"))
    source = torch.randn(BATCH, SEQLEN_K, EMBED, requires_grad=True)
    for step in (fastattn.accelerate, fastattn.restore):
        step(model)
        events.clear()
        model(source).sum().backward()
        model.load_state_dict(model.state_dict())
        assert events == ["forward pre", "forward", "backward", "state dict", "load state dict"]


def test_training_goes_on_across_the_swaps():
    model = make_encoder()
    twin = copy.deepcopy(model)
    source = torch.randn(BATCH, SEQLEN_K, EMBED)

    def train(model: nn.Module, steps: list) -> Tensor:
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        for swap in steps:
            swap(model)
            optimizer.zero_grad()
            model(source).square().mean().backward()
            optimizer.step()
        return model(source)

    out = train(model, [fastattn.accelerate, lambda model: None, fastattn.restore])
    torch.testing.assert_close(out, train(twin, [lambda model: None] * 3), rtol=1e-3, atol=1e-3)


# --- restore ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize(
    "copied", [None, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["", "copied", "pickled"]
)
def test_restore_is_exact(int8, copied):
    model = make_transformer().eval()
    inputs = torch.randn(BATCH, SEQLEN_K, EMBED), torch.randn(BATCH, SEQLEN_Q, EMBED)
    expected, before = model(*inputs), kinds(model)
    attributes = {name: set(module.__dict__) for name, module in model.named_modules()}
    fastattn.accelerate(model, int8=int8)
    fastattn.accelerate(model, int8=int8)
    if copied is not None:
        model = copied(model)
    assert not torch.equal(model(*inputs), expected)
    fastattn.restore(model)
    assert kinds(model) == before
    assert {name: set(module.__dict__) for name, module in model.named_modules()} == attributes
    assert torch.equal(model(*inputs), expected)
    fastattn.restore(model)
    assert kinds(model) == before


@pytest.mark.parametrize("int8", [False, True])
def test_accelerating_again_changes_nothing(int8):
    model = fastattn.accelerate(make_encoder(), int8=int8)

    def swaps() -> dict[str, tuple[type, int]]:
        return {name: (type(m), len(m.__dict__.get("_fastattn_undo", ()))) for name, m in model.named_modules()}

    before = swaps()
    fastattn.accelerate(model, int8=int8)
    assert swaps() == before


# --- INT8 -------------------------------------------------------------------------------------------------------------


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("grad_enabled", [False, True])
@pytest.mark.parametrize("padding", [None, "right"])
def test_int8_encoder_is_close_to_float(padding, grad_enabled, calls):
    model = make_encoder().eval()
    accelerated = fastattn.accelerate(copy.deepcopy(model), int8=True)
    source = torch.randn(BATCH, SEQLEN_K, EMBED)
    masks = {"src_key_padding_mask": padding_mask(padding)} if padding else {}
    with torch.set_grad_enabled(grad_enabled):
        out, expected = accelerated(source, **masks), model(source, **masks)
    valid = ~masks["src_key_padding_mask"] if padding else slice(None)
    # Each of the 12 products of two rounded operands errs by about 1/127/sqrt(3) of its size.
    assert 0 < relative_error(out[valid], expected[valid]) < 0.05
    assert not any(parameter.dim() == 2 for parameter in accelerated.parameters())
    in_one_call = padding is None and not grad_enabled and extension is not None
    assert calls.count("attention") == (0 if in_one_call else 2)


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"kdim": 8, "vdim": 12}, {"add_bias_kv": True}], ids=str)
def test_int8_attention_is_close_to_float(options):
    model = randomised(nn.MultiheadAttention(EMBED, HEADS, **options)).eval()
    query = torch.randn(SEQLEN_Q, BATCH, EMBED)
    key = torch.randn(SEQLEN_K, BATCH, options.get("kdim", EMBED))
    value = torch.randn(SEQLEN_K, BATCH, options.get("vdim", EMBED))
    expected, _ = model(query, key, value)
    out, weights = fastattn.accelerate(model, int8=True)(query, key, value)
    assert 0 < relative_error(out, expected) < 0.03
    assert weights.shape == (BATCH, SEQLEN_Q, SEQLEN_K + options.get("add_bias_kv", False))


@pytest.mark.parametrize("padding", [None, "right"])
@pytest.mark.parametrize("activation", ["relu", "gelu", F.silu], ids=["relu", "gelu", "silu"])
def test_int8_layer_applies_the_activation_behind_it(activation, padding):
    model = make_encoder(1, activation=activation).eval()
    layer, source = model.layers[0], torch.randn(BATCH, SEQLEN_K, EMBED)
    masks = {"src_key_padding_mask": padding_mask(padding)} if padding else {}
    function = layer.activation
    fastattn.accelerate(fastattn.accelerate(model, int8=True), int8=True)
    assert layer.linear1.activation == function.__name__ and layer.activation(source) is source
    with torch.no_grad():
        out = model(source, **masks)
        fused, layer.linear1.activation = layer.linear1.activation, None
        layer.activation = function
        expected = model(source, **masks)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    layer.linear1.activation = fused
    assert fastattn.restore(model).layers[0].activation is function


def test_a_linear_layer_of_two_homes_keeps_the_activation_outside():
    model = make_encoder(1, activation="gelu").eval()
    model.alias = model.layers[0].linear1
    fastattn.accelerate(model, int8=True)
    assert type(model.alias) is fastattn.Int8Linear and model.alias.activation is None
    assert model.layers[0].activation is F.gelu


def self_attention(bias=True):
    attention = randomised(nn.MultiheadAttention(EMBED, HEADS, bias=bias, batch_first=True)).requires_grad_(False)
    return fastattn.accelerate(attention, int8=True), torch.randn(BATCH, SEQLEN_Q, EMBED)


def attend_one_by_one(attention, x):
    # Different objects: three projections, each by its own layer.
    return attention(x, x.clone(), x.clone(), need_weights=False)[0]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("change", [None, "weight", "scale", "bias", "replaced", "loaded", "copied", "hooked", "eager"])
def test_int8_self_attention_projects_jointly_what_its_layers_hold_now(change, bias):
    attention, x = self_attention(bias)
    attention(x, x, x)  # makes the joint layer
    joint = attention._joint_projection._layer
    assert fastattn.available_backends()["cpu"] is not None or joint is not None
    calls = []
    if change in ("weight", "scale", "bias"):
        layer = attention.v_proj
        {"weight": layer.weight, "scale": layer.weight_scale, "bias": layer.bias if bias else layer.weight}[
            change
        ].mul_(-1)
    elif change == "replaced":
        attention.k_proj.weight = -attention.k_proj.weight
    elif change == "loaded":
        attention.load_state_dict({name: -value for name, value in attention.state_dict().items()})
    elif change == "copied":
        attention = pickle.loads(pickle.dumps(copy.deepcopy(attention)))
        assert attention._joint_projection._layer is None
        attention.q_proj.weight.neg_()
    elif change == "hooked":
        attention.q_proj.register_forward_hook(lambda *_: calls.append("q_proj"))
    with fastattn.use_backend("eager" if change == "eager" else "auto"):
        out = attention(x, x, x, need_weights=False)[0]
    assert (change == "hooked") == bool(calls)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if change == "eager" else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(out, attend_one_by_one(attention, x), **tolerance)
    assert (attention._joint_projection._layer is joint) == (change in (None, "eager", "hooked"))
    assert "joint" not in "".join(attention.state_dict())
    assert "_joint_projection" not in fastattn.restore(attention).__dict__


@pytest.mark.parametrize("name", ["weight", "weight_scale", "bias"])
def test_no_tensor_comes_to_the_address_of_one_that_was_joined(name):
    attention, x = self_attention()
    if fastattn.available_backends()["cpu"] is not None:
        pytest.skip("projects one by one without the CPU's kernels")
    layer = attention.k_proj
    memory = getattr(layer, name).numpy().copy()
    kept = weakref.ref(memory)
    joined = torch.from_numpy(memory)
    setattr(layer, name, nn.Parameter(joined, requires_grad=False) if name == "bias" else joined)
    attention(x, x, x)  # makes the joint layer
    setattr(layer, name, copy.deepcopy(getattr(layer, name)))
    del memory, joined
    assert kept() is not None
    attention(x, x, x)
    assert kept() is None


def test_int8_self_attention_maps_over_its_weights():
    (attention, x), (other, _) = self_attention(), self_attention()

    def one(parameters, buffers, x):
        return torch.func.functional_call(attention, (parameters, buffers), (x, x, x))[0]

    out = torch.func.vmap(one, in_dims=(0, 0, None))(*torch.func.stack_module_state([attention, other]), x)
    torch.testing.assert_close(out, torch.stack([attention(x, x, x)[0], other(x, x, x)[0]]), rtol=1e-4, atol=1e-4)


def test_int8_self_attention_gives_its_biases_their_gradients():
    attention, x = self_attention()
    attention.requires_grad_()
    attention(x, x, x, need_weights=False)[0].sum().backward()
    assert all(layer.bias.grad is not None for layer in (attention.q_proj, attention.k_proj, attention.v_proj))
    with torch.no_grad():
        attention(x, x, x)
        attention.q_proj.bias.zero_()
        assert torch.equal(attention(x, x, x, need_weights=False)[0], attend_one_by_one(attention, x))


def test_int8_after_float_restores_to_the_first_modules():
    model = fastattn.accelerate(nn.Sequential(nn.MultiheadAttention(EMBED, HEADS)))
    fastattn.accelerate(model, int8=True)
    assert type(model[0]) is Int8MultiHeadAttention
    assert kinds(fastattn.restore(model))["0"] is nn.MultiheadAttention


def test_restored_float_weights_follow_the_models_dtype():
    model = nn.Sequential(nn.Linear(EMBED, EMBED), nn.MultiheadAttention(EMBED, HEADS))
    weights = model[0].weight, model[1].in_proj_weight
    fastattn.accelerate(model, int8=True).to(torch.bfloat16)
    fastattn.restore(model)
    assert (model[0].weight, model[1].in_proj_weight) == weights
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_int8_keeps_ties_for_restore_and_leaves_pruned_weights():
    embedding, head = nn.Embedding(9, EMBED), nn.Linear(EMBED, 9)
    head.weight = embedding.weight
    pruned = prune.l1_unstructured(nn.Linear(EMBED, EMBED), "weight", 0.5)
    model = nn.ModuleList([embedding, head, pruned])
    fastattn.accelerate(model, int8=True, filter_fn=lambda module, name: True)
    assert [type(module) for module in model] == [nn.Embedding, fastattn.Int8Linear, nn.Linear]
    fastattn.restore(model)
    assert head.weight is embedding.weight


def test_report_tells_our_modules_from_those_they_were():
    model = fastattn.accelerate(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)), int8=True, verbose=False)
    assert str(fastattn.accelerate_report(model)).splitlines() == [
        "swapped 1 module, left 1",
        "  0: LayerNorm -> fastattn's LayerNorm",
        "  1: Linear left: small, (8, 8); choose it with filter_fn",
    ]
