"""Modules over the ops: drop-in replacements for those of torch.nn."""

from __future__ import annotations

from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from fastattn import dispatch
from fastattn._extension import extension
from fastattn._nested import is_packed, nested_like, packed_tokens
from fastattn._tracing import as_fx_node, refuse_scripting, unseen_by_jit
from fastattn.ops import int8_matmul as int8_ops
from fastattn.ops import int8_matmul_compiled
from fastattn.ops.layer_norm import layer_norm, rms_norm
from fastattn.ops.linear import backend_of, gather_weight, linear


def _changes_are_counted(tensor: Tensor) -> bool:
    """Whether the address and the version of ``tensor`` tell that it has changed: not those of one made in inference
    mode, nor of one that a ``torch.func`` transform has wrapped, which has no address."""
    return not tensor.is_inference() and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def _packing_key(weight: Tensor) -> tuple[int, int] | None:
    """Identifies the contents of an int8 weight, or None for one that is not to be packed: because the CPU kernel does
    not run it, or because nothing would tell that it has changed."""
    if type(weight) is not Tensor or weight.device.type != "cpu" or extension is None:
        return None
    if not _changes_are_counted(weight) or weight.shape[1] > int8_matmul_compiled.MAX_DEPTH:
        return None
    return weight.data_ptr(), weight._version


