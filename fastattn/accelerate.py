"""accelerate and restore: swap a model's modules for fastattn's, in place, and back.

A module is swapped by changing its class, not by putting another object in its place. So its parameters stay the very
objects an optimizer holds, weights tied to other modules stay tied, a module used twice stays one module, and hooks,
training flag, dtype, device and every reference to it stay, the root's too. (``fully_shard`` works this way as well.)
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from fastattn._joint_projection import JointProjection
from fastattn.int8_encoder import Int8EncoderLayer, Int8MultiHeadAttention, OneCall, applied_before
from fastattn.modules import Int8Linear, LayerNorm, Linear, RMSNorm
from fastattn.modules_foreign import ForeignNorm, conv1d_as_linear, is_conv1d, looks_like_norm, norm_swap
from fastattn.multi_head_attention import MultiHeadAttention
from fastattn.ops.linear import gather_weight

_OURS = (MultiHeadAttention, LayerNorm, RMSNorm, ForeignNorm, Linear, Int8Linear)

# Linear layers with fewer inputs or outputs are left in floats: routers, gates and classifiers, whose precision counts
# and which the INT8 kernels, with tiles of 16 outputs, would not make faster.
_SMALL_LINEAR = 16


def accelerate(
    model: nn.Module,
    *,
    attention: bool = True,
    layer_norm: bool = True,
    int8: bool = False,
    linear: bool = False,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    verbose: bool | None = None,
) -> nn.Module:
    """Swaps modules of ``torch.nn`` and norms of other libraries for fastattn's, in place, and prints what it swapped.

    ``print(model)`` shows the swapped modules, ``accelerate_report(model)`` what was swapped and what was left and why.
    Left alone are subclasses of torch's modules, whose ``forward`` may differ, and modules whose ``forward`` was
    replaced. A second call swaps what is new. ``nn.TransformerEncoderLayer`` calls the swapped modules in inference
    too, where it would compute itself whole in one op of torch's; packing of padded batches (``enable_nested_tensor``)
    stays on. For attention in Hugging Face models see ``fastattn.integrations.transformers``.

    Args:
        model: any module; it is swapped itself if it fits. Swap before wrapping it for distributed training.
        attention: ``nn.MultiheadAttention`` -> ``MultiHeadAttention``.
        layer_norm: ``nn.LayerNorm``, ``nn.RMSNorm`` -> ``LayerNorm``, ``RMSNorm``; and norms of other libraries, such
            as LlamaRMSNorm, T5LayerNorm or Gemma2RMSNorm, if trying one out shows it to be a layer or an RMS norm.
        int8: ``nn.Linear`` and transformers' ``Conv1D`` -> ``Int8Linear`` and, with ``attention``, the projections of
            attention likewise. For inference: the weights take no gradient, ``state_dict`` holds INT8. ``restore`` has
            the float weights. Without ``filter_fn`` the output head (a layer called lm_head, returned by the model's
            ``get_output_embeddings`` or tied to an embedding) and layers with fewer than 16 inputs or outputs are left.
        linear: ``nn.Linear`` -> a subclass whose forward runs on the CPU's own kernel: in float32 for any number of
            rows where MKL has no AVX-512 kernels for the processor, else for the few of a decoder's step; where both
            are asked for, ``int8`` has it. Moves these weights onto 2 MiB pages where the system can, in half a second
            a GB: their addresses stay.
        filter_fn: ``filter_fn(module, name)`` is asked about each module that fits; True = swap.
        verbose: what is printed: a line that counts what is swapped and left; True = the whole report, False = nothing.
    Returns: ``model``.

    Raises: TypeError, before it changes anything, for an argument of another type.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"accelerate: model must be a torch.nn.Module, got {type(model).__name__}.")
    switches = {"attention": attention, "layer_norm": layer_norm, "int8": int8, "linear": linear}
    for switch, value in switches.items():
        if not isinstance(value, bool):
            raise TypeError(f"accelerate: {switch} must be True or False, got {value!r}.")
    if verbose is not None and not isinstance(verbose, bool):
        raise TypeError(f"accelerate: verbose must be True, False or None, got {verbose!r}.")
    if filter_fn is not None and not callable(filter_fn):
        raise TypeError(f"accelerate: filter_fn must be called as f(module, name), got {type(filter_fn).__name__}.")
    left: dict[str, str] = {}
    heads = _output_heads(model) if int8 and filter_fn is None else set()
    for name, module in list(model.named_modules()):
        swap = _fitting_swap(module, attention, layer_norm, int8, linear)
        if callable(swap) and filter_fn is None:
            swap = _reason_to_keep_floats(module, name, heads, swap) if swap in _INT8_LINEARS else swap
        elif callable(swap) and filter_fn is not None and not filter_fn(module, name):
            swap = "filter_fn said no"
        if callable(swap):
            _become(module, *swap(module))
        elif swap is not None:
            left[name] = swap
    for module in model.modules():
        _avoid_fast_path(module)
        if linear and type(module) is Linear:
            gather_weight(module.weight)
    _fuse_activations(model)
    _compute_in_one_call(model)
    model.__dict__[_LEFT] = left
    if verbose is not False:
        report = accelerate_report(model)
        print(f"fastattn.accelerate: {report if verbose else report.summary()}")
    return model


