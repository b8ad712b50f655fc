"""What ``accelerate(model, int8=True)`` makes of attention and of encoder layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from fastattn import dispatch
from fastattn._extension import extension
from fastattn._joint_projection import MAX_JOINT_BYTES, JointProjection
from fastattn.modules import Int8Linear, LayerNorm
from fastattn.multi_head_attention import MultiHeadAttention
from fastattn.ops.int8_matmul import ACTIVATIONS


class Int8MultiHeadAttention(MultiHeadAttention):
    """Attention whose four projections are ``Int8Linear``."""

    q_proj: Int8Linear
    k_proj: Int8Linear
    v_proj: Int8Linear
    _joint_projection: JointProjection

    def _in_projection(self, query: Tensor, key: Tensor, value: Tensor) -> Sequence[Tensor]:
        if query is key and key is value:
            return self._joint_projection((self.q_proj, self.k_proj, self.v_proj), query)
        return self.q_proj(query), self.k_proj(key), self.v_proj(value)

    # nn.TransformerEncoder asks these two whether they require grad.
    @property
    def in_proj_weight(self) -> Tensor:  # type: ignore[override]
        return self.q_proj.weight

    @property
    def in_proj_bias(self) -> Tensor | None:  # type: ignore[override]
        return self.q_proj.bias


class Int8EncoderLayer(nn.TransformerEncoderLayer):
    """``nn.TransformerEncoderLayer`` that, in inference without masks on the CPU, computes itself in one call."""

    _one_call: OneCall

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        if src_mask is None and src_key_padding_mask is None and not is_causal:
            out = self.in_one_call(src)
            if out is not None:
                return out
        return super().forward(src, src_mask, src_key_padding_mask, is_causal)

    def in_one_call(self, src: Tensor) -> Tensor | None:
        """What the layer makes of (batch, seqlen, d_model) or (seqlen, d_model), every token attending to every token;
        None where that is for its modules to compute: gradients or dropout are wanted, hooks want to see them, one has
        been replaced by something else, or another backend than the CPU's is preferred."""
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or not dispatch.takes_cpu("auto"):
            return None
        return self._one_call(self, src)


class OneCall:
    """A layer's modules as one object of the extension: a cache, made again when they change, without copies or
    pickles."""

    def __init__(self) -> None:
        self._compiled: Any = None

    def __reduce__(self) -> tuple[type[OneCall], tuple[()]]:
        return OneCall, ()

    def __call__(self, layer: nn.TransformerEncoderLayer, src: Tensor) -> Tensor | None:
        out = None if self._compiled is None else self._compiled(src)
        if out is None and (self._compiled is None or not self._compiled.is_current()):
            self._compiled = _compile(layer)
            out = None if self._compiled is None else self._compiled(src)
        return out


# --- Making it --------------------------------------------------------------------------------------------------------

_HOOKS = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"
_GLOBAL_HOOKS = tuple(getattr(torch_module, f"_global{name}", {}) for name in _HOOKS)


def _compile(layer: nn.TransformerEncoderLayer) -> Any:
    """The extension's object for ``layer`` as it is, or None if it is not what that computes."""
    modules: dict[str, Any] = layer._modules
    attention, norms = modules["self_attn"], [modules["norm1"], modules["norm2"]]
    dropouts = [modules["dropout"], modules["dropout1"], modules["dropout2"]]
    if extension is None or not _is_plain(layer, attention, norms, dropouts):
        return None
    linears = [attention._modules[name] for name in ("q_proj", "k_proj", "v_proj", "out_proj")]
    linears += [modules["linear1"], modules["linear2"]]
    if not all(_is_packed_linear(linear) for linear in linears):
        return None
    joint = attention._joint_projection.joint(linears[:3])
    if joint is None or any(linear.activation is not None for linear in (*linears[:4], linears[5])):
        return None
    everything = [layer, attention, *norms, *dropouts, *linears]
    hooks = [module.__dict__[name] for module in everything for name in _HOOKS]
    if any(hooks) or any(_GLOBAL_HOOKS) or any("forward" in module.__dict__ for module in everything):
        return None
    return extension.Int8EncoderLayer(
        watched=_watched(layer, attention, norms, dropouts, linears),
        hooks=[*hooks, *_GLOBAL_HOOKS],
        projections=[_projection(linear) for linear in (*linears[:3], joint, *linears[3:])],
        norms=[(norm.weight, norm.bias, norm.eps) for norm in norms],
        head_dim=attention.head_dim,
        norm_first=layer.norm_first,
        joint_bytes=MAX_JOINT_BYTES,
    )


def _is_plain(layer: Any, attention: Any, norms: list[Any], dropouts: list[Any]) -> bool:
    return (
        type(attention) is Int8MultiHeadAttention
        and all(type(norm) is LayerNorm for norm in norms)
        and all(type(dropout) is nn.Dropout for dropout in dropouts)
        and not any(module.training for module in (layer, attention, *norms, *dropouts))
        and layer.activation is applied_before
        and attention.batch_first
        and attention.window is None
        and attention.bias_k is None
        and not attention.add_zero_attn
        and attention.backend == "auto"
        and all(len(norm.normalized_shape) == 1 for norm in norms)
        and all(type(x) in (nn.Parameter, type(None)) for norm in norms for x in (norm.weight, norm.bias))
    )


def _is_packed_linear(linear: Any) -> bool:
    if type(linear) is not Int8Linear or linear.backend != "auto" or "bias" not in linear._parameters:
        return False
    tensors = [linear._buffers["weight"], linear._buffers["weight_scale"], linear._parameters["bias"]]
    if any(x is not None and (type(x) not in (Tensor, nn.Parameter) or x.is_inference()) for x in tensors):
        return False
    return linear.packed_weight() is not None


def _projection(linear: Int8Linear) -> tuple[Any, ...]:
    return linear.packed_weight(), linear.weight, linear.weight_scale, linear.bias, ACTIVATIONS[linear.activation]


def _watched(
    layer: Any, attention: Any, norms: list[Any], dropouts: list[Any], linears: list[Any]
) -> list[tuple[nn.Module, str, list[str]]]:
    """What the extension's object relies on: (module, one of its dicts or "" for its attributes, names)."""
    common = ["training", "forward", *_HOOKS]
    own = ["window", "batch_first", "add_zero_attn", "backend", "head_dim", "_joint_projection"]
    watched = [
        (layer, "", [*common, "norm_first", "activation"]),
        (layer, "_modules", ["self_attn", "linear1", "linear2", "norm1", "norm2", "dropout", "dropout1", "dropout2"]),
        (attention, "", [*common, *own]),
        (attention, "_modules", ["q_proj", "k_proj", "v_proj", "out_proj"]),
        (attention, "_parameters", ["bias_k", "bias_v"]),
    ]
    for norm in norms:
        watched += [(norm, "", [*common, "eps", "normalized_shape"]), (norm, "_parameters", ["weight", "bias"])]
    watched += [(dropout, "", common) for dropout in dropouts]
    for linear in linears:
        watched += [
            (linear, "", [*common, "activation", "backend", "_packed"]),
            (linear, "_buffers", ["weight", "weight_scale"]),
            (linear, "_parameters", ["bias"]),
        ]
    return watched


def applied_before(x: Tensor) -> Tensor:
    """Stands for the activation of a layer whose first linear layer applies it."""
    return x
