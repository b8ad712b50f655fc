"""What torch.fx and torch.jit see of fastattn's modules."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.fx import Proxy


def as_fx_node(module: nn.Module, *arguments: Any) -> Proxy:
    """The call of ``module`` as one node of the graph that torch.fx traces, as those of torch.nn are: ``arguments[0]``
    is a Proxy, of which no meaning can be checked.

    Raises: TypeError for a module that is traced by itself, which has no name in the graph.
    """
    tracer: Any = arguments[0].tracer
    if tracer.root is module:
        raise TypeError(
            f"{type(module).__name__}: torch.fx cannot trace into it, only a model that contains it: trace "
            "torch.nn.Sequential(module), or use torch.export or torch.compile."
        )
    return tracer.create_proxy("call_module", tracer.path_of_module(module), arguments, {})


def refuse_scripting(module: nn.Module) -> nn.Module:
    """The ``__prepare_scriptable__`` of fastattn's modules, which torch.jit.script asks what to compile instead."""
    raise NotImplementedError(
        f"torch.jit.script: fastattn's {type(module).__name__} chooses its kernel in Python that TorchScript does not "
        "have. Use torch.export, torch.compile or torch.jit.trace, or script what fastattn.restore(model) returns."
    )


@contextmanager
def unseen_by_jit() -> Iterator[None]:
    """While entered, torch.jit.trace records nothing: what is made is a constant of its graph."""
    bindings: Any = torch._C
    state = bindings._get_tracing_state()
    bindings._set_tracing_state(None)
    try:
        yield
    finally:
        bindings._set_tracing_state(state)
