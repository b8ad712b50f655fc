"""MultiHeadAttention against torch.nn.MultiheadAttention: outputs, weights, every gradient, every option."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_as_accurate_as_eager
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fastattn

BATCH, SEQLEN_Q, SEQLEN_K, EMBED, HEADS = 3, 5, 7, 16, 4

# torch deprecates masks of two dtypes, which ours takes, and calls nested tensors a prototype.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype:UserWarning"),
]


def make_pair(
    dtype: torch.dtype = torch.float32, **options
) -> tuple[nn.MultiheadAttention, fastattn.MultiHeadAttention]:
    """torch's module and ours with the same parameters, whose biases are not 0."""
    reference = nn.MultiheadAttention(EMBED, HEADS, **options)
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            if "bias" in name:
                parameter.normal_()
    ours = fastattn.MultiHeadAttention(EMBED, HEADS, **options)
    ours.load_state_dict(reference.state_dict())
    return reference.to(dtype), ours.to(dtype)


def make_inputs(
    same: str = "none", batch_first: bool = False, unbatched: bool = False, kdim: int = EMBED
) -> list[Tensor]:
    """query, key, value; ``same`` names those that are one tensor: "all", "key_value", "query_key" or "none"."""

    def tensor(seqlen: int, features: int) -> Tensor:
        shape = (BATCH, seqlen, features) if batch_first else (seqlen, BATCH, features)
        return torch.randn((seqlen, features) if unbatched else shape)

    query = tensor(SEQLEN_Q, EMBED)
    if same == "all":
        return [query, query, query]
    if same == "query_key":
        return [query, query, tensor(SEQLEN_Q, EMBED)]
    key = tensor(SEQLEN_K, kdim)
    return [query, key, key if same == "key_value" else tensor(SEQLEN_K, kdim)]


def make_masks(attn: str | None, padding: str | None, seqlen_k: int, unbatched: bool) -> dict[str, Tensor]:
    """``attn`` is bool2, float2, bool3 or float3 (3 = with heads), ``padding`` bool or float; all queries see key 0."""
    batch = 1 if unbatched else BATCH
    masks = {}
    if attn:
        shape = (SEQLEN_Q, seqlen_k) if attn[-1] == "2" else (batch * HEADS, SEQLEN_Q, seqlen_k)
        masks["attn_mask"] = torch.rand(shape) < 0.4 if attn.startswith("bool") else torch.randn(shape)
    if padding:
        shape = (seqlen_k,) if unbatched else (batch, seqlen_k)
        masks["key_padding_mask"] = torch.rand(shape) < 0.4 if padding == "bool" else torch.randn(shape)
    for mask in masks.values():
        if mask.dtype == torch.bool:
            mask[..., 0] = False
    return masks


def outputs_and_gradients(module: nn.Module, inputs: list[Tensor], **options) -> dict[str, Tensor]:
    """Everything a module computes, by name; the same seed gives the same incoming gradients."""
    leaves = {id(x): x.detach().clone().requires_grad_() for x in inputs}
    out, weights = module(*(leaves[id(x)] for x in inputs), **options)
    generator = torch.Generator().manual_seed(1)
    results = {"out": out} if weights is None else {"out": out, "weights": weights}
    loss = sum((x * torch.randn(x.shape, generator=generator).to(x.dtype)).sum() for x in results.values())
    module.zero_grad()
    loss.backward()
    results |= {name: parameter.grad for name, parameter in module.named_parameters()}
    return results | {f"input {i}": x.grad for i, x in enumerate(leaves.values())}


def double(value):
    """float64 copies of tensors, keeping which are the same; anything else as it is."""
    if isinstance(value, list):
        copies = {id(x): x.double() for x in value}
        return [copies[id(x)] for x in value]
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def assert_matches(ours: nn.Module, reference: nn.Module, inputs: list[Tensor], **options) -> None:
    """Ours against ``reference`` in the inputs' dtype, judged by ``reference`` in float64."""
    eager = outputs_and_gradients(reference, inputs, **options)
    exact_options = {name: double(value) for name, value in options.items()}
    exact = outputs_and_gradients(copy.deepcopy(reference).double(), double(inputs), **exact_options)
    actual = outputs_and_gradients(ours, inputs, **options)
    assert actual.keys() == eager.keys()
    for name, result in actual.items():
        # With so few elements eager is at times exact by luck. What is rounded on the way, scores and incoming
        # gradients, has sizes up to 4, and a parameter's gradient sums its products over all tokens.
        terms = 4.0 if name in ("out", "weights") or name.startswith("input") else 32.0
        assert_as_accurate_as_eager(result, eager[name], exact[name], name, terms=terms)


