"""flash-attn's functions against formulas in float64, and against the signatures that its users rely on."""

import inspect
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastattn.integrations.flash_attn as flash_attn
from fastattn.integrations.flash_attn import bert_padding

_COMMON = (
    "dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, "
    "deterministic=False, return_attn_probs=False"
)
SIGNATURES = {
    "flash_attn_func": f"q, k, v, {_COMMON}",
    "flash_attn_kvpacked_func": f"q, kv, {_COMMON}",
    "flash_attn_qkvpacked_func": f"qkv, {_COMMON}",
    "flash_attn_varlen_func": "q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, "
    f"{_COMMON}, block_table=None",
    "flash_attn_varlen_kvpacked_func": f"q, kv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, {_COMMON}",
    "flash_attn_varlen_qkvpacked_func": f"qkv, cu_seqlens, max_seqlen, {_COMMON}",
    "flash_attn_with_kvcache": "q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, "
    "cache_seqlens=None, cache_batch_idx=None, cache_leftpad=None, block_table=None, softmax_scale=None, "
    "causal=False, window_size=(-1, -1), softcap=0.0, rotary_interleaved=True, alibi_slopes=None, num_splits=0, "
    "return_softmax_lse=False",
}


def reference(q, k, v, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None):
    """(out, lse) of one sequence in float64: q (seqlen_q, heads, head_dim), k and v (seqlen_k, heads_kv, head_dim)."""
    q, k, v = (x.double().transpose(0, 1) for x in (q, k, v))
    k, v = (x.repeat_interleave(len(q) // len(x), 0) for x in (k, v))
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    seqlen_q, seqlen_k = scores.shape[1:]
    distance = torch.arange(seqlen_k) - (torch.arange(seqlen_q)[:, None] + seqlen_k - seqlen_q)
    if alibi_slopes is not None:
        scores = scores - alibi_slopes.double()[:, None, None] * distance.abs()
    left, right = window_size
    hidden = (distance > 0) & causal | (distance < -left) & (left >= 0) | (distance > right) & (right >= 0)
    scores = scores.masked_fill(hidden, -torch.inf)
    lse = scores.logsumexp(-1)
    return (torch.exp(scores - lse.nan_to_num(neginf=0.0)[..., None]) @ v).transpose(0, 1), lse


def batched_reference(q, k, v, alibi_slopes=None, **options):
    each = range(len(q))
    slopes = [alibi_slopes if alibi_slopes is None or alibi_slopes.dim() == 1 else alibi_slopes[b] for b in each]
    outs, lses = zip(*(reference(q[b], k[b], v[b], alibi_slopes=slopes[b], **options) for b in each), strict=True)
    return torch.stack(outs), torch.stack(lses)


def assert_close(actual, expected):
    torch.testing.assert_close(actual.double(), expected.double(), rtol=2e-5, atol=2e-5)


OPTIONS = (
    {},
    {"causal": True},
    {"causal": True, "softmax_scale": 0.3, "softcap": 2.0},
    {"window_size": (2, 1)},
    {"window_size": (3, -1), "causal": True},
    {"alibi_slopes": torch.tensor([0.5, 0.2, 0.1, 0.0])},
    {"alibi_slopes": torch.tensor([[0.5, 0.2, 0.1, 0.0], [0.0, 0.1, 0.2, 0.3]]), "causal": True},
)


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_are_those_of_flash_attn(name):
    parameters = inspect.signature(getattr(flash_attn, name)).parameters.values()
    plain = [p.replace(annotation=p.empty) for p in parameters]
    assert ", ".join(map(str, plain)).replace(" = ", "=") == SIGNATURES[name]


def test_stands_in_for_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", flash_attn)
    monkeypatch.setitem(sys.modules, "flash_attn.bert_padding", bert_padding)
    namespace = {}
    exec("from flash_attn import flash_attn_func\nfrom flash_attn.bert_padding import pad_input", namespace)
    assert namespace["flash_attn_func"] is flash_attn.flash_attn_func


# --- Dense ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seqlen_q, seqlen_k", [(7, 7), (3, 9), (9, 3)])
@pytest.mark.parametrize("options", OPTIONS, ids=range(len(OPTIONS)))
def test_flash_attn_func(options, seqlen_q, seqlen_k):
    q = torch.randn(2, seqlen_q, 4, 16, requires_grad=True)
    k, v = (torch.randn(2, seqlen_k, 2, 16, requires_grad=True) for _ in range(2))
    expected, expected_lse = batched_reference(q, k, v, **options)
    out, lse, probabilities = flash_attn.flash_attn_func(q, k, v, **options, return_attn_probs=True)
    assert_close(out, expected)
    assert_close(lse, expected_lse)
    assert lse.dtype == torch.float32 and probabilities.numel() == 0
    assert torch.equal(flash_attn.flash_attn_func(q, k, v, **options), out)
    dout = torch.randn_like(out)
    gradients = torch.autograd.grad(out, (q, k, v), dout)
    for actual, reference_gradient in zip(
        gradients, torch.autograd.grad(expected, (q, k, v), dout.double()), strict=True
    ):
        assert_close(actual, reference_gradient)


def test_rows_without_keys_are_0():
    q, k = torch.randn(1, 5, 2, 8), torch.randn(1, 2, 2, 8)
    out, lse, _ = flash_attn.flash_attn_func(q, k, k, causal=True, return_attn_probs=True)
    assert (out[:, :3] == 0).all() and (lse[..., :3] == -torch.inf).all() and lse[..., 3:].isfinite().all()


_LENGTHS = {"cu_seqlens": torch.tensor([0, 3]), "max_seqlen": 3}
_BOTH_LENGTHS = {f"{name}_{of}": length for name, length in _LENGTHS.items() for of in "qk"}


@pytest.mark.parametrize("wrong", [None, [1.0], torch.zeros(3, 4), torch.nested.nested_tensor([torch.zeros(3, 1, 4)])])
@pytest.mark.parametrize(
    ("name", "operands", "options"),
    [
        ("flash_attn_func", "q k v", {}),
        ("flash_attn_kvpacked_func", "kv q", {}),
        ("flash_attn_qkvpacked_func", "qkv", {}),
        ("flash_attn_varlen_kvpacked_func", "kv q", _BOTH_LENGTHS),
        ("flash_attn_varlen_qkvpacked_func", "qkv", _LENGTHS),
        ("flash_attn_with_kvcache", "k_cache q v_cache", {}),
    ],
)
def test_operands_of_other_types_and_shapes_are_named(name, operands, options, wrong):
    first, *others = operands.split()
    operands = {first: wrong} | {other: torch.zeros(1, 3, 2, 4) for other in others}
    error = ValueError if isinstance(wrong, torch.Tensor) and not wrong.is_nested else TypeError
    with pytest.raises(error, match=f"^{name}: {first} must be "):
        getattr(flash_attn, name)(**operands, **options)


def test_packed_operands_have_as_many_parts_as_they_should():
    with pytest.raises(
        ValueError, match=r"^flash_attn_qkvpacked_func: qkv must be \(batch, seqlen, 3, heads, head_dim"
    ):
        flash_attn.flash_attn_qkvpacked_func(torch.zeros(1, 3, 2, 2, 4))


def test_packed_forms_are_the_same_function():
    options = {"causal": True, "softmax_scale": 0.4, "window_size": (3, 0), "softcap": 1.0}
    qkv = torch.randn(2, 6, 3, 4, 16)
    expected = flash_attn.flash_attn_func(*qkv.unbind(2), **options)
    assert torch.equal(flash_attn.flash_attn_qkvpacked_func(qkv, **options), expected)
    assert torch.equal(flash_attn.flash_attn_kvpacked_func(qkv[:, :, 0], qkv[:, :, 1:], **options), expected)
    packed, lengths = qkv.flatten(0, 1), torch.tensor([0, 6, 12], dtype=torch.int32)
    expected = expected.flatten(0, 1)
    assert_close(flash_attn.flash_attn_varlen_qkvpacked_func(packed, lengths, 6, **options), expected)
    q, kv = packed[:, 0], packed[:, 1:]
    assert_close(flash_attn.flash_attn_varlen_kvpacked_func(q, kv, lengths, lengths, 6, 6, **options), expected)


def test_probabilities_tell_what_dropout_dropped():
    q, k, v = (torch.randn(2, 40, 3, 8) for _ in range(3))
    out, lse, probabilities = flash_attn.flash_attn_func(q, k, v, dropout_p=0.3, causal=True, return_attn_probs=True)
    assert_close(lse, batched_reference(q, k, v, causal=True)[1])
    assert_close(probabilities.abs().sum(-1), torch.ones(2, 3, 40))
    dropped = (probabilities < 0).sum() / (probabilities != 0).sum()
    assert abs(dropped - 0.3) < 0.03
    assert_close(out.transpose(1, 2), probabilities.clamp(min=0) / 0.7 @ v.transpose(1, 2))


# --- Packed sequences -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS, ids=range(len(OPTIONS)))
def test_flash_attn_varlen_func(options):
    lengths_q, lengths_k = (3, 5), (6, 4)
    q, k, v = (
        torch.randn(sum(lengths), heads, 16) for lengths, heads in ((lengths_q, 4), (lengths_k, 2), (lengths_k, 2))
    )
    cu_seqlens = [torch.tensor([0, a, a + b], dtype=torch.int32) for a, b in (lengths_q, lengths_k)]
    out, lse, _ = flash_attn.flash_attn_varlen_func(q, k, v, *cu_seqlens, 5, 6, **options, return_attn_probs=True)
    slopes = options.get("alibi_slopes")
    each = [slopes[b] if slopes is not None and slopes.dim() == 2 else slopes for b in range(2)]
    sequences = zip(q.split(lengths_q), k.split(lengths_k), v.split(lengths_k), each, strict=True)
    expected = [reference(q, k, v, **options | {"alibi_slopes": slopes}) for q, k, v, slopes in sequences]
    assert_close(out, torch.cat([out for out, _ in expected]))
    assert_close(lse, torch.cat([lse for _, lse in expected], dim=1))
    assert lse.shape == (4, 8)


def test_what_varlen_lacks_is_refused():
    q, lengths = torch.randn(4, 2, 8), torch.tensor([0, 4], dtype=torch.int32)
    with pytest.raises(NotImplementedError, match="block_table"):
        flash_attn.flash_attn_varlen_func(q, q, q, lengths, lengths, 4, 4, block_table=torch.zeros(1, 1))
    with pytest.raises(NotImplementedError, match="return_attn_probs"):
        flash_attn.flash_attn_varlen_func(q, q, q, lengths, lengths, 4, 4, dropout_p=0.1, return_attn_probs=True)


@settings(max_examples=30, deadline=None, database=None)
@given(st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=1, max_size=4))
def test_unpad_and_pad_are_inverse(rows):
    mask = torch.tensor(rows)
    hidden = torch.randn(*mask.shape, 3, requires_grad=True)
    tokens, indices, cu_seqlens, longest, used = bert_padding.unpad_input(hidden, mask.long())
    assert torch.equal(tokens, hidden[mask])
    assert cu_seqlens.dtype == used.dtype == torch.int32
    assert cu_seqlens.tolist() == [0, *mask.sum(1).cumsum(0).tolist()]
    assert longest == mask.sum(1).max() and torch.equal(used, mask.sum(1).int())
    padded = bert_padding.pad_input(tokens, indices, *mask.shape)
    assert torch.equal(padded, hidden * mask[..., None])
    (gradient,) = torch.autograd.grad(padded.sum(), hidden)
    assert torch.equal(gradient, mask[..., None].expand_as(hidden).float())


def test_unpad_keeps_unused_tokens_and_several_sequences_a_row():
    hidden, mask = torch.randn(2, 4, 3), torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]])
    tokens, _, cu_seqlens, longest, used = bert_padding.unpad_input(hidden, mask, torch.tensor([[0, 0, 1, 0], [0] * 4]))
    assert torch.equal(tokens, torch.cat([hidden[0, :3], hidden[1, :1]]))
    assert cu_seqlens.tolist() == [0, 3, 4] and longest == 3 and used.tolist() == [2, 1]
    lengths = torch.tensor([[2, 1, 0, 0], [3, 0, 0, 0]])
    tokens, _, cu_seqlens, longest = bert_padding.unpad_input_for_concatenated_sequences(hidden, lengths)
    assert torch.equal(tokens, hidden[:, :3].flatten(0, 1))
    assert cu_seqlens.tolist() == [0, 2, 3, 6] and longest == 3


