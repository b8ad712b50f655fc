"""What the tests of attention share: inputs, a run with all its gradients, the comparison with eager and float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest
import torch
from accuracy import assert_as_accurate_as_eager, ulp
from devices import device_for, triton_is_slow
from torch import Tensor

import fastattn
from fastattn import dispatch

# Every backend that has a kernel and that this machine can run; eager is what they are compared with. Interpreted
# Triton would take minutes at these shapes: test_attention_triton.py runs the same features at smaller ones.
KERNEL_BACKENDS = [
    kernel.backend
    for kernel in dispatch.TABLE["attention"]
    if kernel.backend != "eager"
    and fastattn.available_backends()[kernel.backend] is None
    and not (kernel.backend == "triton" and triton_is_slow())
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
INF = float("inf")
TRITON_TILE = 32 if triton_is_slow() else 128  # the largest, of rows and of keys


def dtype_id(dtype: object) -> str | None:
    return str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else None


@dataclass
class Case:
    """Shapes, the options passed on, and builders of the tensors among the options, called with the case itself."""

    batch: int = 2
    heads: int = 4
    heads_kv: int | None = None
    seqlen_q: int = 65
    seqlen_k: int = 97
    head_dim: int = 40
    head_dim_v: int | None = None
    options: dict = field(default_factory=dict)
    tensors: dict[str, Callable[[Case], Tensor]] = field(default_factory=dict)

    def inputs(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Leaf tensors, random but the same for every call; floating options keep the dtype their builder gave them."""
        torch.manual_seed(1)
        heads_kv = self.heads_kv or self.heads
        shapes = {
            "query": (self.batch, self.heads, self.seqlen_q, self.head_dim),
            "key": (self.batch, heads_kv, self.seqlen_k, self.head_dim),
            "value": (self.batch, heads_kv, self.seqlen_k, self.head_dim_v or self.head_dim),
        }
        tensors = {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}
        return tensors | {name: build(self) for name, build in self.tensors.items()}


def run(
    case: Case,
    inputs: dict[str, Tensor],
    backend: str,
    wide: bool = False,
    device: str | None = None,
) -> dict[str, Tensor]:
    """out, lse and the gradient of every floating input but the slopes, for random gradients of out and lse.

    ``wide`` runs in float64 on the same values. ``device`` is where it runs, by default where the backend does: dropout
    is drawn by device, so what is compared runs on the same one. Results are on the CPU.
    """
    device = device or device_for(backend)

    def to(tensor: Tensor) -> Tensor:
        return tensor.to(device, torch.float64 if wide and tensor.is_floating_point() else tensor.dtype)

    leaves = {name: to(tensor).detach() for name, tensor in inputs.items()}
    learned = [name for name, t in leaves.items() if t.is_floating_point() and name != "alibi_slopes"]
    for name in learned:
        leaves[name].requires_grad_()
    torch.manual_seed(2)
    out, lse = fastattn.attention(
        **leaves, enable_gqa=case.heads_kv is not None, return_lse=True, backend=backend, **case.options
    )
    results = {"out": out.detach().cpu(), "lse": lse.detach().cpu()}
    cotangents = [t.to(device) for t in _cotangents(out, lse, inputs["query"].dtype)]
    gradients = torch.autograd.grad((out, lse), [leaves[name] for name in learned], cotangents)
    return results | {f"d{name}": grad.cpu() for name, grad in zip(learned, gradients, strict=True)}