# --- Parity -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("same", ["all", "key_value", "query_key", "none"])
@pytest.mark.parametrize("layout", ["batch_first", "seqlen_first", "unbatched"])
def test_matches_torch(layout, same, need_weights):
    options = {"batch_first": layout == "batch_first"}
    reference, ours = make_pair(**options)
    inputs = make_inputs(same, unbatched=layout == "unbatched", **options)
    assert_matches(ours, reference, inputs, need_weights=need_weights)


@given(
    module_options=st.fixed_dictionaries(
        {
            "bias": st.booleans(),
            "add_bias_kv": st.booleans(),
            "add_zero_attn": st.booleans(),
            "batch_first": st.booleans(),
            "kdim": st.sampled_from([None, 9]),
        }
    ),
    same=st.sampled_from(["all", "key_value", "query_key", "none"]),
    attn=st.sampled_from([None, "bool2", "float2", "bool3", "float3"]),
    padding=st.sampled_from([None, "bool", "float"]),
    unbatched=st.booleans(),
    need_weights=st.booleans(),
    average=st.booleans(),
)
@settings(
    max_examples=100, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_every_combination_of_options_matches_torch(
    module_options, same, attn, padding, unbatched, need_weights, average
):
    torch.manual_seed(0)
    if module_options["kdim"]:
        module_options["vdim"] = module_options["kdim"]
        same = "key_value" if same in ("all", "key_value") else "none"
    reference, ours = make_pair(**module_options)
    inputs = make_inputs(same, module_options["batch_first"], unbatched, module_options["kdim"] or EMBED)
    seqlen_k = SEQLEN_Q if same in ("all", "query_key") else SEQLEN_K
    masks = make_masks(attn, padding, seqlen_k, unbatched)
    assert_matches(ours, reference, inputs, need_weights=need_weights, average_attn_weights=average, **masks)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_matches_torch(dtype):
    reference, ours = make_pair(dtype, batch_first=True)
    inputs = [x.to(dtype) for x in make_inputs("none", batch_first=True)]
    assert_matches(ours, reference, inputs, need_weights=False)


def test_gradcheck():
    _, ours = make_pair(torch.float64, batch_first=True)
    inputs = [x.requires_grad_() for x in double(make_inputs("none", batch_first=True))]
    bias = torch.randn(SEQLEN_Q, SEQLEN_K, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *args: ours(*args[:3], attn_mask=args[3]), (*inputs, bias))


def test_float_mask_gets_its_gradient():
    reference, ours = make_pair(batch_first=True)
    inputs = make_inputs("all", batch_first=True)
    bias = torch.randn(SEQLEN_Q, SEQLEN_Q)
    gradients = []
    exact = copy.deepcopy(reference).double()
    for module, dtype in ((ours, torch.float32), (reference, torch.float32), (exact, torch.float64)):
        leaf = bias.to(dtype, copy=True).requires_grad_()
        query = inputs[0].to(dtype)
        module(query, query, query, attn_mask=leaf)[0].square().sum().backward()
        gradients.append(leaf.grad)
    # Summed over batch and heads.
    assert_as_accurate_as_eager(*gradients, "attn_mask", terms=32.0)


@pytest.mark.parametrize("seqlen_q, seqlen_k, batch", [(1, 1, 1), (0, 3, 2), (3, 4, 0), (1, 9, 2)])
def test_small_and_empty_inputs_match_torch(seqlen_q, seqlen_k, batch):
    reference, ours = make_pair(batch_first=True)
    query, key = torch.randn(batch, seqlen_q, EMBED), torch.randn(batch, seqlen_k, EMBED)
    torch.testing.assert_close(ours(query, key, key), reference(query, key, key))


# --- Parameters -------------------------------------------------------------------------------------------------------

VARIANTS = [{}, {"bias": False}, {"add_bias_kv": True}, {"kdim": 9, "vdim": 11}, {"kdim": 9, "add_bias_kv": True}]


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_one_seed_gives_torchs_parameters(options):
    states = []
    for cls in (nn.MultiheadAttention, fastattn.MultiHeadAttention):
        torch.manual_seed(7)
        states.append(cls(EMBED, HEADS, **options).state_dict())
    assert list(states[0]) == list(states[1])
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_state_dict_loads_both_ways_strictly(options):
    reference, ours = (
        nn.MultiheadAttention(EMBED, HEADS, **options),
        fastattn.MultiHeadAttention(EMBED, HEADS, **options),
    )
    for source, target in ((reference, ours), (ours, reference)):
        nn.init.normal_(source.out_proj.weight)
        target.load_state_dict(source.state_dict(), strict=True)
        assert torch.equal(target.out_proj.weight, source.out_proj.weight)


def test_grouped_heads_have_separate_smaller_parameters():
    module = fastattn.MultiHeadAttention(EMBED, HEADS, num_kv_heads=2, kdim=9)
    shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    assert shapes == {
        "q_proj_weight": (16, 16),
        "k_proj_weight": (8, 9),
        "v_proj_weight": (8, 16),
        "in_proj_bias": (32,),
        "out_proj.weight": (16, 16),
        "out_proj.bias": (16,),
    }


def test_copies_and_pickles():
    module = fastattn.MultiHeadAttention(EMBED, HEADS, num_kv_heads=2, window=(2, 0), batch_first=True)
    query = make_inputs("all", batch_first=True)
    expected = module(*query)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        torch.testing.assert_close(twin(*query), expected, rtol=0, atol=0)


# --- What torch does not have -----------------------------------------------------------------------------------------


class ExpandedHeads(nn.Module):
    """Grouped-query attention by torch's module with the parameters of each group repeated for all its heads."""

    def __init__(self, grouped: fastattn.MultiHeadAttention) -> None:
        super().__init__()
        self.grouped = grouped

    def forward(self, *args, **options):
        grouped = self.grouped
        group = grouped.num_heads // grouped.num_kv_heads

        def expand(x: Tensor) -> Tensor:
            return x.unflatten(0, (grouped.num_kv_heads, -1)).repeat_interleave(group, 0).flatten(0, 1)

        kv_dim = grouped.num_kv_heads * grouped.head_dim
        bias_q, bias_k, bias_v = grouped.in_proj_bias.split([EMBED, kv_dim, kv_dim])
        module = nn.MultiheadAttention(EMBED, HEADS, batch_first=True, dtype=bias_q.dtype)
        weights = grouped.q_proj_weight, expand(grouped.k_proj_weight), expand(grouped.v_proj_weight)
        parameters = {
            "in_proj_weight": torch.cat(weights),
            "in_proj_bias": torch.cat((bias_q, expand(bias_k), expand(bias_v))),
            "out_proj.weight": grouped.out_proj.weight,
            "out_proj.bias": grouped.out_proj.bias,
        }
        return torch.func.functional_call(module, parameters, args, options)

    def named_parameters(self, *args, **options):
        return self.grouped.named_parameters(*args, **options)


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("num_kv_heads", [1, 2])
def test_grouped_heads_match_repeated_heads(num_kv_heads, need_weights):
    ours = fastattn.MultiHeadAttention(EMBED, HEADS, num_kv_heads=num_kv_heads, batch_first=True)
    nn.init.normal_(ours.in_proj_bias)
    inputs = make_inputs("key_value", batch_first=True)
    assert_matches(ours, ExpandedHeads(ours), inputs, need_weights=need_weights)


def hidden_by(left: int, right: int, seqlen_q: int, seqlen_k: int) -> Tensor:
    distance = torch.arange(seqlen_k) - torch.arange(seqlen_q)[:, None]
    return ((distance < -left) & (left >= 0)) | ((distance > right) & (right >= 0))


@pytest.mark.parametrize("appended", [False, True])
@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("window", [(1, 0), (0, 2), (-1, 1), (2, -1)], ids=str)
def test_window_matches_the_same_mask(window, need_weights, appended):
    options = {"batch_first": True, "add_bias_kv": appended, "add_zero_attn": appended}
    reference, ours = make_pair(**options)
    ours.window = window
    (query, *_) = make_inputs("all", batch_first=True)
    hidden = hidden_by(*window, SEQLEN_Q, SEQLEN_Q)
    expected, expected_weights = reference(query, query, query, attn_mask=hidden)
    out, weights = ours(query, query, query, need_weights=need_weights)
    torch.testing.assert_close(out, expected)
    if need_weights:
        torch.testing.assert_close(weights, expected_weights)


@pytest.mark.parametrize("appended", [False, True])
@pytest.mark.parametrize("with_mask", [False, True])
@pytest.mark.parametrize("padding", [None, "bool", "float"])
def test_causal_matches_the_causal_mask(padding, with_mask, appended):
    options = {"batch_first": True, "add_bias_kv": appended, "add_zero_attn": appended}
    reference, ours = make_pair(**options)
    inputs = make_inputs("all", batch_first=True)
    mask = nn.Transformer.generate_square_subsequent_mask(SEQLEN_Q)
    masks = make_masks(None, padding, SEQLEN_Q, unbatched=False)
    expected = reference(*inputs, attn_mask=mask, need_weights=True, **masks)
    if with_mask:
        masks["attn_mask"] = mask
    torch.testing.assert_close(ours(*inputs, is_causal=True, **masks), expected)


# --- Rows that may attend to nothing ----------------------------------------------------------------------------------


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32], ids=["bool", "float"])
@pytest.mark.parametrize("kind", ["key_padding_mask", "attn_mask"])
def test_fully_masked_rows_are_zero(kind, dtype, need_weights):
    _, ours = make_pair(batch_first=True)
    (query, *_) = make_inputs("all", batch_first=True)
    query.requires_grad_()
    hidden = torch.zeros((BATCH if kind == "key_padding_mask" else SEQLEN_Q, SEQLEN_Q), dtype=torch.bool)
    hidden[1] = True
    mask = hidden if dtype == torch.bool else torch.zeros(hidden.shape).masked_fill(hidden, -torch.inf)
    out, weights = ours(query, query, query, need_weights=need_weights, **{kind: mask})
    masked = out[1] if kind == "key_padding_mask" else out[:, 1]
    assert torch.equal(masked, ours.out_proj.bias.expand_as(masked))
    if need_weights:
        assert not (weights[1] if kind == "key_padding_mask" else weights[:, 1]).any()
    ((out**2).sum() + (0 if weights is None else (weights**2).sum())).backward()
    gradients = [query.grad, *(parameter.grad for parameter in ours.parameters())]
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
    if kind == "key_padding_mask":
        assert not query.grad[1].any()


