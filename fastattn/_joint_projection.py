"""One INT8 product for layers that have the same input, as the projections of self-attention do."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastattn.dispatch import within_transform
from fastattn.modules import Int8Linear

_Key = list[tuple[int, int]]

# Bytes of float32 results. The kernel streams outputs of 1 MiB past the caches, where attention would soon look for
# them, and rows that far apart are read more slowly: from there on this costs more than two calls.
MAX_JOINT_BYTES = 1 << 20


class JointProjection:
    """`Int8Linear` layers as one layer of all their outputs: one call, which quantises their input once.

    The joint layer is a cache: it is made again when a weight, a scale or a bias changes, and copies and pickles of
    this object hold none.
    """

    def __init__(self) -> None:
        self._layer: Int8Linear | None = None
        self._key: _Key | None = None
        self._sources: list[Tensor] = []

    def __reduce__(self) -> tuple[type[JointProjection], tuple[()]]:
        return JointProjection, ()

    def __call__(self, layers: Sequence[Int8Linear], input: Tensor) -> Sequence[Tensor]:
        """What each layer makes of ``input``; each result is a view of the joint one where there is one."""
        rows = [layer.out_features for layer in layers]
        small = (
            not torch.compiler.is_compiling()
            and input.numel() * sum(rows) * 4 < layers[0].in_features * MAX_JOINT_BYTES
        )
        joint = self.joint(layers) if small else None
        if joint is None:
            return [layer(input) for layer in layers]
        return joint(input).split(rows, dim=-1)

    def joint(self, layers: Sequence[Int8Linear]) -> Int8Linear | None:
        """The joint layer; None if the layers are to be called one by one."""
        key = _key(layers)
        if key is not None and (self._layer is None or key != self._key):
            self._layer, self._key = _join(layers), key
            # Aliases keep the memory, so that other values cannot come to its addresses and pass for these.
            tensors = [(layer.weight, layer.weight_scale, layer.bias) for layer in layers]
            self._sources = [tensor.detach() for three in tensors for tensor in three if tensor is not None]
        return None if key is None else self._layer


def _key(layers: Sequence[Int8Linear]) -> _Key | None:
    """Identifies what the layers hold. None if they are to be called one by one: off the CPU, because nothing would
    tell of a change (inference mode), for the gradients of their biases, or because somebody watches one of them or has
    made its bias an attribute (a parametrization, FSDP)."""
    if within_transform():
        return None  # what a torch.func transform has wrapped has no address
    first, key = layers[0], []
    for layer in layers:
        watched = layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks
        if layer._packed is None or watched or layer.activation is not None or layer.backend != first.backend:
            return None
        if "bias" not in layer._parameters:
            return None
        bias = layer._parameters["bias"]
        if (bias is None) != (first._parameters["bias"] is None):
            return None
        for tensor in (layer._buffers["weight"], layer._buffers["weight_scale"], bias):
            if tensor is None:
                continue
            if type(tensor) not in (Tensor, nn.Parameter) or tensor.is_inference():
                return None
            if tensor.requires_grad and torch.is_grad_enabled():
                return None
            key.append((tensor.data_ptr(), tensor._version))
    return key


@torch.inference_mode(False)
@torch.no_grad()
def _join(layers: Sequence[Int8Linear]) -> Int8Linear:
    first = layers[0]
    joint = Int8Linear(first.in_features, 0, bias=False, backend=first.backend)
    joint.out_features = sum(layer.out_features for layer in layers)
    joint.weight = torch.cat([layer.weight for layer in layers])
    joint.weight_scale = torch.cat([layer.weight_scale for layer in layers])
    biases: list[Tensor] = [layer.bias for layer in layers if layer.bias is not None]
    if biases:
        joint.bias = nn.Parameter(torch.cat(biases), requires_grad=False)
    return joint
