"""Arguments of the wrong kind get an error that names op and argument, whatever they are, and leave nothing behind."""

import math

import numpy
import pytest
import torch
from torch.autograd import forward_ad

import fastattn

X = torch.randn(1, 2, 4, 8)
ROWS = torch.randn(3, 8)
FLOAT8 = torch.float8_e4m3fn
NESTED = torch.nested.nested_tensor([torch.randn(length, 2, 8) for length in (3, 4)])
JAGGED = torch.nested.nested_tensor([torch.randn(length, 2, 8) for length in (3, 4)], layout=torch.jagged)
INT8, SCALE = fastattn.quantize_int8(torch.randn(5, 8))
STEP, CACHE, TURNS = torch.randn(2, 1, 2, 8), torch.zeros(2, 6, 2, 8), torch.ones(8, 4)


def mha(query=ROWS, **options):
    return fastattn.MultiHeadAttention(8, 2)(**{"query": query, "key": query, "value": query} | options)


def step(**options):
    arguments = {"key_cache": CACHE.clone(), "value_cache": CACHE.clone(), "cache_seqlens": 2} | options
    return fastattn.attention_with_kv_cache(STEP, key=STEP, value=STEP, **arguments)


def packed(**options):
    lengths = dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k"), torch.tensor([0, 3]))
    x = ROWS[:, None]
    return fastattn.varlen_attention(x, x, x, **{**lengths, "max_seqlen_q": 3, "max_seqlen_k": 3, **options})