def restore(model: nn.Module) -> nn.Module:
    """Undoes ``accelerate`` in ``model``: the same modules as what they were, with their parameters as they are now.

    Modules that became INT8 get their float weights back. Returns ``model``.

    Raises: ValueError, before it changes anything, if a swapped module was given another class since, as
        parametrizations and ``fully_shard`` do.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"restore: model must be a torch.nn.Module, got {type(model).__name__}.")
    for name, module in model.named_modules():
        before = module.__dict__.get(_UNDO)
        if before and type(module) is not before[-1].became:
            raise ValueError(
                f"restore: {name or 'the model'} is a {type(module).__name__} and no longer the "
                f"{before[-1].became.__name__} that accelerate made; undo what changed its class first, such as "
                "parametrizations."
            )
    # Again, because a restored module may have swapped ones inside that the model did not show meanwhile.
    while swapped := [module for module in model.modules() if _UNDO in module.__dict__]:
        for module in swapped:
            for before in reversed(module.__dict__.pop(_UNDO)):
                _undo(module, before)
    model.__dict__.pop(_LEFT, None)
    return model


@dataclass(frozen=True)
class AccelerateReport:
    """What ``accelerate`` made of a model; ``str`` is a list of it, ``summary`` one line."""

    swapped: dict[str, tuple[str, str]]  # name of the module -> class before, class now
    left: dict[str, tuple[str, str]]  # name of the module -> class, reason

    def summary(self) -> str:
        """How many modules of each class were swapped, and how many were left."""
        kinds = Counter(now for _, now in self.swapped.values())
        swapped = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items())) or "nothing"
        left = f"; left {len(self.left)}, accelerate_report(model) says why" if self.left else ""
        return f"swapped {swapped}{left}"

    def __str__(self) -> str:
        modules = "module" if len(self.swapped) == 1 else "modules"
        lines = [f"swapped {len(self.swapped)} {modules}, left {len(self.left)}"]
        for name, (before, now) in self.swapped.items():
            # Several have the names of torch.nn's.
            lines.append(f"  {name or '(the model)'}: {before} -> fastattn's {now}")
        lines += [f"  {name or '(the model)'}: {kind} left: {reason}" for name, (kind, reason) in self.left.items()]
        return "\n".join(lines)


def accelerate_report(model: nn.Module) -> AccelerateReport:
    """What is swapped in ``model`` at present, and which modules the last ``accelerate(model)`` left, with its reasons.

    Listed as left are attention, norms and, with ``int8``, linear layers; not modules that no option asked for.

    Raises: TypeError if ``model`` is not a ``torch.nn.Module``.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"accelerate_report: model must be a torch.nn.Module, got {type(model).__name__}.")
    swapped = {}
    for name, module in model.named_modules():
        before = module.__dict__.get(_UNDO)
        if before and isinstance(module, _OURS):
            swapped[name] = (before[0].cls.__name__, type(module).__name__)
    reasons: dict[str, str] = model.__dict__.get(_LEFT, {})
    modules = dict(model.named_modules())
    left = {name: (type(modules[name]).__name__, reason) for name, reason in reasons.items() if name in modules}
    return AccelerateReport(swapped, left)


# --- Changing a module into another, and what it was before -----------------------------------------------------------

# The attribute that holds what a module was before its swaps, the latest last.
_UNDO = "_fastattn_undo"

# The attribute of the root that holds the names of the modules that were left and the reasons.
_LEFT = "_fastattn_left"


class _Before(NamedTuple):
    cls: type[nn.Module]
    became: type[nn.Module]
    replaced: dict[str, Any]
    added: tuple[str, ...]


def _become(module: nn.Module, cls: type[nn.Module], attributes: dict[str, Any]) -> None:
    state = module.__dict__
    replaced = {name: state[name] for name in attributes if name in state}
    added = tuple(name for name in attributes if name not in state)
    state.setdefault(_UNDO, []).append(_Before(type(module), cls, replaced, added))
    state.update(attributes)
    module.__class__ = cls