# --- The key/value cache ----------------------------------------------------------------------------------------------


def rotate(x, position, cos, sin, interleaved):
    """x (heads, head_dim) turned by the angles of one position."""
    half = cos.shape[1]
    turned, c, s = x.clone(), cos[position], sin[position]
    even, odd = (slice(0, 2 * half, 2), slice(1, 2 * half, 2)) if interleaved else (slice(half), slice(half, 2 * half))
    turned[:, even], turned[:, odd] = x[:, even] * c - x[:, odd] * s, x[:, even] * s + x[:, odd] * c
    return turned


CACHES = {
    "plain": {},
    "plain, causal": {"causal": True},
    "window": {"window_size": (3, 0)},
    "rotary": {"causal": True, "rotary": True},
    "rotary, halves": {"causal": True, "rotary": True, "rotary_interleaved": False},
    "rotary, all queries at one position": {"rotary": True},
    "left padding": {"leftpad": True, "causal": True, "rotary": True},
    "left padding, not causal": {"leftpad": True, "rotary": True},
    "rows of the cache": {"batch_idx": True, "causal": True},
    "rows of the cache, left padding": {"batch_idx": True, "leftpad": True, "causal": True},
    "pages": {"pages": True, "causal": True, "rotary": True},
    "pages, not causal": {"pages": True, "rotary": True},
    "slopes and softcap": {"causal": True, "softcap": 1.5, "alibi_slopes": torch.tensor([0.4, 0.3, 0.2, 0.1])},
}


