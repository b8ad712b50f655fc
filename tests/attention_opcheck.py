"""PyTorch's own checks of the ops of attention: schema, fake kernel, autograd."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from attention_cases import Case

from fastattn.ops.attention import prepare


def arguments_of(case: Case) -> tuple:
    """What the ops take for ``case``; every operand that can be learned requires grad."""
    inputs = case.inputs(torch.float32)
    for name, tensor in inputs.items():
        tensor.requires_grad_(tensor.is_floating_point() and name != "alibi_slopes")
    call = prepare(**inputs, enable_gqa=True, **case.options)
    return tuple(call._replace(rng_state=torch.tensor([3, 4]) if call.dropout_p else None))


def opcheck(op: str, arguments: tuple, averages: Sequence[bool] = (False, True)) -> None:
    """Of op ``op``, of its backward with and without a gradient of the LSE, and of its weights, averaged over heads as
    ``averages`` says."""
    forward, backward, weights = (
        getattr(torch.ops.fastattn, f"{op}{suffix}") for suffix in ("", "_backward", "_weights")
    )
    torch.library.opcheck(forward, arguments)
    detached = tuple(x.detach() if isinstance(x, torch.Tensor) else x for x in arguments)
    out, lse = forward(*detached)
    mask, sinks = detached[3], detached[5]
    wants = (mask is not None and mask.is_floating_point(), sinks is not None)
    for dlse in (None, torch.randn_like(lse)):
        torch.library.opcheck(backward, (torch.randn_like(out), dlse, *detached[:3], out, lse, *detached[3:], *wants))
    for average_heads in averages:
        torch.library.opcheck(weights, (*arguments[:2], lse, *arguments[3:5], *arguments[6:], average_heads))