def _undo(module: nn.Module, before: _Before) -> None:
    placement = _placement(module)
    for name in before.added:
        del module.__dict__[name]
    module.__dict__.update(before.replaced)
    module.__class__ = before.cls
    if "_parameters" in before.replaced:
        # The model may have been moved or converted while it did not have these.
        module.to(**placement)


def _class_before(module: nn.Module) -> type[nn.Module]:
    """What a module was before its swaps, if it was swapped."""
    before = module.__dict__.get(_UNDO)
    return before[0].cls if before else type(module)


def _placement(module: nn.Module) -> dict[str, Any]:
    """Where a module is, and the dtype of its floating parameters, as far as it has any."""
    devices = [tensor.device for tensor in module.buffers()]
    dtypes = [tensor.dtype for tensor in module.parameters() if tensor.is_floating_point()]
    return {"device": devices[0] if devices else None, "dtype": dtypes[0] if dtypes else None}


# --- What becomes what ------------------------------------------------------------------------------------------------

_Swap = Callable[[Any], tuple[type[nn.Module], dict[str, Any]]]


def _fitting_swap(module: nn.Module, attention: bool, layer_norm: bool, int8: bool, linear: bool) -> _Swap | str | None:
    """How to swap ``module``, the reason to leave it, or None if nobody would expect it to be swapped."""
    kind = type(module)
    if attention and int8 and kind in (nn.MultiheadAttention, MultiHeadAttention):
        swap: _Swap | str | None = _int8_attention
    elif attention and kind is nn.MultiheadAttention:
        swap = _attention
    elif layer_norm and kind is nn.LayerNorm:
        swap = _layer_norm
    elif layer_norm and kind is nn.RMSNorm:
        swap = _rms_norm
    elif layer_norm and looks_like_norm(module):
        attributes = norm_swap(module)
        swap = attributes if isinstance(attributes, str) else _foreign_norm
    elif int8 and kind in (nn.Linear, Linear) and _class_before(module) is not NonDynamicallyQuantizableLinear:
        swap = _int8_linear
    elif int8 and is_conv1d(module):
        swap = _int8_conv1d
    elif linear and kind in (nn.Linear, NonDynamicallyQuantizableLinear):
        swap = _linear
    else:
        return _reason_for_another_class(module, attention, layer_norm, int8 or linear)
    if callable(swap) and "forward" in module.__dict__:
        return "its forward was replaced"
    if swap in _INT8_LINEARS and "weight" not in module._parameters:
        return "its weight is made anew before each forward, as pruning does"
    return swap


def _reason_for_another_class(module: nn.Module, attention: bool, layer_norm: bool, linear: bool) -> str | None:
    if isinstance(module, (*_OURS, NonDynamicallyQuantizableLinear)):
        return None
    for asked, base in (
        (attention, nn.MultiheadAttention),
        (layer_norm, nn.LayerNorm),
        (layer_norm, nn.RMSNorm),
        (linear, nn.Linear),
    ):
        if asked and isinstance(module, base):
            return f"a subclass of nn.{base.__name__}, whose forward may differ"
    config: Any = getattr(module, "config", None)
    implementation = getattr(config, "_attn_implementation", None)
    if attention and implementation not in (None, "fastattn") and type(module).__name__.endswith("Attention"):
        # A model that calls the attention of its configuration's choice finds it in this table of transformers.
        homes = (sys.modules.get(cls.__module__) for cls in type(module).__mro__)
        if not any(hasattr(home, "ALL_ATTENTION_FUNCTIONS") for home in homes):
            return "transformers does not let the attention of this model be exchanged"
        return "call fastattn.integrations.transformers.register() and model.set_attn_implementation('fastattn')"
    return None


def _output_heads(model: nn.Module) -> set[nn.Module]:
    """The layers that map states to the vocabulary: rounding them costs the most precision."""
    tied = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    heads = {module for module in model.modules() if id(module._parameters.get("weight")) in tied}
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if callable(get_head) else None
    return heads | {head} if isinstance(head, nn.Module) else heads


def _reason_to_keep_floats(module: nn.Module, name: str, heads: set[nn.Module], swap: _Swap) -> _Swap | str:
    if module in heads or name.rpartition(".")[2] == "lm_head":
        return "the output head keeps its precision; choose it with filter_fn"
    weight: Any = module.weight
    if min(weight.shape) < _SMALL_LINEAR:
        return f"small, {tuple(weight.shape)}; choose it with filter_fn"
    return swap


def _layer_norm(module: nn.LayerNorm) -> tuple[type[nn.Module], dict[str, Any]]:
    return LayerNorm, {}


