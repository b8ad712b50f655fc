"""The accuracy rule itself for attention's gradients of masks, sinks and few keys: at each tensor's size and dtype.

`attention_cases.check` allows roundings besides, which gradients of operands need; float32 sums over rows and keys do
not.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import pytest
import torch
from accuracy import allowed_error, max_error
from attention_cases import KERNEL_BACKENDS, Case, dtype_id, run
from devices import device_for, triton_is_slow
from emulated import MODES, Mode

import fastattn

# Interpreted, at small shapes.
BACKENDS = [
    *dict.fromkeys([*KERNEL_BACKENDS, *(["triton"] if fastattn.available_backends()["triton"] is None else [])])
]
HALF = [torch.bfloat16, torch.float16]


def check_strictly(case: Case, dtype: torch.dtype, backend: str, names: Iterable[str], slack: float = 1.0) -> None:
    if backend == "triton" and triton_is_slow():
        small = {"seqlen_q": min(case.seqlen_q, 37), "seqlen_k": min(case.seqlen_k, 70)}
        case = dataclasses.replace(case, batch=1, **small, head_dim=min(case.head_dim, 32))
    inputs, device = case.inputs(dtype), device_for(backend)
    try:
        actual = run(case, inputs, backend)
    except NotImplementedError as refusal:
        pytest.skip(str(refusal))
    eager = run(case, inputs, "eager", device=device)
    reference = run(case, inputs, "eager", wide=True, device=device)
    for name in names:
        assert actual[name].dtype == eager[name].dtype
        error, allowed = max_error(actual[name], reference[name]), allowed_error(eager[name], reference[name])
        assert error <= slack * allowed, f"{name}: max error {error:.3e} exceeds {slack} x {allowed:.3e}"


def _mask(*shape: str):
    return {"attn_mask": lambda case: torch.randn([getattr(case, name) if name != "1" else 1 for name in shape])}


# Adding a number to all scores of a row changes nothing but its lse: the gradient is that of the lse, and the sum over
# the row's keys of gradients that cancel has as many roundings as terms.
OVER_KEYS = {
    "per_query": Case(tensors=_mask("batch", "heads", "seqlen_q", "1")),
    "per_query_of_all": Case(tensors=_mask("seqlen_q", "1"), options={"dropout_p": 0.3, "softcap": 3.0}),
    "per_head": Case(tensors=_mask("heads", "1", "1"), heads_kv=2, options={"is_causal": True}),
    "scalar": Case(tensors=_mask("1"), options={"window": (20, 30)}),
    "one_key": Case(tensors=_mask("batch", "heads", "seqlen_q", "seqlen_k"), seqlen_k=1),
    "one_key_of_all": Case(tensors=_mask("1", "seqlen_k"), seqlen_k=1, options={"scale": 1.0}),
    # More than the CPU kernel holds the probabilities of.
    "many_keys": Case(tensors=_mask("heads", "seqlen_q", "1"), seqlen_k=300),
    "many_keys_scalar": Case(tensors=_mask("1"), seqlen_k=300, options={"is_causal": True}),
    # The first 32 queries see nothing.
    "empty_rows": Case(
        tensors=_mask("seqlen_q", "1"),
        seqlen_q=97,
        seqlen_k=65,
        options={"is_causal": True, "alignment": "bottom_right"},
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=dtype_id)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", OVER_KEYS)
def test_gradient_of_a_mask_that_broadcasts_over_keys(name, backend, dtype):
    check_strictly(OVER_KEYS[name], dtype, backend, ["dattn_mask"])


# Scores and outputs so large that what rounds on its own, lse and rowsum(dout out), shows: of a row's only key, p is 1
# and ds is dlse, which eager gets right. (Where keys share rows, sums over these round more.)
FEW_KEYS = {
    "one_key": (Case(seqlen_k=1, head_dim_v=64, options={"scale": 3.3}), ["dquery"]),
    "one_key_seen": (Case(head_dim_v=64, options={"scale": 3.3, "window": (0, 0)}), ["dquery", "dkey", "dvalue"]),
    "dropout": (Case(seqlen_k=1, head_dim_v=64, options={"scale": 3.3, "dropout_p": 0.3}), ["dquery"]),
    "shared": (Case(seqlen_k=1, heads_kv=1, head_dim_v=64, options={"scale": 3.3}), ["dquery"]),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", FEW_KEYS)
def test_float32_gradients_of_few_keys(name, backend):
    case, names = FEW_KEYS[name]
    check_strictly(case, torch.float32, backend, names)


def _sinks(**more):
    return {"sinks": lambda case: torch.randn(case.heads), **more}


# float32 gradients of a 16-bit call, in which a kernel has out and its own rounded probabilities in 16 bits.
SUMS = {
    "sinks": Case(tensors=_sinks()),
    "sinks_causal": Case(tensors=_sinks(), head_dim=128, options={"is_causal": True}),
    "sinks_softcap_dropout": Case(tensors=_sinks(), heads_kv=2, options={"softcap": 3.0, "dropout_p": 0.3}),
    "sinks_wide": Case(tensors=_sinks(), heads=2, head_dim=200, options={"window": (20, 10)}),
    "mask": Case(tensors=_mask("batch", "heads", "seqlen_q", "seqlen_k")),
    "mask_shared": Case(tensors=_mask("seqlen_q", "seqlen_k"), head_dim=96, options={"softcap": 3.0}),
    "mask_per_key": Case(tensors=_mask("batch", "1", "1", "seqlen_k"), heads_kv=1, options={"is_causal": True}),
    "mask_dropout": Case(tensors=_mask("heads", "seqlen_q", "seqlen_k"), options={"dropout_p": 0.3}),
    "mask_sinks": Case(tensors=_sinks(**_mask("heads", "seqlen_q", "seqlen_k")), heads=2, head_dim=256),
    "row_mask_sinks": Case(tensors=_sinks(**_mask("heads", "seqlen_q", "1"))),
}


@pytest.mark.parametrize("dtype", HALF, ids=dtype_id)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", SUMS)
def test_float32_gradients_of_16_bit_calls(name, backend, dtype):
    """Made from `out` as it is in memory, the larger half of them is wrong by 100 to 10,000 times what the rule allows.

    A few miss the rule itself by luck: sums over a whole tensor are one number, and eager's may be right by chance.
    """
    wanted = {"dsinks", "dattn_mask"} & {f"d{tensor}" for tensor in SUMS[name].tensors}
    check_strictly(SUMS[name], dtype, backend, wanted, slack=4.0)


# The same on Hopper, of whose kernels none owns rows: with one tile of keys and with several, at every head_dim.
ON_HOPPER = {
    **SUMS,
    "sinks_64": Case(tensors=_sinks(), heads=2, head_dim=64, seqlen_q=200, seqlen_k=300),
    "sinks_96": Case(tensors=_sinks(), heads=2, heads_kv=1, head_dim=96, seqlen_q=150, seqlen_k=300),
    "sinks_192": Case(tensors=_sinks(), heads=2, head_dim=192, seqlen_k=150, options={"is_causal": True}),
    "sinks_alibi": Case(
        tensors=_sinks(alibi_slopes=lambda case: torch.rand(case.heads)), head_dim=128, options={"dropout_p": 0.2}
    ),
    "mask_128": Case(tensors=_sinks(**_mask("seqlen_q", "seqlen_k")), heads=2, head_dim=128, seqlen_k=300),
    "mask_256": Case(tensors=_mask("seqlen_q", "seqlen_k"), heads=2, head_dim=256, options={"dropout_p": 0.2}),
}


@pytest.fixture
def on_hopper(request):
    mode = MODES[request.param % len(MODES)]
    mode.apply(compute_capability=90, multiprocessors=4)
    torch.use_deterministic_algorithms(request.param % 2 == 1)
    yield
    torch.use_deterministic_algorithms(False)
    Mode().apply(compute_capability=80, multiprocessors=108)


@pytest.mark.skipif("emulated" not in BACKENDS, reason="this build has no emulator")
@pytest.mark.parametrize("on_hopper", [0, 1], ids=["any_order", "fixed_order"], indirect=True)
@pytest.mark.parametrize("dtype", HALF, ids=dtype_id)
@pytest.mark.parametrize("name", ON_HOPPER)
def test_float32_gradients_of_16_bit_calls_on_hopper(name, dtype, on_hopper):
    wanted = {"dsinks", "dattn_mask"} & {f"d{tensor}" for tensor in ON_HOPPER[name].tensors}
    check_strictly(ON_HOPPER[name], dtype, "emulated", wanted, slack=4.0)
