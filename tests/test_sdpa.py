"""F.scaled_dot_product_attention through fastattn: results, scope, threads, compiled code, torch's registry."""

import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.bias import causal_lower_right, causal_upper_left
from torch.utils._python_dispatch import TorchDispatchMode

import fastattn
from fastattn._extension import extension, missing_reason
from fastattn.integrations import sdpa

needs_extension = pytest.mark.skipif(extension is None, reason=str(missing_reason))
TORCHS = F.scaled_dot_product_attention


@pytest.fixture(autouse=True)
def nothing_left_behind():
    yield
    assert F.scaled_dot_product_attention is torch._C._nn.scaled_dot_product_attention is TORCHS
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.fixture
def calls(monkeypatch):
    """The arguments of the calls that reach fastattn."""
    seen, attention = [], sdpa.attention
    monkeypatch.setattr(sdpa, "attention", lambda *args, **kwargs: (seen.append(args), attention(*args, **kwargs))[1])
    return seen


def operands(batch=2, heads=4, seqlen_q=5, seqlen_k=7, heads_kv=None):
    k, v = (torch.randn(batch, heads_kv or heads, seqlen_k, 16) for _ in range(2))
    return torch.randn(batch, heads, seqlen_q, 16), k, v


OPTIONS = {
    "plain": {},
    "bool mask": {"attn_mask": torch.rand(5, 7) < 0.7},
    "float mask": {"attn_mask": torch.randn(2, 1, 5, 7)},
    "causal": {"is_causal": True},
    "scale": {"scale": 0.3},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_results_are_those_of_torch(name, calls):
    q, k, v = operands()
    expected = F.scaled_dot_product_attention(q, k, v, **OPTIONS[name])
    with sdpa.patch():
        actual = F.scaled_dot_product_attention(q, k, v, **OPTIONS[name])
    assert len(calls) == 1
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_grouped_heads_and_unbatched_operands():
    q, k, v = operands(heads_kv=2)
    expected = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    with sdpa.patch():
        actual = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        alone = F.scaled_dot_product_attention(q[0, 0], k[0, 0], v[0, 0])
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(alone, expected[0, 0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make_bias", [causal_upper_left, causal_lower_right])
def test_causal_bias_is_read_not_made(make_bias, calls):
    q, k, v = operands()
    expected = TORCHS(q, k, v, make_bias(5, 7)._materialize())
    with sdpa.patch():
        actual = F.scaled_dot_product_attention(q, k, v, make_bias(5, 7))
        with pytest.raises(ValueError, match="lengths 7 and 7"):
            F.scaled_dot_product_attention(q, k, v, make_bias(7, 7))
    assert len(calls) == 1 and calls[0][3] is None
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_modules_of_torch_call_it(training, calls):
    """Also in inference, where they would use an op of their own."""
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True).train(training)
    attention = nn.MultiheadAttention(32, 4, batch_first=True).train(training)
    x, padding = torch.randn(2, 6, 32), torch.tensor([[False] * 6, [False] * 4 + [True] * 2])
    with torch.set_grad_enabled(training):
        expected = layer(x, src_key_padding_mask=padding), attention(x, x, x, need_weights=False)[0]
        with sdpa.patch():
            actual = layer(x, src_key_padding_mask=padding), attention(x, x, x, need_weights=False)[0]
    assert len(calls) == 2
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a[~padding], b[~padding], rtol=1e-5, atol=1e-5)


class Subclass(torch.Tensor):
    pass


def test_subclasses_and_nested_tensors_keep_torchs_function(calls):
    q, k, v = operands()
    nested = torch.nested.nested_tensor([x.transpose(0, 1) for x in q], layout=torch.jagged).transpose(1, 2)
    with sdpa.patch():
        F.scaled_dot_product_attention(q.as_subclass(Subclass), k, v)
        F.scaled_dot_product_attention(nested, nested, nested)
    assert not calls


# --- Scope ------------------------------------------------------------------------------------------------------------


def test_blocks_nest_and_end_with_exceptions(calls):
    q, k, v = operands()
    block = sdpa.patch()
    with pytest.raises(RuntimeError, match="on purpose"), block:
        with block, sdpa.patch():
            F.scaled_dot_product_attention(q, k, v)
        F.scaled_dot_product_attention(q, k, v)
        raise RuntimeError("on purpose")
    F.scaled_dot_product_attention(q, k, v)
    assert len(calls) == 2


def test_is_a_decorator(calls):
    @sdpa.patch()
    def attend():
        return F.scaled_dot_product_attention(*operands())

    attend(), attend()
    assert len(calls) == 2 and F.scaled_dot_product_attention is TORCHS


def test_restores_what_another_had_put_there(monkeypatch):
    def anothers(*args, **kwargs):
        return TORCHS(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(F, "scaled_dot_product_attention", anothers)
        with sdpa.patch():
            assert F.scaled_dot_product_attention is sdpa.scaled_dot_product_attention
        assert F.scaled_dot_product_attention is anothers


def test_counts_in_all_threads_until_the_last_block_ends(calls):
    entered, leave = threading.Event(), threading.Event()

    def other():
        with sdpa.patch():
            entered.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    with sdpa.patch():
        thread.start()
        assert entered.wait(10)
    F.scaled_dot_product_attention(*operands())
    leave.set()
    thread.join()
    F.scaled_dot_product_attention(*operands())
    assert len(calls) == 1


def test_use_backend_chooses(calls):
    with sdpa.patch(), fastattn.use_backend("eager"), CountOps() as ops:
        F.scaled_dot_product_attention(*operands())
    assert len(calls) == 1 and ops.ours == 0


# --- Compiled code ----------------------------------------------------------------------------------------------------


class CountOps(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.ours = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ours += func.namespace == "fastattn"
        return func(*args, **(kwargs or {}))


@needs_extension
def test_compiled_functions_follow_the_block():
    torch._dynamo.reset()
    ops = []

    def backend(graph, example_inputs):
        ops.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return graph

    @torch.compile(fullgraph=True, backend=backend)
    def attend(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    q, k, v = operands()
    expected = attend(q, k, v)
    with sdpa.patch():
        torch.testing.assert_close(attend(q, k, v), expected, rtol=1e-5, atol=1e-5)
    attend(q, k, v)
    assert len(ops) == 2
    assert not any("fastattn" in op for op in ops[0])
    assert any("fastattn.attention" in op for op in ops[1])


# --- torch's registry -------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(torch.nn.attention, "register_flash_attention_impl"), reason="torch has no registry")
def test_torchs_registry_activates_and_restores(calls):
    sdpa.register()
    assert "fastattn" in torch.nn.attention.list_flash_attention_impls()
    F.scaled_dot_product_attention(*operands())
    for _ in range(2):  # the second activation ends the first
        torch.nn.attention.activate_flash_attention_impl("fastattn")
    F.scaled_dot_product_attention(*operands())
    torch.nn.attention.restore_flash_attention_impl()
    F.scaled_dot_product_attention(*operands())
    assert len(calls) == 1


def test_an_old_torch_is_told_to_use_patch(monkeypatch):
    monkeypatch.delattr(torch.nn.attention, "register_flash_attention_impl", raising=False)
    with pytest.raises(NotImplementedError, match="patch"):
        sdpa.register()