@pytest.mark.parametrize("case", CACHES)
def test_flash_attn_with_kvcache(case):
    options = dict(CACHES[case])
    rotary, leftpad, batch_idx, pages = (options.pop(n, False) for n in ("rotary", "leftpad", "batch_idx", "pages"))
    batch, capacity, new, lengths = 2, 12, 3, torch.tensor([5, 8], dtype=torch.int32)
    q, k, v = (torch.randn(batch, new, heads, 16) for heads in (4, 2, 2))
    cos, sin = torch.rand(20, 4).mul(6).cos(), torch.rand(20, 4).mul(6).sin()
    starts = torch.tensor([2, 1], dtype=torch.int32) if leftpad else torch.zeros(2, dtype=torch.int32)
    rows = torch.tensor([3, 1], dtype=torch.int32) if batch_idx else torch.arange(batch)
    k_cache, v_cache = (torch.randn(4, capacity, 2, 16) for _ in range(2))

    # By the definition, one sequence after the other.
    interleaved, expected, expected_lse = options.get("rotary_interleaved", True), [], []
    caches = k_cache.clone(), v_cache.clone()
    advancing = "causal" in options or "window_size" in options
    for b in range(batch):
        first, row = int(lengths[b]), int(rows[b])
        query, key = q[b].clone(), k[b].clone()
        for i in range(new if rotary else 0):
            query[i] = rotate(query[i], first + i * advancing, cos, sin, interleaved)
            key[i] = rotate(key[i], first + i, cos, sin, interleaved)
        caches[0][row, first : first + new], caches[1][row, first : first + new] = key, v[b]
        held = [cache[row, int(starts[b]) : first + new] for cache in caches]
        plain = {name: option for name, option in options.items() if name != "rotary_interleaved"}
        out, lse = reference(query, *held, **plain)
        expected.append(out)
        expected_lse.append(lse)

    arguments = options | {"cache_seqlens": lengths, "return_softmax_lse": True}
    arguments |= {"rotary_cos": cos, "rotary_sin": sin} if rotary else {}
    arguments |= {"cache_leftpad": starts} if leftpad else {}
    arguments |= {"cache_batch_idx": rows} if batch_idx else {}
    given = k_cache, v_cache
    if pages:
        # Blocks of 4 tokens in another order.
        order = torch.randperm(12)
        given = [torch.empty(12, 4, 2, 16).index_copy(0, order, cache.view(12, 4, 2, 16)) for cache in given]
        arguments["block_table"] = order.view(4, 3)[:batch].int()
    out, lse = flash_attn.flash_attn_with_kvcache(q, *given, k, v, **arguments)
    assert_close(out, torch.stack(expected))
    assert_close(lse, torch.stack(expected_lse))
    for actual, cache in zip(given, caches, strict=True):
        assert_close(actual[order].view_as(cache) if pages else actual, cache)


