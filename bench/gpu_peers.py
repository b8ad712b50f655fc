"""What others offer on a GPU for the same calls: each form that this installation has and that takes the call."""

from __future__ import annotations

import importlib
import math
import time
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Form = Callable[..., Any]


def available(forms: dict[str, Form], *arguments: Any) -> dict[str, Form]:
    """The forms that run on ``arguments``: a peer that is not there, or refuses, has no time to compare with."""
    found = {}
    for name, form in forms.items():
        try:
            form(*arguments)
        except Exception:
            continue
        found[name] = form
    return found


def imported(module: str, name: str) -> Any | None:
    """An attribute of a package that may be missing or broken here."""
    try:
        return getattr(importlib.import_module(module), name)
    except Exception:
        return None


_compile_until = math.inf


def compile_until(deadline: float) -> None:
    """A run that has to end in time compiles no further peer past ``deadline`` (of time.perf_counter): those are left
    out."""
    global _compile_until
    _compile_until = deadline


@cache
def compiled(function: Form) -> Form:
    """Once a function, however many copies of its tensors there are."""
    if time.perf_counter() > _compile_until:
        raise TimeoutError("no time is left to compile")
    return torch.compile(function, dynamic=False)


# --- Attention -------------------------------------------------------------------------------------------------------


def _sdpa_by(backend: Any, causal: bool, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from torch.nn.attention import sdpa_kernel

    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])


def _causal_rule(batch: Tensor, head: Tensor, q_index: Tensor, k_index: Tensor) -> Tensor:
    return q_index >= k_index


@cache
def _flex(causal: bool, seqlen_q: int, seqlen_k: int) -> Form:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    mask = create_block_mask(_causal_rule, None, None, seqlen_q, seqlen_k) if causal else None
    return partial(compiled(flex_attention), block_mask=mask)


def _flex_attention(causal: bool, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _flex(causal, q.shape[2], k.shape[2])(q, k, v, enable_gqa=q.shape[1] != k.shape[1])


def attention_forms(causal: bool) -> dict[str, Form]:
    """(q, k, v) -> out, each in the layout (batch, heads, seqlen, head_dim)."""
    from torch.nn.attention import SDPBackend

    forms: dict[str, Form] = {
        "SDPA flash": partial(_sdpa_by, SDPBackend.FLASH_ATTENTION, causal),
        "SDPA cuDNN": partial(_sdpa_by, SDPBackend.CUDNN_ATTENTION, causal),
        "SDPA efficient": partial(_sdpa_by, SDPBackend.EFFICIENT_ATTENTION, causal),
        "FlexAttention": partial(_flex_attention, causal),
    }
    flash = imported("flash_attn", "flash_attn_func")
    if flash is not None:
        forms["flash-attn"] = lambda q, k, v: flash(*(t.transpose(1, 2) for t in (q, k, v)), causal=causal).transpose(
            1, 2
        )
    return forms


# --- Norms -----------------------------------------------------------------------------------------------------------


def _add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    added = x + residual
    return F.layer_norm(added, weight.shape, weight, bias), added


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, weight.shape, weight, bias)


def _rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, 1e-5)


def norm_forms(op: str) -> dict[str, Form]:
    plain = {"layer norm": _layer_norm, "rms norm": _rms_norm, "add + layer norm": _add_layer_norm}[op]
    forms: dict[str, Form] = {"torch": plain, "torch.compile": lambda *tensors: compiled(plain)(*tensors)}
    liger = {
        "layer norm": imported("liger_kernel.ops.layer_norm", "LigerLayerNormFunction"),
        "rms norm": imported("liger_kernel.ops.rms_norm", "LigerRMSNormFunction"),
    }.get(op)
    if liger is not None:
        forms["Liger"] = (
            (lambda x, weight, bias: liger.apply(x, weight, bias, 1e-5))
            if op == "layer norm"
            else (lambda x, weight: liger.apply(x, weight, 1e-5, 0.0, "llama", False))
        )
    return forms


# --- INT8 ------------------------------------------------------------------------------------------------------------


def _int_mm_linear(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor) -> Tensor:
    """The same layer of PyTorch's parts, for torch.compile to fuse around torch._int_mm."""
    scale = x.abs().amax(-1, keepdim=True).float().clamp_min(1e-12) / 127
    q = (x.float() / scale).round().to(torch.int8)
    product = torch._int_mm(q, weight.t()).float()
    return (product * scale * weight_scale + bias.float()).to(x.dtype)


def _call(module: torch.nn.Module, x: Tensor) -> Tensor:
    return module(x)


def int8_forms(layer: torch.nn.Linear, weight: Tensor, weight_scale: Tensor) -> dict[str, Form]:
    """x -> out of a linear layer: in its own dtype, and with 8-bit weights as PyTorch and torchao compute them."""
    forms: dict[str, Form] = {
        f"F.linear {str(layer.weight.dtype).removeprefix('torch.')}": layer,
        "_int_mm compiled": lambda x: compiled(_int_mm_linear)(x, weight, weight_scale, layer.bias),
    }
    quantize_ = imported("torchao.quantization", "quantize_")
    config = imported("torchao.quantization", "Int8DynamicActivationInt8WeightConfig")
    if quantize_ is not None and config is not None:
        import copy

        theirs = torch.nn.Sequential(copy.deepcopy(layer))
        try:
            quantize_(theirs, config())
        except Exception:
            return forms
        forms["torchao compiled"] = lambda x: compiled(_call)(theirs, x)
    return forms
