"""accelerate and restore: swap a model's modules for fastattn's, in place, and back.

A module is swapped by changing its class, not by putting another object in its place. So its parameters stay the very
objects an optimizer holds, weights tied to other modules stay tied, a module used twice stays one module, and hooks,
training flag, dtype, device and every reference to it stay, the root's too. (``fully_shard`` works this way as well.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from fastattn.modules import Int8Linear, LayerNorm, RMSNorm
from fastattn.multi_head_attention import MultiHeadAttention

_OURS = (MultiHeadAttention, LayerNorm, RMSNorm, Int8Linear)


def accelerate(
    model: nn.Module,
    *,
    attention: bool = True,
    layer_norm: bool = True,
    int8: bool = False,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
) -> nn.Module:
    """Swaps ``torch.nn`` modules in ``model`` for fastattn's, in place; ``print(model)`` shows which.

    Left alone are subclasses, whose ``forward`` may differ, and modules whose ``forward`` was replaced. A second call
    swaps what is new. ``nn.TransformerEncoderLayer`` calls the swapped modules in inference too, where it
    would compute itself whole in one op of torch's; packing of padded batches (``enable_nested_tensor``) stays on.

    Args:
        model: any module; it is swapped itself if it fits. Swap before wrapping it for distributed training.
        attention: ``nn.MultiheadAttention`` -> ``MultiHeadAttention``.
        layer_norm: ``nn.LayerNorm``, ``nn.RMSNorm`` -> ``LayerNorm``, ``RMSNorm``.
        int8: ``nn.Linear`` -> ``Int8Linear`` and, with ``attention``, the projections of attention likewise. For
            inference: the weights take no gradient, ``state_dict`` holds INT8. ``restore`` has the float weights.
        filter_fn: ``filter_fn(module, name)`` is asked about each module that fits; True = swap.
    Returns: ``model``.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"accelerate: model must be a torch.nn.Module, got {type(model).__name__}.")
    for name, module in list(model.named_modules()):
        swap = _fitting_swap(module, attention, layer_norm, int8)
        if swap is not None and (filter_fn is None or filter_fn(module, name)):
            _become(module, *swap(module))
    for module in model.modules():
        _avoid_fast_path(module)
    return model


def restore(model: nn.Module) -> nn.Module:
    """Undoes ``accelerate`` in ``model``: the same modules as what they were, with their parameters as they are now.

    Modules that became INT8 get their float weights back. Returns ``model``.
    """
    for module in list(model.modules()):
        for before in reversed(module.__dict__.pop(_UNDO, [])):
            placement = _placement(module)
            for name in before.added:
                del module.__dict__[name]
            module.__dict__.update(before.replaced)
            module.__class__ = before.cls
            if "_parameters" in before.replaced:
                # The model may have been moved or converted while it did not have these.
                module.to(**placement)
    return model


class Int8MultiHeadAttention(MultiHeadAttention):
    """What ``accelerate(model, int8=True)`` makes of attention: its four projections are ``Int8Linear``."""

    q_proj: Int8Linear
    k_proj: Int8Linear
    v_proj: Int8Linear

    def _in_projection(self, query: Tensor, key: Tensor, value: Tensor) -> Sequence[Tensor]:
        return self.q_proj(query), self.k_proj(key), self.v_proj(value)

    # nn.TransformerEncoder asks these two whether they require grad.
    @property
    def in_proj_weight(self) -> Tensor:  # type: ignore[override]
        return self.q_proj.weight

    @property
    def in_proj_bias(self) -> Tensor | None:  # type: ignore[override]
        return self.q_proj.bias


# --- Changing a module into another, and what it was before -----------------------------------------------------------

# The attribute that holds what a module was before its swaps, the latest last.
_UNDO = "_fastattn_undo"


class _Before(NamedTuple):
    cls: type[nn.Module]
    replaced: dict[str, Any]
    added: tuple[str, ...]


def _become(module: nn.Module, cls: type[nn.Module], attributes: dict[str, Any]) -> None:
    state = module.__dict__
    replaced = {name: state[name] for name in attributes if name in state}
    added = tuple(name for name in attributes if name not in state)
    state.setdefault(_UNDO, []).append(_Before(type(module), replaced, added))
    state.update(attributes)
    module.__class__ = cls


def _placement(module: nn.Module) -> dict[str, Any]:
    """Where a module is, and the dtype of its floating parameters, as far as it has any."""
    devices = [tensor.device for tensor in module.buffers()]
    dtypes = [tensor.dtype for tensor in module.parameters() if tensor.is_floating_point()]
    return {"device": devices[0] if devices else None, "dtype": dtypes[0] if dtypes else None}


# --- What becomes what ------------------------------------------------------------------------------------------------

_Swap = Callable[[Any], tuple[type[nn.Module], dict[str, Any]]]


def _fitting_swap(module: nn.Module, attention: bool, layer_norm: bool, int8: bool) -> _Swap | None:
    kind = type(module)
    if "forward" in module.__dict__:
        return None
    if attention and int8 and kind in (nn.MultiheadAttention, MultiHeadAttention):
        return _int8_attention
    if attention and kind is nn.MultiheadAttention:
        return _attention
    if layer_norm and kind is nn.LayerNorm:
        return lambda module: (LayerNorm, {})
    if layer_norm and kind is nn.RMSNorm:
        return lambda module: (RMSNorm, {})
    # Pruning and the like make the weight anew before each forward: it is not a parameter then.
    if int8 and kind is nn.Linear and "weight" in module._parameters:
        return _int8_linear
    return None


def _attention(module: nn.MultiheadAttention) -> tuple[type[nn.Module], dict[str, Any]]:
    return MultiHeadAttention, {"num_kv_heads": module.num_heads, "window": None, "backend": "auto"}


def _int8_linear(module: nn.Linear) -> tuple[type[nn.Module], dict[str, Any]]:
    return Int8Linear, _own_attributes(Int8Linear.from_linear(module))


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
    return Int8MultiHeadAttention, attributes | {"_parameters": parameters, "_modules": projections}


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


# --- torch's own inference op, which computes a whole encoder layer without calling its modules -----------------------


def _avoid_fast_path(module: nn.Module) -> None:
    """Has an encoder layer that holds our modules call them: without this attribute it takes its ordinary path."""
    if not isinstance(module, nn.TransformerEncoderLayer) or not module.activation_relu_or_gelu:
        return
    if any(isinstance(child, _OURS) for child in module.modules()):
        _become(module, type(module), {"activation_relu_or_gelu": 0})