def test_cache_without_lengths_is_full_and_needs_no_grad_mode():
    q, cache = torch.randn(2, 1, 4, 16, requires_grad=True), torch.randn(2, 9, 4, 16)
    out = flash_attn.flash_attn_with_kvcache(q, cache, cache)
    assert_close(out, batched_reference(q, cache, cache)[0])
    assert not out.requires_grad
    with pytest.raises(ValueError, match="cache_seqlens"):
        flash_attn.flash_attn_with_kvcache(q, cache, cache, cache[:, :1], cache[:, :1])
    with pytest.raises(NotImplementedError, match="block_table"):
        table = torch.zeros(2, 1, dtype=torch.int32)
        flash_attn.flash_attn_with_kvcache(q, cache, cache, block_table=table, cache_batch_idx=table[:, 0])


_TOKEN = torch.zeros(2, 1, 4, 16)
_ANGLES = torch.ones(20, 4)


@pytest.mark.parametrize("change, error, message", [
    ({"cache_leftpad": [0, 0]}, TypeError, "cache_leftpad must be an int32 or int64 Tensor, got list"),
    ({"cache_leftpad": torch.tensor([1])}, ValueError, r"cache_leftpad must be \(batch,\) = \(2,\), got shape \(1,\)"),
    ({"cache_leftpad": torch.tensor([1, -1])}, ValueError, "cache_leftpad must be >= 0, got -1"),
    ({"cache_batch_idx": [0, 1]}, TypeError, "cache_batch_idx must be an int32 or int64 Tensor, got list"),
    ({"cache_batch_idx": torch.tensor([1])}, ValueError, r"cache_batch_idx must be \(batch,\) = \(2,\)"),
    ({"window_size": 3}, ValueError, r"window must be \(left, right\)"),
    # With left padding the tokens are appended here, in front of the op.
    ({"v": None}, TypeError, "key and value must be given together"),
    ({"k": torch.ones(2, 1, 1, 16)}, ValueError, "key must be"),
    ({"rotary_cos": _ANGLES}, TypeError, "rotary_cos and rotary_sin must be Tensors and be given together"),
    ({"cache_seqlens": 3.0}, TypeError, "cache_seqlens must be an int or a Tensor, got float"),
    ({"alibi_slopes": torch.ones(3)}, ValueError, "alibi_slopes must be"),
])  # fmt: skip
def test_rejects_and_writes_nothing(change, error, message):
    cache = torch.zeros(2, 9, 4, 16)
    arguments = {"k": _TOKEN + 1, "v": _TOKEN + 1, "cache_seqlens": 4, "cache_leftpad": torch.tensor([1, 0])} | change
    with pytest.raises(error, match=message):
        flash_attn.flash_attn_with_kvcache(_TOKEN, cache, cache, **arguments)
    assert not cache.any()


