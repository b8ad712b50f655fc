"""What torch's FLOP counter finds in fastattn's ops: its own formulas' numbers."""

from __future__ import annotations

import pytest
import torch
from devices import device_for
from torch._subclasses import FakeTensorMode
from torch.utils import flop_counter
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

import fastattn

BACKENDS = [name for name in ("cuda", "triton", "cpu") if fastattn.available_backends()[name] is None]


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setattr(flop_counter, "flop_registry", dict(flop_counter.flop_registry))
    for _ in range(2):  # more than once is as once
        fastattn.integrations.flop_counter.register()


@pytest.fixture(params=BACKENDS)
def backend(request):
    with fastattn.use_backend(request.param), torch.device(device_for(request.param)):
        yield request.param


def count(function, *args, **options) -> int:
    with FlopCounterMode(display=False) as counter:
        function(*args, **options)
    return counter.get_total_flops()


def half(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float16, requires_grad=True)


def test_attention_and_its_gradients_count_as_torchs(backend):
    q, k, v = half(2, 4, 5, 16), half(2, 2, 7, 16), half(2, 2, 7, 8)
    # PyTorch 2.11's formulas have no grouped heads: keys and values as their products see them.
    shapes = (q.shape, (2, 4, 7, 16), (2, 4, 7, 8))
    forward = sdpa_flop_count(*shapes)
    assert count(fastattn.attention, q, k, v, enable_gqa=True, is_causal=True) == forward
    out = fastattn.attention(q, k, v, enable_gqa=True)
    assert count(out.sum().backward) == sdpa_backward_flop_count(out.shape, *shapes)


def test_attention_weights_count_the_scores_twice(backend):
    module, x = fastattn.MultiHeadAttention(16, 2, batch_first=True, dtype=torch.float16), half(3, 5, 16)
    weights = 2 * 3 * 2 * 5 * 5 * 8
    difference = count(module, x, x, x) - count(module, x, x, x, need_weights=False)
    assert difference == weights


def test_packed_sequences_count_their_own_lengths(backend):
    q, k, v = half(9, 4, 16), half(10, 2, 16), half(10, 2, 8)
    starts_q, starts_k = torch.tensor([0, 4, 4, 9]), torch.tensor([0, 3, 8, 10])
    arguments = (q, k, v, starts_q, starts_k, 5, 5)
    pairs = 4 * (4 * 3 + 5 * 2)
    assert count(fastattn.varlen_attention, *arguments) == pairs * 2 * (16 + 8)
    out = fastattn.varlen_attention(*arguments)
    assert count(out.sum().backward) == pairs * 2 * (3 * 16 + 2 * 8)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = [mode.from_tensor(each) for each in arguments[:5]]
        assert count(fastattn.varlen_attention, *fake, 5, 5) == 4 * 3 * 5 * 5 * 2 * (16 + 8)


@pytest.mark.parametrize("lengths", [3, torch.tensor([3, 5])], ids=["int", "tensor"])
def test_a_cache_counts_the_keys_that_it_holds(lengths, backend):
    q, new = half(2, 1, 4, 16), half(2, 1, 2, 16).detach()
    caches = torch.zeros(2, 2, 8, 2, 16, dtype=torch.float16)
    total = 6 if isinstance(lengths, int) else 8
    lengths = lengths if isinstance(lengths, int) else lengths.to(q.device)
    with torch.no_grad():
        flops = count(fastattn.attention_with_kv_cache, q, *caches, new, new, cache_seqlens=lengths)
    assert flops == (total + 2) * 4 * 2 * (16 + 16)


def test_integer_products_count_as_floating_ones(backend):
    linear, x = torch.nn.Linear(32, 48).half(), half(5, 32).detach()
    module = fastattn.Int8Linear.from_linear(linear)
    q, scale = fastattn.quantize_int8(x)
    expected = count(linear, x)
    assert count(module, x) == expected == 2 * 5 * 32 * 48
    assert count(fastattn.int8_matmul, q, module.weight, scale, module.weight_scale) == expected
    assert count(fastattn.int8_linear, x, module.weight, module.weight_scale) == expected


def test_norms_count_nothing(backend):
    assert count(fastattn.LayerNorm(16, dtype=torch.float16), half(3, 16)) == 0