class Int8Linear(nn.Module):
    """``nn.Linear`` with int8 weights, for inference: ``activation(int8_linear(input, weight, weight_scale, bias))``.

    The input is quantised by row, in float32; the result has its dtype. Gradients reach the input and the bias; the
    weight is fixed. On the CPU the weight is also kept in the layout of the matrix loop, which doubles its memory; that
    copy is a cache: it is made again when the weight changes, and is not in the state dict, pickles or copies.

    The weight may be replaced, loaded, or written in place under ``torch.no_grad()``. What writes past PyTorch's count
    of changes goes unnoticed, as it does in autograd: ``weight.data.copy_(...)``, a NumPy view, another process. Call
    ``layer.to(layer.weight.device)`` after it, which packs anew.

    Buffers and parameters (the keys of the state dict):
        weight: (out_features, in_features) int8.
        weight_scale: (out_features,) float32, also after ``.half()`` or ``.to(dtype)``.
        bias: (out_features,), a parameter.
    """

    weight: Tensor
    weight_scale: Tensor
    bias: nn.Parameter | None
    __prepare_scriptable__ = refuse_scripting

    # Torch does not count the changes of tensors made in inference mode, and the cached packed weight relies on it.
    @torch.inference_mode(False)
    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        activation: str | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        for name, size in (("in_features", in_features), ("out_features", out_features)):
            if not isinstance(size, (int, Integral)) or size < 0:
                raise (ValueError if isinstance(size, Integral) else TypeError)(
                    f"Int8Linear: {name} must be an int >= 0, got {size!r}."
                )
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise TypeError(
                f"Int8Linear: dtype must be a floating-point torch.dtype, got {dtype!r}. It is that of the bias; the "
                "weight is always int8."
            )
        int8_ops._activation_name("Int8Linear", activation)  # raises if there is no such activation
        dispatch.check_name("Int8Linear", backend)
        self.in_features = in_features
        self.out_features = out_features
        self.activation = activation
        self.backend = backend
        self.register_buffer("weight", torch.zeros(out_features, in_features, dtype=torch.int8, device=device))
        self.register_buffer("weight_scale", torch.ones(out_features, dtype=torch.float32, device=device))
        values = torch.zeros(out_features, device=device, dtype=dtype) if bias else None
        self.register_parameter("bias", None if values is None else nn.Parameter(values))
        self._packed: Tensor | None = None
        self._packed_key: tuple[int, int] | None = None
        self._packed_source: Tensor | None = None

    @classmethod
    @torch.inference_mode(False)
    @torch.no_grad()
    def from_linear(cls, linear: nn.Linear, activation: str | None = None, *, backend: str = "auto") -> Int8Linear:
        """Quantises the weight of ``linear`` by row. Keeps its bias (the same parameter), device and training flag.

        Raises: TypeError if ``linear`` is not an ``nn.Linear``; ValueError if it is a lazy one that has not run yet.
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"Int8Linear.from_linear: linear must be an nn.Linear, got {type(linear).__name__}.")
        if nn.parameter.is_lazy(linear.weight):
            raise ValueError(
                "Int8Linear.from_linear: linear is lazy and its weight has no shape yet; call it on an input first."
            )
        weight = linear.weight
        module = cls(linear.in_features, linear.out_features, False, activation, device=weight.device, backend=backend)
        module.weight, module.weight_scale = int8_ops.quantize_int8(weight)
        module.bias = linear.bias
        module.train(linear.training)
        module._pack()
        return module

    def forward(self, input: Tensor) -> Tensor:
        # At one row the general way costs half of what the product does. This is the shortcut for the usual case: the
        # weight is packed, and nobody asked for another backend than the CPU's. The op checks its arguments.
        packed = self._packed  # read once: another thread may be packing anew
        if packed is not None and not torch.compiler.is_compiling() and dispatch.takes_cpu(self.backend):
            activation_name = int8_ops.ACTIVATIONS.get(self.activation)
            buffers: dict[str, Any] = self._buffers
            parameters: dict[str, Any] = self._parameters
            # A parametrization, FSDP or a replica makes the bias an attribute, which the general way finds.
            if activation_name is not None and "bias" in parameters:
                out = int8_matmul_compiled.int8_linear_if_packed(
                    input, packed, buffers["weight"], buffers["weight_scale"], parameters["bias"],
                    activation_name,
                )  # fmt: skip
                if out is not None:
                    return out
        return self._forward_in_general(input)

    def _forward_in_general(self, input: Tensor) -> Tensor:
        if isinstance(input, Proxy):
            return as_fx_node(self, input)
        if is_packed(input):
            return nested_like(self.forward(packed_tokens(input)), input)
        if torch.compiler.is_compiling():
            # What was packed last; the op checks that it was made of this weight. An exported program has no cache.
            packed = None if torch.compiler.is_exporting() else self._packed
        else:
            packed = self.packed_weight()
        call = int8_ops._prepare_linear(
            input, self.weight, self.weight_scale, self.bias, activation=self.activation, packed=packed
        )
        return dispatch.select("int8_linear", call, self.backend).run(call)

    def extra_repr(self) -> str:
        shape = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return shape if self.activation is None else f"{shape}, activation={self.activation!r}"

    def packed_weight(self) -> Tensor | None:
        """The packed form of the weight as it is now; None if it has none."""
        key = _packing_key(self.weight)
        if key is None or key != self._packed_key:
            self._pack()
        return self._packed

    # --- The packed weight: made whenever the weight is replaced, so that compiled code, which cannot, finds it ---

    def _pack(self) -> None:
        self._packed, self._packed_key, self._packed_source = None, _packing_key(self.weight), None
        if self._packed_key is not None:
            with unseen_by_jit():
                # The alias keeps the memory, so that another weight cannot come to its address and pass for it.
                self._packed_source = self.weight.detach()
                self._packed = int8_matmul_compiled.pack_weight(self.weight)
                gather_weight(self._packed)

    @torch.inference_mode(False)
    def _apply(self, fn: Any, recurse: bool = True) -> Int8Linear:
        weight, scale = self.weight, self.weight_scale
        super()._apply(fn, recurse)
        # .half() and the like convert every floating tensor, .type() every tensor; the scale keeps its precision.
        if self.weight.dtype != torch.int8:
            self.weight = weight.to(self.weight.device)
        if self.weight_scale.dtype != torch.float32:
            self.weight_scale = scale.to(self.weight_scale.device)
        self._pack()
        return self

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        weight = state_dict.get(f"{prefix}weight")
        if isinstance(weight, Tensor) and weight.dtype != torch.int8:
            # Copied as it is, a float weight would be cut to whole numbers, most of them 0.
            error_messages: list[str] = args[-1]
            error_messages.append(
                f"Int8Linear: {prefix}weight is {weight.dtype} but must be torch.int8. Load it into the nn.Linear and "
                "quantise that: Int8Linear.from_linear(linear), or accelerate(model, int8=True)."
            )
            return
        super()._load_from_state_dict(state_dict, prefix, *args)
        if self.weight_scale.dtype != torch.float32:
            # With assign=True the state dict's tensor takes the place of ours.
            self.weight_scale = self.weight_scale.float()
        self._pack()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": None, "_packed_key": None, "_packed_source": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._pack()


class Linear(nn.Linear):
    """``torch.nn.Linear`` on the CPU's kernel where that is the faster one, elsewhere PyTorch's: same parameters and
    ``state_dict``.

    What ``accelerate(model, linear=True)`` makes of ``nn.Linear``. ``forward`` can apply an activation, a key of
    ``fastattn.ops.linear.ACTIVATION_FUNCTIONS``, in the pass that writes the result. ``backend``: as in
    ``fastattn.attention``.
    """

    backend = "auto"
    __prepare_scriptable__ = refuse_scripting

    def forward(self, input: Tensor, activation: str = "none") -> Tensor:
        if isinstance(input, Proxy):
            return as_fx_node(self, input, activation)
        return linear(input, self.weight, self.bias, activation=activation, backend=backend_of(self))


class LayerNorm(nn.LayerNorm):
    """``torch.nn.LayerNorm`` on fastattn's kernels: same arguments, parameters and ``state_dict``."""

    __prepare_scriptable__ = refuse_scripting

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, Proxy):
            return as_fx_node(self, input)
        if is_packed(input):
            return nested_like(self.forward(packed_tokens(input)), input)
        return layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


class RMSNorm(nn.RMSNorm):
    """``torch.nn.RMSNorm`` on fastattn's kernels: same arguments, parameters and ``state_dict``."""

    __prepare_scriptable__ = refuse_scripting

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, Proxy):
            return as_fx_node(self, x)
        if is_packed(x):
            return nested_like(self.forward(packed_tokens(x)), x)
        return rms_norm(x, self.normalized_shape, self.weight, self.eps)
