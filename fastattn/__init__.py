"""Hand-written attention, layer norm and INT8 matmul kernels for PyTorch Transformers."""

import warnings as _warnings

from fastattn._extension import missing_reason as _missing_reason
from fastattn.accelerate import accelerate, accelerate_report, restore
from fastattn.dispatch import available_backends, explain, use_backend
from fastattn.modules import Int8Linear, LayerNorm, RMSNorm
from fastattn.multi_head_attention import MultiHeadAttention
from fastattn.ops.attention import attention
from fastattn.ops.attention_with_kv_cache import attention_with_kv_cache
from fastattn.ops.int8_matmul import int8_linear, int8_matmul, quantize_int8
from fastattn.ops.layer_norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from fastattn.ops.triton_autotune import set_autotune
from fastattn.ops.varlen_attention import varlen_attention

# isort: split
# After the ops: the table of backends keeps the order in which they were first imported.
from fastattn import distributed, integrations

__version__ = "0.1.0"

if _missing_reason is not None:
    # Once, at import: whoever installed without kernels should not have to find out by a profile.
    _warnings.warn(f"fastattn runs on PyTorch alone (backend 'eager'): {_missing_reason}.", stacklevel=2)

__all__ = [
    "Int8Linear",
    "LayerNorm",
    "MultiHeadAttention",
    "RMSNorm",
    "accelerate",
    "accelerate_report",
    "add_layer_norm",
    "add_rms_norm",
    "attention",
    "attention_with_kv_cache",
    "available_backends",
    "distributed",
    "explain",
    "int8_linear",
    "int8_matmul",
    "integrations",
    "layer_norm",
    "quantize_int8",
    "restore",
    "rms_norm",
    "set_autotune",
    "use_backend",
    "varlen_attention",
]