def _cotangents(out: Tensor, lse: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    torch.manual_seed(3)
    return torch.randn(out.shape).to(dtype).to(out.dtype), torch.randn(lse.shape).to(lse.dtype)


def _roundings(case: Case, inputs: dict[str, Tensor], reference: dict[str, Tensor]) -> dict[str, float]:
    """What a kernel that recomputes probabilities rounds in float32 and eager does not, for each result.

    Its dS = P * (dP - D) is a difference of two dot products over head_dim_v, dP = dout.v and D = dout.out, and cancels
    exactly for a row with one key; eager subtracts a sum of the same dP. Second, the sum over rows, tiles or heads, in
    the kernel's own order: a random walk of half an ulp a step. Third, P = exp2(s * log2e - lse * log2e) is as exact
    as its exponents, of the size of the lse, and the lse changes its base once.
    """
    dtype = torch.float64 if inputs["query"].dtype == torch.float64 else torch.float32
    dout, _ = _cotangents(reference["out"], reference["lse"], inputs["query"].dtype)
    key, value = inputs["key"], inputs["value"].double()
    value = value.repeat_interleave(case.heads // max(value.shape[1], 1), dim=1)
    dropout_p = case.options.get("dropout_p", 0.0)
    dp = (dout.double() @ value.mT) * (1 / (1 - dropout_p) if dropout_p < 1 else 0)
    dp, typical_dp = _largest(dp), dp.square().mean().nan_to_num().sqrt().item()
    ds = value.shape[-1] ** 0.5 * ulp(dp, dtype)
    # Kernels for 16-bit inputs round P for its product with v: out, and with it D, is off by as much again as by its
    # own rounding.
    if inputs["query"].element_size() == 2:
        ds += 0.5 * ulp(1.0, inputs["query"].dtype) * typical_dp
    scale = case.options.get("scale", case.head_dim**-0.5)
    factors = {"dquery": abs(scale) * _largest(key), "dkey": abs(scale) * _largest(inputs["query"]), "dvalue": 0.0}

    def summed(gradient: Tensor) -> float:
        """How many scores or probabilities one element of a gradient sums."""
        elements = gradient.numel() / (gradient.shape[-1] if gradient.dim() == 4 else 1)
        return case.batch * case.heads * case.seqlen_q * case.seqlen_k / max(elements, 1)

    probability = rounding_of_probabilities(reference["lse"], dtype)
    return {"lse": probability, "out": ulp(_largest(value), dtype)} | {
        name: factors.get(name, 1.0) * (ds + probability * dp)
        + probability * _largest(dout)
        + 0.5 * summed(gradient) ** 0.5 * ulp(_largest(gradient), dtype)
        for name, gradient in reference.items()
        if name.startswith("d")
    }


def rounding_of_probabilities(lse: Tensor, dtype: torch.dtype) -> float:
    """Of the lse, too, by kernels that compute both in base 2, in ``dtype``: the third of ``_roundings``."""
    return 4 * ulp(1.5 * _largest(lse[lse.isfinite()]), dtype)


def _largest(tensor: Tensor) -> float:
    return tensor.abs().max().item() if tensor.numel() else 0.0


def check(case: Case, dtype: torch.dtype, backend: str, inputs: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Asserts that ``backend`` is as accurate as eager on ``case``, forward and backward; skips what it refuses."""
    inputs = case.inputs(dtype) if inputs is None else inputs
    try:
        actual = run(case, inputs, backend)
    except NotImplementedError as refusal:
        pytest.skip(str(refusal))
    eager = run(case, inputs, "eager", device=device_for(backend))
    reference = run(case, inputs, "eager", wide=True, device=device_for(backend))
    roundings = _roundings(case, inputs, reference)
    for name, result in actual.items():
        if name.startswith("d"):
            # Gradients sum terms of size |dout| ~ 1 that may cancel, and depend on out, which was rounded to `dtype`.
            assert_as_accurate_as_eager(
                result, eager[name], reference[name], name, terms=1.0, dtype=dtype, rounding=roundings[name]
            )
        else:
            assert_as_accurate_as_eager(result, eager[name], reference[name], name, rounding=roundings[name])
    return actual


# --- The features: one row each --------------------------------------------------------------------------------------


def _bool_mask(*shape: str) -> Callable[[Case], Tensor]:
    """A random mask whose dims are the case's attributes, or 1; some rows see nothing."""

    def build(case: Case) -> Tensor:
        return torch.rand([getattr(case, name) if name != "1" else 1 for name in shape]) < 0.6

    return build


def _float_mask(*shape: str, dtype: torch.dtype = torch.float32) -> Callable[[Case], Tensor]:
    def build(case: Case) -> Tensor:
        mask = torch.randn([getattr(case, name) if name != "1" else 1 for name in shape])
        return mask.masked_fill(torch.rand(mask.shape) < 0.1, -INF).to(dtype)

    return build


def _key_padding(case: Case) -> Tensor:
    lengths = torch.linspace(case.seqlen_k // 3, case.seqlen_k, case.batch).long()
    return (torch.arange(case.seqlen_k) < lengths[:, None])[:, None, None, :]


def _empty_rows(case: Case) -> Tensor:
    """Every third query may attend to nothing."""
    return (torch.arange(case.seqlen_q) % 3 != 0)[:, None].expand(case.seqlen_q, case.seqlen_k)


def _mixed_features() -> Case:
    return Case(
        heads_kv=2,
        head_dim_v=24,
        options={"window": (40, 9), "alignment": "bottom_right", "softcap": 5.0, "dropout_p": 0.2, "scale": 0.3},
        tensors={
            "attn_mask": _float_mask("batch", "1", "seqlen_q", "seqlen_k"),
            "alibi_slopes": lambda case: torch.rand(case.heads) * 0.1,
            "sinks": lambda case: torch.randn(case.heads),
        },
    )


_ALL = ("batch", "heads", "seqlen_q", "seqlen_k")
FEATURES: dict[str, Case] = {
    "plain": Case(),
    "scale": Case(options={"scale": 0.5}),
    "negative_scale": Case(options={"scale": -0.2}),
    "scale_zero": Case(options={"scale": 0.0}),
    "causal": Case(options={"is_causal": True}),
    "causal_more_queries": Case(seqlen_q=97, seqlen_k=65, options={"is_causal": True}),
    "causal_bottom_right": Case(options={"is_causal": True, "alignment": "bottom_right"}),
    # The first 32 queries see nothing.
    "causal_bottom_right_empty_rows": Case(
        seqlen_q=97, seqlen_k=65, options={"is_causal": True, "alignment": "bottom_right"}
    ),
    "window": Case(options={"window": (17, 5)}),
    "window_left": Case(options={"window": (20, -1), "alignment": "bottom_right"}),
    "window_right": Case(options={"window": (-1, 3)}),
    "window_one_key": Case(options={"window": (0, 0)}),
    # The last queries lie further right than any key.
    "window_empty_rows": Case(seqlen_q=97, seqlen_k=40, options={"window": (8, 8)}),
    "causal_window": Case(options={"window": (16, 4), "is_causal": True}),
    "bool_mask": Case(tensors={"attn_mask": _bool_mask(*_ALL)}),
    "bool_mask_2d": Case(tensors={"attn_mask": _bool_mask("seqlen_q", "seqlen_k")}),
    "bool_mask_per_head": Case(tensors={"attn_mask": _bool_mask("heads", "1", "seqlen_k")}),
    "bool_mask_per_query": Case(tensors={"attn_mask": _bool_mask("batch", "1", "seqlen_q", "1")}),
    "key_padding": Case(tensors={"attn_mask": _key_padding}),
    "causal_key_padding": Case(options={"is_causal": True}, tensors={"attn_mask": _key_padding}),
    "empty_rows": Case(tensors={"attn_mask": _empty_rows}),
    "float_mask": Case(tensors={"attn_mask": _float_mask(*_ALL)}),
    "float_mask_2d": Case(tensors={"attn_mask": _float_mask("seqlen_q", "seqlen_k")}),
    "float_mask_per_batch": Case(tensors={"attn_mask": _float_mask("batch", "1", "seqlen_q", "seqlen_k")}),
    "float_mask_per_head": Case(tensors={"attn_mask": _float_mask("1", "heads", "seqlen_q", "seqlen_k")}),
    "float_mask_per_key": Case(tensors={"attn_mask": _float_mask("batch", "1", "1", "seqlen_k")}),
    "float_mask_per_query": Case(tensors={"attn_mask": _float_mask("heads", "seqlen_q", "1")}),
    "float_mask_scalar": Case(tensors={"attn_mask": lambda case: torch.tensor(0.5)}),
    "float_mask_bfloat16": Case(tensors={"attn_mask": _float_mask("seqlen_q", "seqlen_k", dtype=torch.bfloat16)}),
    "float_mask_float16": Case(tensors={"attn_mask": _float_mask("seqlen_q", "seqlen_k", dtype=torch.float16)}),
    "float_mask_float64": Case(tensors={"attn_mask": _float_mask("seqlen_q", "seqlen_k", dtype=torch.float64)}),
    "causal_float_mask": Case(
        options={"is_causal": True}, tensors={"attn_mask": _float_mask("heads", "seqlen_q", "seqlen_k")}
    ),
    "softcap": Case(options={"softcap": 2.0}),
    "softcap_causal": Case(options={"softcap": 1.0, "scale": 1.0, "is_causal": True}),
    "alibi": Case(tensors={"alibi_slopes": lambda case: torch.rand(case.heads)}),
    "alibi_per_batch": Case(
        options={"alignment": "bottom_right"}, tensors={"alibi_slopes": lambda case: torch.rand(case.batch, case.heads)}
    ),
    "sinks": Case(tensors={"sinks": lambda case: torch.randn(case.heads)}),
    "sinks_empty_rows": Case(tensors={"sinks": lambda case: torch.randn(case.heads), "attn_mask": _empty_rows}),
    "sinks_causal_window": Case(
        options={"is_causal": True, "window": (12, 0)}, tensors={"sinks": lambda case: torch.randn(case.heads) * 3}
    ),
    "dropout": Case(options={"dropout_p": 0.3}),
    "dropout_causal": Case(options={"dropout_p": 0.5, "is_causal": True}),
    "dropout_everything": Case(options={"dropout_p": 1.0}),
    "gqa": Case(heads_kv=2),
    "mqa": Case(heads_kv=1, options={"is_causal": True}),
    "gqa_dropout_mask": Case(
        heads=6, heads_kv=2, options={"dropout_p": 0.1}, tensors={"attn_mask": _float_mask(*_ALL)}
    ),
    "narrow_values": Case(head_dim_v=8),
    "wide_values": Case(head_dim=16, head_dim_v=96, options={"is_causal": True}),
    "everything": _mixed_features(),
}  # fmt: skip


def assert_views_match_contiguous(views, dout):
    """Gradients on `emulated` of strided operands are those of contiguous copies, in the layout of the operand."""

    def gradients(tensors):
        leaves = [t.detach().requires_grad_() for t in tensors]
        return torch.autograd.grad(fastattn.attention(*leaves, backend="emulated"), leaves, dout)

    results = gradients(views)
    assert results[0].transpose(1, 2).is_contiguous(), "a gradient takes the layout of its operand"
    for strided, contiguous in zip(results, gradients([t.contiguous() for t in views]), strict=True):
        assert torch.equal(strided, contiguous)


def small_case(feature: str, **changes) -> Case:
    """One batch (unless the feature is about batches), as few heads as possible, three of the interpreter's tiles."""
    case = FEATURES[feature]
    batches = "batch" in feature or "padding" in feature or feature == "gqa_dropout_mask"
    small = {"batch": 2 if batches else 1, "heads": 4 if case.heads_kv == 2 else 2, "head_dim": 16}
    small["seqlen_q"], small["seqlen_k"] = (70, 40) if case.seqlen_q > case.seqlen_k else (37, 70)
    if case.heads_kv is not None:
        small["heads_kv"] = min(case.heads_kv, 2)
    return replace(case, **small | changes)
