"""Hand-written attention, layer norm and INT8 matmul kernels for PyTorch Transformers."""

from fastattn.dispatch import available_backends, explain, use_backend
from fastattn.modules import Int8Linear
from fastattn.multi_head_attention import MultiHeadAttention
from fastattn.ops.attention import attention
from fastattn.ops.attention_with_kv_cache import attention_with_kv_cache
from fastattn.ops.int8_matmul import int8_linear, int8_matmul, quantize_int8
from fastattn.ops.varlen_attention import varlen_attention

__all__ = [
    "Int8Linear",
    "MultiHeadAttention",
    "attention",
    "attention_with_kv_cache",
    "available_backends",
    "explain",
    "int8_linear",
    "int8_matmul",
    "quantize_int8",
    "use_backend",
    "varlen_attention",
]