CASES = {
    "attention: dropout_p": lambda: fastattn.attention(X, X, X, dropout_p="0.1"),
    "attention: softcap": lambda: fastattn.attention(X, X, X, softcap=None),
    "attention: query must be dense, not sparse; call .to_dense": lambda: fastattn.attention(*[X.to_sparse()] * 3),
    "attention: query must be dense, not nested; call varlen_attention": lambda: fastattn.attention(*[JAGGED] * 3),
    "attention: key must be dense, not nested": lambda: fastattn.attention(X, NESTED, NESTED),
    "varlen_attention: query must be dense, not nested; of one of layout torch.jagged pass .values": lambda: (
        fastattn.varlen_attention(*[JAGGED] * 3, *[JAGGED.offsets()] * 2, 4, 4)
    ),
    "attention_with_kv_cache: key_cache must be dense, not nested; pad": lambda: step(key_cache=NESTED),
    "attention: query must be float32, .* got float8_e4m3fn": lambda: fastattn.attention(*[X.to(FLOAT8)] * 3),
    "layer_norm: input must be float32, .* got torch.float8_e4m3fn": lambda: fastattn.layer_norm(ROWS.to(FLOAT8), 8),
    "layer_norm: input must be dense, not nested; pass its .values": lambda: fastattn.layer_norm(JAGGED, 8),
    "layer_norm: input must be dense, not nested; pad it with": lambda: fastattn.layer_norm(NESTED, 8),
    "MultiHeadAttention: query must be dense, not sparse": lambda: mha(ROWS.to_sparse()),
    "attention_with_kv_cache: key_cache": lambda: step(key_cache=None),
    "attention_with_kv_cache: cache_seqlens": lambda: step(cache_seqlens=True),
    "attention_with_kv_cache: rotary_cos": lambda: step(rotary_cos=torch.ones(8, 4).int(), rotary_sin=torch.ones(8, 4)),
    "attention_with_kv_cache: query is float32 but value_cache float16": lambda: step(value_cache=CACHE.half()),
    "attention_with_kv_cache: rotary_sin must be dense": lambda: step(rotary_cos=TURNS, rotary_sin=TURNS.to_sparse()),
    "attention_with_kv_cache: key must be dense, not nested": lambda: fastattn.attention_with_kv_cache(
        STEP, CACHE, CACHE, NESTED, STEP, cache_seqlens=2
    ),
    "int8_matmul: out_dtype": lambda: fastattn.int8_matmul(INT8, INT8, SCALE, SCALE, out_dtype=[torch.float32]),
    "quantize_int8: input": lambda: fastattn.quantize_int8([1.0]),
    "int8_matmul: a must": lambda: fastattn.int8_matmul([[1]], INT8, SCALE, SCALE),
    "int8_matmul: a_scale": lambda: fastattn.int8_matmul(INT8, INT8, None, SCALE),
    "int8_matmul: bias": lambda: fastattn.int8_matmul(INT8, INT8, SCALE, SCALE, [1.0] * 5),
    "int8_linear: weight": lambda: fastattn.int8_linear(ROWS, None, SCALE),
    "int8_linear: input": lambda: fastattn.Int8Linear(8, 5)(None),
    "layer_norm: eps": lambda: fastattn.layer_norm(ROWS, 8, eps=None),
    "rms_norm: eps": lambda: fastattn.rms_norm(ROWS, 8, eps="small"),
    "layer_norm: normalized_shape": lambda: fastattn.layer_norm(ROWS, 8.0),
    "layer_norm: input must be dense, not sparse": lambda: fastattn.layer_norm(ROWS.to_sparse(), 8),
    "add_rms_norm: dropout_p": lambda: fastattn.add_rms_norm(ROWS, ROWS, 8, dropout_p=None),
    "MultiHeadAttention: query must be a Tensor": lambda: mha(ROWS.tolist()),
    "MultiHeadAttention: attn_mask must be a Tensor": lambda: mha(attn_mask=[[True] * 3] * 3),
    "MultiHeadAttention: query, key and value are": lambda: mha(key=ROWS.half()),
    "attention: is_causal": lambda: fastattn.attention(X, X, X, is_causal=torch.tensor([True, False])),
    "attention: enable_gqa": lambda: fastattn.attention(X, X, X, enable_gqa="no"),
    "varlen_attention: is_causal": lambda: packed(is_causal=None),
    "attention_with_kv_cache: rotary_interleaved": lambda: step(
        rotary_cos=TURNS, rotary_sin=TURNS, rotary_interleaved="no"
    ),
    "attention: attn_mask must be dense": lambda: fastattn.attention(X, X, X, torch.ones(4, 4).to_sparse()),
    "attention: sinks must be dense": lambda: fastattn.attention(X, X, X, sinks=torch.ones(2).to_sparse()),
    "varlen_attention: cu_seqlens_q must be dense": lambda: packed(cu_seqlens_q=torch.tensor([0, 3]).to_sparse()),
    "layer_norm: weight must be dense": lambda: fastattn.layer_norm(ROWS, 8, torch.ones(8).to_sparse()),
    "add_layer_norm: residual must be dense": lambda: fastattn.add_layer_norm(ROWS, ROWS.to_sparse(), 8),
    "int8_linear: weight_scale must be dense": lambda: fastattn.int8_linear(ROWS, INT8, SCALE.to_sparse()),
    "int8_linear: bias must be dense": lambda: fastattn.int8_linear(ROWS, INT8, SCALE, torch.ones(5).to_sparse()),
    "rms_norm: normalized_shape must be an int or a sequence of ints": lambda: fastattn.rms_norm(ROWS, (8.0,)),
    "layer_norm: input must be a tensor": lambda: fastattn.LayerNorm(8)(None),
    "rms_norm: input must be a tensor": lambda: fastattn.RMSNorm(8)(3),
    "MultiHeadAttention: num_heads must be an int": lambda: fastattn.MultiHeadAttention(8, 2.0),
    "Int8Linear: in_features must be an int": lambda: fastattn.Int8Linear(8.5, 8),
    "Int8Linear: dtype must be a floating-point torch.dtype, got torch.int8": lambda: fastattn.Int8Linear(
        8, 8, dtype=torch.int8
    ),
    "Int8Linear: dtype must be a floating-point torch.dtype, got 'float32'": lambda: fastattn.Int8Linear(
        8, 8, bias=False, dtype="float32"
    ),
    "accelerate: int8 must be True or False, got 'yes'": lambda: fastattn.accelerate(torch.nn.LayerNorm(8), int8="yes"),
    "accelerate: attention must be True or False, got 0": lambda: fastattn.accelerate(
        torch.nn.LayerNorm(8), attention=0
    ),
    "accelerate: verbose must be": lambda: fastattn.accelerate(torch.nn.LayerNorm(8), verbose="no"),
    "attention: .*missing .*'query'": lambda: fastattn.explain("attention"),
    "attention: .*unexpected .*'windows'": lambda: fastattn.explain("attention", X, X, X, windows=(1, 1)),
    "accelerate: filter_fn": lambda: fastattn.accelerate(torch.nn.LayerNorm(8), filter_fn=3),
    "restore: model": lambda: fastattn.restore(3),
    "set_autotune: enabled must be a bool": lambda: fastattn.set_autotune("off"),
}


