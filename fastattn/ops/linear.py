"""Linear layers: PyTorch's product, or a kernel of the extension where that is faster.

Behind ``Linear``, ``MultiHeadAttention`` and the models; not an op of the backend table: PyTorch runs what it does not.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastattn import dispatch
from fastattn._extension import extension

# Activations by the names that the kernel knows.
ACTIVATION_FUNCTIONS = {
    "none": lambda x: x,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}


def linear(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str = "none", backend: str = "auto"
) -> Tensor:  # fmt: skip
    """``activation(F.linear(input, weight, bias))``.

    The CPU's kernel takes float32, bfloat16 and float16, compiled in inference only, up to as many rows as it is faster
    for: any number in float32 on processors that MKL has no AVX-512 kernels for, else some 8 to 32.

    Args:
        input: (..., in_features).
        weight: (out_features, in_features), dtype and device of ``input``.
        bias: (out_features,), likewise.
        activation: a key of ``ACTIVATION_FUNCTIONS``.
        backend: "auto" and "cpu" may use the kernel, every other is PyTorch's product.
    Returns: (..., out_features).
    Raises: KeyError for an unknown activation; and what ``F.linear`` raises.
    """
    if dispatch.takes_cpu(backend) and extension is not None:
        if torch.compiler.is_compiling():
            if _compiled_runs(input, weight, bias):
                return torch.ops.fastattn.linear.default(input, weight, bias, activation)
        else:
            out = extension.linear_if_faster(input, weight, bias, activation)
            if out is not None:
                return out
    return ACTIVATION_FUNCTIONS[activation](F.linear(input, weight, bias))


def backend_of(module: nn.Module) -> str:
    """The backend of the products of ``module``, which has a ``backend``.

    While training, a checkpointed block computes without gradients what it computes again with them: one product,
    compiled too, where the kernel does not serve gradients.
    """
    return "eager" if module.training and torch.compiler.is_compiling() else str(module.backend)


def gather_weight(weight: Tensor) -> None:
    """Moves a contiguous weight on the CPU onto 2 MiB pages where the system can; its bytes and its address stay.

    A decoder's step reads weights at the memory's speed only without a walk of the page table every few lines.
    """
    if extension is not None and type(weight) in (Tensor, torch.nn.Parameter):
        extension.gather_weight(weight)


# torch.compile cannot ask the extension. So many rows are worth it on every processor that has AVX2.
_MAX_ROWS_COMPILED = 8 if extension is not None and "avx" in extension.active_cpu_isa() else 0
_COMPILED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _compiled_runs(input: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    if input.device.type != "cpu" or input.dtype not in _COMPILED_DTYPES or torch.is_autocast_enabled("cpu"):
        return False
    if torch.is_grad_enabled() and (input.requires_grad or weight.requires_grad):
        return False
    if torch.is_grad_enabled() and bias is not None and bias.requires_grad:
        return False
    rows = math.prod(input.shape[:-1])
    return input.dtype == weight.dtype and rows <= _MAX_ROWS_COMPILED


if extension is not None:

    @torch.library.register_fake("fastattn::linear")
    def _(input: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
        return input.new_empty((*input.shape[:-1], weight.shape[0]))