# --- Dropout ----------------------------------------------------------------------------------------------------------


def test_dropout_follows_the_seed_and_only_in_training():
    _, ours = make_pair(batch_first=True, dropout=0.3)
    inputs = make_inputs("all", batch_first=True)

    def run(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return ours(*inputs, need_weights=False)[0]

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))
    ours.eval()
    state = torch.get_rng_state()
    ours(*inputs)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dropout", [0.3, 1.0])
def test_returned_weights_are_those_that_made_the_output(dropout):
    _, ours = make_pair(batch_first=True, dropout=dropout)
    (query, *_) = make_inputs("all", batch_first=True)
    torch.manual_seed(3)
    out, weights = ours(query, query, query, average_attn_weights=False)
    value = F.linear(query, ours.in_proj_weight[-EMBED:], ours.in_proj_bias[-EMBED:]).unflatten(-1, (HEADS, -1))
    expected = ours.out_proj((weights @ value.transpose(1, 2)).transpose(1, 2).flatten(2))
    torch.testing.assert_close(out, expected)
    dropped = (weights == 0).float().mean().item()
    assert dropped == 1.0 if dropout == 1.0 else 0.15 < dropped < 0.45
    torch.manual_seed(3)
    without_weights, _ = ours(query, query, query, need_weights=False)
    torch.testing.assert_close(without_weights, out)
    torch.manual_seed(3)
    torch.testing.assert_close(ours(query, query, query)[1], weights.mean(1))