@pytest.mark.parametrize("options", [{"cache_leftpad": torch.tensor([1, 2])}, {}], ids=["left padding", "plain"])
def test_no_new_tokens_are_as_none(options):
    cache = torch.randn(2, 9, 4, 16)
    options = options | {"cache_seqlens": 5, "rotary_cos": _ANGLES, "rotary_sin": _ANGLES}
    out = flash_attn.flash_attn_with_kvcache(_TOKEN + 1, cache, cache, _TOKEN[:, :0], _TOKEN[:, :0], **options)
    assert torch.equal(out, flash_attn.flash_attn_with_kvcache(_TOKEN + 1, cache, cache, **options))


def test_positions_outside_the_rotation_are_refused():
    q, cache = torch.randn(2, 2, 4, 16), torch.randn(2, 9, 4, 16)
    angles = torch.ones(6, 4)
    rotary = {"rotary_cos": angles, "rotary_sin": angles}
    flash_attn.flash_attn_with_kvcache(q, cache, cache, cache_seqlens=5, **rotary)  # all queries at 5
    for options in ({"causal": True, "cache_seqlens": 5}, {"cache_seqlens": 6}):
        with pytest.raises(ValueError, match="rotary_cos has 6 positions"):
            flash_attn.flash_attn_with_kvcache(q, cache, cache, **options, **rotary)
