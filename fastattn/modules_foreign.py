"""Modules of other libraries that ``accelerate`` can swap: norms, known by what they compute, and GPT-2's Conv1D.

There are dozens of classes such as LlamaRMSNorm, T5LayerNorm or Gemma2RMSNorm, and they differ: in the weight (some
add 1), in eps, in the dtype of the result. So a norm is not known by its name: each class is tried out once on a few
numbers, and swapped if the result is that of a formula that our kernels compute.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from fastattn._tracing import as_fx_node, refuse_scripting
from fastattn.ops.layer_norm import layer_norm, rms_norm


class Formula(NamedTuple):
    """What a norm computes, and the dtype of its result."""

    centred: bool  # layer norm, else RMS norm
    offset: float  # added to the weight
    result: str  # "input", "weight" or "promoted": whose dtype the result has


class ForeignNorm(nn.Module):
    """What ``accelerate`` makes of another library's norm: the same parameters and formula on fastattn's kernels.

    Statistics and the products with the weight are float32, rounded once at the end, where the original may round
    16-bit results before it multiplies by the weight.
    """

    weight: nn.Parameter
    formula: Formula
    norm_eps: float
    __prepare_scriptable__ = refuse_scripting

    def forward(self, hidden_states: Tensor) -> Tensor:
        if isinstance(hidden_states, Proxy):
            return as_fx_node(self, hidden_states)
        weight: Tensor = self.weight
        # Not from _parameters: a parametrization, FSDP or a replica of DataParallel makes it an attribute.
        bias, formula = getattr(self, "bias", None), self.formula
        x = hidden_states
        if x.dtype != weight.dtype and formula.result != "input":
            x = x.to(weight.dtype if formula.result == "weight" else torch.promote_types(x.dtype, weight.dtype))
        if formula.offset:
            weight = formula.offset + weight.to(torch.promote_types(weight.dtype, torch.float32))
        if formula.centred:
            return layer_norm(x, weight.shape, weight, bias if isinstance(bias, Tensor) else None, self.norm_eps)
        return rms_norm(x, weight.shape, weight, self.norm_eps)

    def extra_repr(self) -> str:
        kind = "layer norm" if self.formula.centred else "RMS norm"
        offset = f", weight + {self.formula.offset:g}" if self.formula.offset else ""
        return f"{kind} of {self.weight.shape[0]}, eps={self.norm_eps:g}{offset}"


def looks_like_norm(module: nn.Module) -> bool:
    """A class of another library that is called a norm and holds a weight, perhaps a bias, and nothing else."""
    if "Norm" not in type(module).__name__ or type(module).__module__.startswith(("torch.", "fastattn.")):
        return False
    parameters = {name for name, parameter in module._parameters.items() if parameter is not None}
    weight = module._parameters.get("weight")
    only = parameters in ({"weight"}, {"weight", "bias"}) and not module._buffers and not module._modules
    return only and weight is not None and weight.dim() == 1


def norm_swap(module: nn.Module) -> dict[str, Any] | str:
    """The attributes with which ``module`` becomes a `ForeignNorm`, or the reason to leave it."""
    if len(inspect.signature(type(module).forward).parameters) != 2:
        return "its forward takes more than the input"
    methods = _public_methods(type(module)) - {"forward", "extra_repr", "reset_parameters"}
    if methods:
        return f"it is more than its forward: it has {', '.join(sorted(methods))}"
    eps = next((module.__dict__[n] for n in ("variance_epsilon", "eps", "epsilon") if n in module.__dict__), None)
    if not isinstance(eps, float):
        return "it has no eps that is known"
    # Options of a class may change its formula, so that each combination is tried.
    public = {name: v for name, v in module.__dict__.items() if not name.startswith("_") and name != "training"}
    key = (type(module), repr(sorted(public.items(), key=str)), "bias" in module._parameters)
    if key not in _known:
        _known[key] = _try_out(module, eps)
    formula = _known[key]
    return formula if isinstance(formula, str) else {"formula": formula, "norm_eps": eps}


def _public_methods(kind: type) -> set[str]:
    own = kind.__mro__[: kind.__mro__.index(nn.Module)]
    return {n for each in own for n, member in vars(each).items() if inspect.isfunction(member) and n[0] != "_"}


_known: dict[Any, Formula | str] = {}


@torch.no_grad()
def _try_out(module: nn.Module, eps: float) -> Formula | str:
    """Which formula the class of ``module`` computes, found on a copy with random weights, on the CPU."""
    # Not on the default device or in the default dtype, which the user may have set.
    numbers: Any = {"device": "cpu", "dtype": torch.float32}
    generator = torch.Generator("cpu").manual_seed(0)
    width = module._parameters["weight"].shape[0]  # type: ignore[union-attr]
    twin = copy.copy(module)
    forward = type(module).forward  # without hooks

    def run(x: Tensor, dtype: torch.dtype) -> Tensor:
        twin._parameters = {n: None if p is None else nn.Parameter(p.to(dtype)) for n, p in parameters.items()}
        return forward(twin, x)

    def dtype_of_result(x: Tensor, dtype: torch.dtype) -> torch.dtype | None:
        try:
            return run(x, dtype).dtype
        except RuntimeError:  # as F.layer_norm raises for mixed dtypes, of which nothing is to be preserved then
            return None

    parameters = {
        name: None if parameter is None else torch.rand(width, generator=generator, **numbers)
        for name, parameter in module._parameters.items()
    }
    # Small numbers, of which eps is a part that shows.
    x = (eps**0.5 or 1.0) * torch.randn(3, width, generator=generator, **numbers)
    try:
        with torch.device("cpu"):
            result = run(x, torch.float32)
            wide, narrow = dtype_of_result(x, torch.bfloat16), dtype_of_result(x.bfloat16(), torch.float32)
    except Exception as error:
        return f"trying it out raised {type(error).__name__}: {error}"
    if not (isinstance(result, Tensor) and result.shape == x.shape):
        return "it returns something else than a tensor like its input"
    results = {
        "input": (torch.float32, torch.bfloat16),
        "weight": (torch.bfloat16, torch.float32),
        "promoted": (torch.float32, torch.float32),
    }
    whose = next((name for name, (a, b) in results.items() if wide in (None, a) and narrow in (None, b)), None)
    if whose is None:
        return "the dtype of its result is that of neither its input nor its weight"
    weight, bias = parameters["weight"], parameters.get("bias")
    assert weight is not None
    for centred in (False, True):
        for offset in (0.0, 1.0):
            if centred:
                expected = layer_norm(x, (width,), offset + weight, bias, eps, backend="eager")
            else:
                expected = rms_norm(x, (width,), offset + weight, eps, backend="eager")
            if (centred or bias is None) and torch.allclose(result, expected, rtol=1e-4, atol=1e-5):
                return Formula(centred, offset, whose)
    return "its result is neither that of a layer norm nor of an RMS norm, with its weight or with 1 + weight"


def is_conv1d(module: nn.Module) -> bool:
    """Whether ``module`` is transformers' Conv1D: a linear layer whose weight is (in_features, out_features)."""
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


def conv1d_as_linear(module: Any) -> nn.Linear:
    linear = nn.Linear(module.nx, module.nf, device="meta")
    linear.weight = nn.Parameter(module.weight.detach().T.contiguous(), requires_grad=False)
    linear.bias = module.bias
    return linear.train(module.training)