# --- Around the module ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("need_weights", [False, True])
def test_compiles_without_graph_breaks(need_weights):
    _, ours = make_pair(batch_first=True)
    inputs = make_inputs("key_value", batch_first=True)
    masks = make_masks("bool2", "bool", SEQLEN_K, unbatched=False)
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    expected = outputs_and_gradients(ours, inputs, need_weights=need_weights, **masks)
    actual = outputs_and_gradients(compiled, inputs, need_weights=need_weights, **masks)
    for name, result in expected.items():
        torch.testing.assert_close(actual[name if name in actual else f"_orig_mod.{name}"], result)


@pytest.mark.parametrize("appended", [False, True])
def test_autocast_matches_torch(appended):
    reference, ours = make_pair(batch_first=True, add_bias_kv=appended, add_zero_attn=appended)
    inputs = make_inputs("all", batch_first=True)
    exact = copy.deepcopy(reference).double()(*double(inputs), need_weights=False)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, weights = ours(*inputs)
        eager, _ = reference(*inputs, need_weights=False)
    assert out.dtype == torch.bfloat16
    assert weights.shape == (BATCH, SEQLEN_Q, SEQLEN_Q + 2 * appended)
    assert_as_accurate_as_eager(out, eager, exact)


@pytest.mark.parametrize("average", [True, False])
def test_nested_input_matches_padded_input(average):
    _, ours = make_pair(batch_first=True)
    lengths, memory_lengths = (3, 5, 1), (7, 2, 4)
    query = torch.nested.nested_tensor([torch.randn(n, EMBED) for n in lengths], requires_grad=True)
    key = torch.nested.nested_tensor([torch.randn(n, EMBED) for n in memory_lengths])
    out, weights = ours(query, key, key, average_attn_weights=average)
    out.to_padded_tensor(0.0).square().sum().backward()
    leaf = query.detach().to_padded_tensor(0.0).requires_grad_()
    memory = key.to_padded_tensor(0.0)
    padding = torch.arange(7) >= torch.tensor(memory_lengths)[:, None]
    expected, expected_weights = ours(leaf, memory, memory, padding, average_attn_weights=average)
    present = torch.arange(5) < torch.tensor(lengths)[:, None]
    expected = expected.where(present[..., None], 0.0)
    expected.square().sum().backward()
    assert out.is_nested
    torch.testing.assert_close(out.to_padded_tensor(0.0), expected)
    torch.testing.assert_close(query.grad.to_padded_tensor(0.0), leaf.grad)
    rows = present[..., None] if average else present[:, None, :, None]
    torch.testing.assert_close(weights, expected_weights.where(rows, 0.0))


