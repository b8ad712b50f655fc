"""Hand-written attention, layer norm and INT8 matmul kernels for PyTorch Transformers."""

from fastattn.dispatch import available_backends, explain, use_backend

__all__ = ["available_backends", "explain", "use_backend"]