@pytest.mark.parametrize("message", CASES)
def test_wrong_types_raise_type_error(message):
    with pytest.raises(TypeError, match=message):
        CASES[message]()


@pytest.mark.parametrize(
    "message, call",
    [
        ("int8_matmul: activation", lambda: fastattn.int8_matmul(INT8, INT8, SCALE, SCALE, activation=["relu"])),
        ("Int8Linear: out_features", lambda: fastattn.Int8Linear(8, -1)),
        ("attention: backend must be", lambda: fastattn.attention(X, X, X, backend="gpu")),
        (
            "Int8Linear.from_linear: linear is lazy .*; call it on an input first",
            lambda: fastattn.Int8Linear.from_linear(torch.nn.LazyLinear(5)),
        ),
        ("Int8Linear: backend must be", lambda: fastattn.Int8Linear(8, 8, backend="gpu")),
        ("MultiHeadAttention: backend must be", lambda: fastattn.MultiHeadAttention(8, 2, backend="gpu")),
        ("use_backend: backend must be", lambda: fastattn.use_backend("gpu")),
        ("query has head_dim 8 but key_cache has", lambda: step(key_cache=torch.zeros(2, 6, 2, 9))),
        ("key_cache has 2 heads but value_cache has 1", lambda: step(value_cache=torch.zeros(2, 6, 1, 8))),
        ("value_cache, .* has elements that share memory", lambda: step(value_cache=CACHE[:1].expand(2, -1, -1, -1))),
        ("key_cache, .* has elements that share memory", lambda: step(key_cache=CACHE[:, :1].expand(-1, 6, -1, -1))),
        ("MultiHeadAttention: window", lambda: fastattn.MultiHeadAttention(8, 2, window=4)),
        ("MultiHeadAttention: query is on cpu but attn_mask", lambda: mha(attn_mask=torch.zeros(3, 3, device="meta"))),
        ("MultiHeadAttention: query is on meta but the module on cpu", lambda: mha(ROWS.to("meta"))),
    ],
)
def test_wrong_values_raise_value_error(message, call):
    with pytest.raises(ValueError, match=message):
        call()


def test_what_errors_advise_for_nested_tensors_works():
    values, offsets = JAGGED.values(), JAGGED.offsets()
    out = fastattn.varlen_attention(values, values, values, offsets, offsets, 4, 4)
    for nested in (JAGGED, NESTED):
        padded = nested.to_padded_tensor(0.0).transpose(1, 2)
        visible = (torch.arange(4) < torch.tensor([[3], [4]]))[:, None, None]
        rows = fastattn.attention(padded, padded, padded, visible).transpose(1, 2)
        assert rows.shape == (2, 4, 2, 8)
        if nested is JAGGED:
            torch.testing.assert_close(torch.cat((rows[0, :3], rows[1])), out)
    assert fastattn.layer_norm(values, 8).shape == values.shape


NUMBERS = {
    "layer_norm": ("eps", lambda eps: fastattn.layer_norm(ROWS, 8, eps=eps)),
    "rms_norm": ("eps", lambda eps: fastattn.rms_norm(ROWS, 8, eps=eps)),
    "add_layer_norm": ("eps", lambda eps: fastattn.add_layer_norm(ROWS, ROWS, 8, eps=eps)[0]),
    "add_rms_norm": ("dropout_p", lambda p: fastattn.add_rms_norm(ROWS, ROWS, 8, dropout_p=p)[0]),
    "attention": ("dropout_p", lambda p: fastattn.attention(X, X, X, dropout_p=p)),
    "varlen_attention": ("softcap", lambda c: fastattn.varlen_attention(
        *[X[0].transpose(0, 1)] * 3, *[torch.tensor([0, 4])] * 2, 4, 4, softcap=c)),
    "attention_with_kv_cache": ("scale", lambda scale: step(scale=scale)),
    "MultiHeadAttention": ("dropout", lambda p: fastattn.MultiHeadAttention(8, 2, dropout=p)),
}  # fmt: skip


@pytest.mark.parametrize("op", NUMBERS)
def test_every_op_takes_the_same_numbers(op):
    name, call = NUMBERS[op]
    for number in (0.5, 1, numpy.float32(0.5), numpy.float64(0.5), numpy.int64(1), True):
        torch.manual_seed(0)
        result = call(number)
        torch.manual_seed(0)
        if isinstance(result, torch.Tensor):
            assert torch.equal(result, call(float(number)))
    for other in ("0.5", [0.5], torch.tensor([0.5])):
        with pytest.raises(TypeError, match=f"{op}: {name} must be a number.*, got {type(other).__name__}"):
            call(other)