def test_backend_is_passed_on():
    inputs = make_inputs("all")
    module = fastattn.MultiHeadAttention(EMBED, HEADS, backend="eager")
    twin = copy.deepcopy(module)
    twin.backend = "auto"
    torch.testing.assert_close(module(*inputs), twin(*inputs))
    module.backend = "cuda"
    with pytest.raises(NotImplementedError, match="cuda"):
        module(*inputs)


# --- Packed sequences -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"num_kv_heads": 1}, {"window": (2, 0)}], ids=str)
@pytest.mark.parametrize("is_causal", [False, True])
def test_packed_sequences_are_attended_one_by_one(is_causal, options):
    module = fastattn.MultiHeadAttention(16, 2, batch_first=True, **options)
    lengths = (5, 0, 1, 7)
    x = torch.randn(sum(lengths), 16)
    starts = torch.tensor([0, *lengths]).cumsum(0)
    out = module.forward_packed(x, starts, 7, is_causal=is_causal)
    for piece, part in zip(out.split(lengths), x.split(lengths), strict=True):
        if len(part):
            expected = module(part, part, part, need_weights=False, is_causal=is_causal)[0]
            torch.testing.assert_close(piece, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "x", "error", "message"),
    [
        ({}, [[1.0] * 16], TypeError, "input must be a Tensor, got list"),
        ({}, torch.nested.nested_tensor([torch.zeros(3, 16)]), TypeError, "input must be dense, not nested"),
        ({}, torch.zeros(1, 3, 16), ValueError, r"input must be \(tokens, embed_dim = 16\), got \(1, 3, 16\)"),
        ({}, torch.zeros(3, 8), ValueError, r"input must be \(tokens, embed_dim = 16\), got \(3, 8\)"),
        ({"kdim": 8}, torch.zeros(3, 16), ValueError, "takes 16, 8 and 16 features .*; use forward"),
    ],
)
def test_packed_sequences_say_what_input_they_take(options, x, error, message):
    module = fastattn.MultiHeadAttention(16, 2, **options)
    with pytest.raises(error, match=f"^MultiHeadAttention.forward_packed: .*{message}"):
        module.forward_packed(x, torch.tensor([0, 3]), 3)


def test_packed_sequences_refuse_appended_keys():
    with pytest.raises(NotImplementedError, match="add_bias_kv and add_zero_attn"):
        fastattn.MultiHeadAttention(16, 2, add_zero_attn=True).forward_packed(
            torch.randn(3, 16), torch.tensor([0, 3]), 3
        )