def _rms_norm(module: nn.RMSNorm) -> tuple[type[nn.Module], dict[str, Any]]:
    return RMSNorm, {}


def _foreign_norm(module: nn.Module) -> tuple[type[nn.Module], dict[str, Any]]:
    attributes = norm_swap(module)
    assert isinstance(attributes, dict)
    return ForeignNorm, attributes


def _attention(module: nn.MultiheadAttention) -> tuple[type[nn.Module], dict[str, Any]]:
    return MultiHeadAttention, {"num_kv_heads": module.num_heads, "window": None, "backend": "auto"}


def _linear(module: nn.Linear) -> tuple[type[nn.Module], dict[str, Any]]:
    return Linear, {"backend": "auto"}


def _int8_linear(module: nn.Linear) -> tuple[type[nn.Module], dict[str, Any]]:
    return Int8Linear, _own_attributes(Int8Linear.from_linear(module))


def _int8_conv1d(module: nn.Module) -> tuple[type[nn.Module], dict[str, Any]]:
    return Int8Linear, _own_attributes(Int8Linear.from_linear(conv1d_as_linear(module)))


_INT8_LINEARS = (_int8_linear, _int8_conv1d)


def _int8_attention(module: nn.MultiheadAttention) -> tuple[type[nn.Module], dict[str, Any]]:
    attributes = {} if isinstance(module, MultiHeadAttention) else _attention(module)[1]
    if module.in_proj_weight is None:
        weights: Any = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
    else:
        weights = module.in_proj_weight.chunk(3)
    rows = [len(weight) for weight in weights]
    biases = (None, None, None) if module.in_proj_bias is None else module.in_proj_bias.split(rows)
    projections = {
        f"{name}_proj": _int8_projection(weight, bias)
        for name, weight, bias in zip("qkv", weights, biases, strict=True)
    }
    projections["out_proj"] = Int8Linear.from_linear(module.out_proj)
    parameters: dict[str, Tensor | None] = dict.fromkeys(module._parameters)
    parameters |= {"bias_k": module.bias_k, "bias_v": module.bias_v}
    attributes |= {"_parameters": parameters, "_modules": projections, "_joint_projection": JointProjection()}
    return Int8MultiHeadAttention, attributes


def _int8_projection(weight: Tensor, bias: Tensor | None) -> Int8Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
    if bias is not None:
        # A copy: the parts of in_proj_bias must not share its storage.
        linear.bias = nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
    return Int8Linear.from_linear(linear)


def _own_attributes(module: nn.Module) -> dict[str, Any]:
    """What the class of ``module`` put into it: not its mode and hooks, which the module that becomes it keeps."""
    kept = nn.Module().__dict__.keys() - {"_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"}
    return {name: value for name, value in module.__dict__.items() if name not in kept}


# --- Activations of torch's encoder and decoder layers ----------------------------------------------------------------

_FUSED_ACTIVATIONS = (F.relu, "relu"), (F.gelu, "gelu"), (F.silu, "silu")


def _fuse_activations(model: nn.Module) -> None:
    """Has the INT8 layer in front of a layer's activation apply it, in the pass that writes its result."""
    names = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    for module in model.modules():
        if not isinstance(module, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)):
            continue
        linear, activation = module.linear1, module.__dict__.get("activation")
        name = next((name for function, name in _FUSED_ACTIVATIONS if activation is function), None)
        # One that stands elsewhere too may be wanted without.
        if name and type(linear) is Int8Linear and linear.activation is None and names[id(linear)] == 1:
            _become(module, type(module), {"activation": applied_before})
            _become(linear, Int8Linear, {"activation": name})


def _compute_in_one_call(model: nn.Module) -> None:
    """Has INT8 encoder layers compute themselves in one call where they may, which they find out again at each."""
    for module in model.modules():
        if type(module) is not nn.TransformerEncoderLayer or type(module.self_attn) is not Int8MultiHeadAttention:
            continue
        if module.activation is applied_before and "forward" not in module.__dict__:
            _become(module, Int8EncoderLayer, {"_one_call": OneCall()})


# --- torch's own inference op, which computes a whole encoder layer without calling its modules -----------------------


def _avoid_fast_path(module: nn.Module) -> None:
    """Has an encoder layer that holds our modules call them: without this attribute it takes its ordinary path."""
    if not isinstance(module, nn.TransformerEncoderLayer) or not module.activation_relu_or_gelu:
        return
    if any(isinstance(child, _OURS) for child in module.modules()):
        _become(module, type(module), {"activation_relu_or_gelu": 0})