def test_numpy_scalars_are_numbers():
    options = {
        "window": (numpy.int64(1), numpy.int64(0)),
        "is_causal": numpy.bool_(False),
        "scale": numpy.float32(0.5),
        "dropout_p": numpy.float32(0),
    }
    expected = fastattn.attention(X, X, X, window=(1, 0), scale=0.5)
    assert torch.equal(fastattn.attention(X, X, X, **options), expected)
    expected = fastattn.add_layer_norm(ROWS, ROWS, 8, eps=0.5)
    actual = fastattn.add_layer_norm(ROWS, ROWS, numpy.int64(8), eps=numpy.float32(0.5), dropout_p=numpy.float32(0))
    assert torch.equal(actual[0], expected[0])


@pytest.mark.parametrize("backend", ["cpu", "eager"])
def test_a_window_wider_than_any_integer_is_no_window(backend):
    if fastattn.available_backends()[backend] is not None:
        pytest.skip(fastattn.available_backends()[backend])
    out = fastattn.attention(X, X, X, window=(2**70, 2**63 - 1), backend=backend)
    assert torch.equal(out, fastattn.attention(X, X, X, window=(-1, -1), backend=backend))


def test_lengths_may_be_numpy_integers():
    packed, starts = X.flatten(0, 1).transpose(0, 1).contiguous(), torch.tensor([0, X.shape[2]])
    longest = numpy.int64(X.shape[2])
    out = fastattn.varlen_attention(packed, packed, packed, starts, starts, longest, longest)
    torch.testing.assert_close(out.transpose(0, 1), fastattn.attention(X, X, X).flatten(0, 1))
    rows = X.transpose(1, 2).contiguous()
    short = fastattn.attention_with_kv_cache(rows, rows, rows, cache_seqlens=numpy.int32(3))
    assert torch.equal(short, fastattn.attention_with_kv_cache(rows, rows, rows, cache_seqlens=3))


def test_windows_of_numpy_integers_make_modules():
    x = torch.randn(1, 4, 8)
    module = fastattn.MultiHeadAttention(8, 2, batch_first=True, window=(numpy.int64(1), numpy.int64(0)))
    expected, module.window = module(x, x, x)[0], (1, 0)
    assert torch.equal(module(x, x, x)[0], expected)


FUNCTIONS = {
    "attention": lambda x: fastattn.attention(x, x, x),
    "layer_norm": lambda x: fastattn.layer_norm(x, (8,)),
    "rms_norm": lambda x: fastattn.rms_norm(x, 8),
    "add_layer_norm": lambda x: fastattn.add_layer_norm(x, x, 8)[0],
}


def test_int8_linear_has_forward_derivatives():
    """Straight through the rounding, as its gradient."""
    weight = INT8.float() * SCALE[:, None]
    tangent = torch.randn_like(ROWS)
    _, slope = torch.func.jvp(lambda x: fastattn.int8_linear(x, INT8, SCALE), (ROWS,), (tangent,))
    torch.testing.assert_close(slope, tangent @ weight.T)
    bias = torch.randn(5)
    _, slope = torch.func.jvp(lambda b: fastattn.int8_linear(ROWS, INT8, SCALE, b), (bias,), (bias,))
    torch.testing.assert_close(slope, bias.expand(3, 5))
    layer = fastattn.Int8Linear.from_linear(torch.nn.Linear(8, 5), "silu")
    with forward_ad.dual_level():
        out = forward_ad.unpack_dual(layer(forward_ad.make_dual(ROWS, tangent)))
    x = ROWS.clone().requires_grad_()
    dout = torch.randn(3, 5)
    (dx,) = torch.autograd.grad(layer(x), x, dout)
    torch.testing.assert_close((out.tangent * dout).sum(), (dx * tangent).sum())
    torch.testing.assert_close(torch.func.jacfwd(layer)(ROWS), torch.func.jacrev(layer)(ROWS))


@pytest.mark.parametrize("op", FUNCTIONS)
def test_transforms_run_where_they_have_rules(op):
    function = FUNCTIONS[op]
    x = X.clone().requires_grad_()
    (expected,) = torch.autograd.grad(function(x).square().sum(), x)
    actual = torch.func.grad(lambda x: function(x).square().sum())(X)
    torch.testing.assert_close(actual, expected)
    mapped = torch.func.vmap(function)(X[None].expand(2, *X.shape))
    torch.testing.assert_close(mapped[1], function(X))
    tangent = torch.randn_like(X)
    slope = (function((X + 1e-3 * tangent).double()) - function((X - 1e-3 * tangent).double())) / 2e-3
    with forward_ad.dual_level():
        out = forward_ad.unpack_dual(function(forward_ad.make_dual(X, tangent)))
    torch.testing.assert_close(out.tangent.double(), slope, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("op", FUNCTIONS)
def test_transforms_compile(op):
    function = FUNCTIONS[op]
    for transformed in (
        torch.func.grad(lambda x: function(x).square().sum()),
        torch.func.vmap(torch.func.grad(lambda x: function(x[None]).square().sum())),
        lambda x: torch.func.jvp(function, (x,), (x.cos(),))[1],
    ):
        torch._dynamo.reset()
        compiled = torch.compile(transformed, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(X), transformed(X))


@pytest.mark.skipif(fastattn.available_backends()["cpu"] is not None, reason="the extension was not built")
def test_compiled_code_beside_transforms_runs_kernels():
    calls = []

    def step(x):
        return fastattn.attention(x, x, x) + torch.func.vmap(lambda each: fastattn.attention(each, each, each))(x)

    def count(graph, _):
        calls.append(graph.code.count("torch.ops.fastattn.attention("))
        return graph

    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(step, fullgraph=True, backend=count)(X), step(X))
    assert calls == [1]


def test_int8_linear_has_gradients_in_compiled_transforms():
    def gradient(x):
        return torch.func.grad(lambda x: fastattn.int8_linear(x, INT8, SCALE).square().sum())(x)

    torch._dynamo.reset()
    compiled = torch.compile(gradient, fullgraph=True, backend="aot_eager")(ROWS)
    torch.testing.assert_close(compiled, gradient(ROWS))
    assert compiled.any()


def test_int8_layer_under_transforms_gives_its_gradient():
    layer = fastattn.Int8Linear.from_linear(torch.nn.Linear(8, 5))
    x = ROWS.clone().requires_grad_()
    (expected,) = torch.autograd.grad(layer(x).square().sum(), x)
    torch.testing.assert_close(torch.func.grad(lambda x: layer(x).square().sum())(ROWS), expected)


@pytest.mark.parametrize("backend", ["cpu", "eager"])
@pytest.mark.parametrize("mask", ["none", "bool", "float"])
def test_float64_slopes_are_not_rounded(backend, mask):
    if fastattn.available_backends()[backend] is not None:
        pytest.skip(fastattn.available_backends()[backend])
    q, k, v = (torch.randn(2, 3, 9, 4, dtype=torch.float64) for _ in range(3))
    slopes = torch.rand(2, 3, dtype=torch.float64)
    attn_mask = {"none": None, "bool": torch.rand(2, 1, 1, 9) < 0.7, "float": torch.randn(9, 9).double()}[mask]
    distance = (torch.arange(9)[:, None] - torch.arange(9)).abs()
    score = q @ k.mT / 2 - slopes[..., None, None] * distance
    if attn_mask is not None:
        score = score.masked_fill(~attn_mask, -math.inf) if mask == "bool" else score + attn_mask
    out = fastattn.attention(q, k, v, attn_mask=attn_mask, alibi_slopes=slopes, backend=backend)
    torch.testing.assert_close(out, score.softmax(-1).nan_to_num() @ v, rtol=0, atol=1e-13)


@pytest.mark.parametrize("lengths", [2, torch.tensor([2, 5])], ids=["int", "tensor"])
@pytest.mark.parametrize("table", [None, torch.tensor([[0, 1], [2, 3]])], ids=["dense", "paged"])
def test_appending_no_token_attends_to_the_cache(lengths, table):
    cache = torch.randn(2, 6, 2, 8) if table is None else torch.randn(4, 4, 2, 8)
    before, none = cache.clone(), torch.empty(2, 0, 2, 8)
    options = {"cache_seqlens": lengths, "block_table": table}
    expected = fastattn.attention_with_kv_cache(STEP, cache, cache, **options)
    assert torch.equal(fastattn.attention_with_kv_cache(STEP, cache, cache, none, none, **options), expected)
    assert torch.equal(cache, before)
