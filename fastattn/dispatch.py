"""Which kernel runs: one table of backends per op, in order of preference, each with its reasons to refuse a call."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import forward_ad

from fastattn import _extension, _triton

BACKENDS = ("cuda", "triton", "cpu", "eager", "emulated")


@dataclass(frozen=True)
class Kernel:
    """One backend's form of one op.

    ``call`` is the op's argument tuple after its meaning was checked (``AttentionCall``, ``LayerNormCall``, …).
    """

    backend: str
    refuses: Callable[[Any], str | None]  # None = runs it, else the reason, without the backend's name
    run: Callable[..., Any]
    kernels: Callable[[Any], str] | None = None  # which of its kernels run a call that it takes, if there is a choice


# Filled by the modules in fastattn/ops, each of which ends with `register(op, ...)`: backends in order of preference.
TABLE: dict[str, tuple[Kernel, ...]] = {}
_PREPARE: dict[str, Callable[..., Any]] = {}


def register(op: str, *kernels: Kernel, prepare: Callable[..., Any]) -> None:
    """Adds an op to the table.

    Args:
        op: the public function's name.
        kernels: in order of preference; eager, which never refuses, is the last but for "emulated".
        prepare: takes the public function's arguments without ``backend``, checks their meaning as the function does,
            and returns the call that ``refuses`` and ``run`` take. Runs nothing, writes nothing, draws nothing random.
    """
    TABLE[op] = kernels
    _PREPARE[op] = prepare


def never_refuses(call: Any) -> None:
    """The ``refuses`` of eager."""
    return None


def within_transform() -> bool:
    """Whether torch.func transforms this code. torch.compile asks while it traces the transforms, and guards them."""
    return torch._C._functorch.peek_interpreter_stack() is not None


# As torch.compiler.assume_constant_result does, which would import the compiler, for seconds.
within_transform._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _refuses_transforms() -> str | None:
    """Why no kernel but eager's runs at all at this moment; None outside of transforms."""
    if within_transform():
        return "its kernels have no rules for torch.func transforms (vmap, grad, jvp)"
    # Compiled code knows forward mode from torch.func alone.
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return None
    return "its kernels have no forward-mode derivatives"


def _refuses(kernel: Kernel, call: Any) -> str | None:
    """Why ``kernel`` does not run ``call``, on a machine that has it."""
    reason = None if kernel.backend == "eager" else _refuses_transforms()
    return kernel.refuses(call) if reason is None else reason


# --- The CUDA kernels, on a device and in the emulator ---------------------------------------------------------------


def cuda_kernels(
    refuses: Callable[[Any, str], str | None], run: Callable[..., Any], kernels: Callable[[Any], str] | None = None
) -> tuple[Kernel, Kernel]:
    """The rows "cuda" and "emulated" of an op: the same kernels on a device, and in the emulator on CPU tensors.

    Args:
        refuses: ``refuses(call, device_type)`` with device_type "cuda" or "cpu". It starts with `refuses_device`.
        run, kernels: as in `Kernel`; they call ``torch.ops.fastattn.*``, whose implementation chooses by the tensors'
            device.
    """

    def refuses_emulated(call: Any) -> str | None:
        if torch.compiler.is_compiling():
            return "torch.compile cannot trace the switch of the emulator"
        return refuses(call, "cpu")

    def emulated(function: Callable[..., Any]) -> Callable[..., Any]:
        def emulating(*args: Any, **kwargs: Any) -> Any:
            extension = _extension.extension
            assert extension is not None  # _emulated_unavailable has asked
            with extension.Emulation():
                return function(*args, **kwargs)

        return emulating

    return (
        Kernel("cuda", lambda call: refuses(call, "cuda"), run, kernels),
        Kernel("emulated", refuses_emulated, emulated(run), None if kernels is None else emulated(kernels)),
    )


def refuses_device(name: str, tensor: torch.Tensor, device_type: str) -> str | None:
    """Why the CUDA kernels cannot run on the device of ``tensor``, which the caller knows as ``name``."""
    if tensor.device.type != device_type:
        return f"{name} is on {tensor.device}"
    if tensor.layout is not torch.strided:
        return f"{name} is {tensor.layout}, not dense"
    if device_type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(tensor.device)
    capability = 10 * properties.major + properties.minor
    if capability < 80:
        return f"{tensor.device} has compute capability {properties.major}.{properties.minor}, below 8.0"
    built = _extension.cuda_architectures
    if any(_serves(architecture, capability) for architecture in built):
        return None
    return (
        f"{tensor.device} has compute capability {properties.major}.{properties.minor} but the kernels were built for "
        f"{', '.join(built)}; build them again with TORCH_CUDA_ARCH_LIST={properties.major}.{properties.minor}"
    )


def _serves(architecture: str, capability: int) -> bool:
    """Whether code for ``architecture`` ("80", "90a", "80+PTX") runs on a GPU of compute capability ``capability``.

    Machine code runs on the later minor versions of its major one, that of "90a" on 9.0 alone; PTX runs on all later.
    """
    number = int(architecture.removesuffix("+PTX").removesuffix("a"))
    if architecture.endswith("+PTX"):
        return number <= capability
    if architecture.endswith("a"):
        return number == capability
    return number // 10 == capability // 10 and number <= capability


# --- Which backends this machine can run -----------------------------------------------------------------------------


def _cuda_unavailable() -> str | None:
    if _extension.without_cuda_reason is not None:
        return _extension.without_cuda_reason
    return None if torch.cuda.is_available() else "no CUDA device"


def _emulated_unavailable() -> str | None:
    if _extension.extension is None:
        return _extension.missing_reason
    if _extension.without_cuda_reason is None:
        return "this build runs its CUDA kernels on a device, not in the emulator"
    return None


_UNAVAILABLE: dict[str, Callable[[], str | None]] = {
    "cuda": _cuda_unavailable,
    "triton": _triton.missing_reason,
    "cpu": lambda: _extension.missing_reason,
    "eager": lambda: None,
    "emulated": _emulated_unavailable,
}


def available_backends() -> dict[str, str | None]:
    """Every backend, with None if this machine can run it, else the reason why not."""
    return {name: _UNAVAILABLE[name]() for name in BACKENDS}


# --- The preferred backend -------------------------------------------------------------------------------------------


class _Traced(threading.local):
    """The preference as compiled code sees it: dynamo cannot trace a ContextVar, but guards this, thread by thread."""

    def __init__(self) -> None:
        self.backend = "auto"


_preferred: ContextVar[str] = ContextVar("fastattn_backend", default="auto")
_traced = _Traced()


def preference() -> str:
    """What ``use_backend`` has set for calls that say ``backend="auto"``."""
    return _traced.backend if torch.compiler.is_compiling() else _preferred.get()


def takes_cpu(backend: str) -> bool:
    """Whether a call that says ``backend`` may go to the CPU's kernel without a look at the table."""
    return (preference() if backend == "auto" else backend) in ("auto", "cpu")


def _set_preference(name: str) -> None:
    if not torch.compiler.is_compiling():
        _preferred.set(name)
    _traced.backend = name


def check_name(caller: str, name: str) -> None:
    """Raises ValueError for what is neither "auto" nor a backend's name."""
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"{caller}: backend must be 'auto' or one of {', '.join(map(repr, BACKENDS))}, got {name!r}.")


class use_backend:
    """Sets the backend for calls that say ``backend="auto"``, in this thread and context.

    Call it to switch for good, or use it as a context manager to switch for a block::

        fastattn.use_backend("eager")
        with fastattn.use_backend("cpu"): ...

    A compiled function honours it too, and is compiled again when it changes; inside one, use it as a context manager.
    Compiled functions know the thread alone, not the context: asyncio tasks of one thread share what was set last.

    Raises: ValueError for an unknown name; NotImplementedError, with the reason, for a backend this machine cannot run.
    """

    def __init__(self, name: str) -> None:
        check_name("use_backend", name)
        reason = None if name == "auto" else _UNAVAILABLE[name]()
        if reason is not None:
            raise NotImplementedError(f"use_backend: backend {name!r} cannot run here: {reason}.")
        self._name = name
        # What each block restores that is open. The call itself has begun the first.
        self._previous = [preference()]
        self._begun = True
        _set_preference(name)

    def __enter__(self) -> use_backend:
        if not self._begun:
            self._previous.append(preference())
        self._begun = False
        _set_preference(self._name)
        return self

    def __exit__(self, *exc_info: object) -> None:
        _set_preference(self._previous.pop())


# --- The choice ------------------------------------------------------------------------------------------------------


def _only_by_name(backend: str) -> bool:
    """Emulated and interpreted kernels are there to be tested; every other backend is many times faster."""
    return backend == "emulated" or (backend == "triton" and _triton.is_interpreted())


def _refusal(op: str, backend: str, call: Any) -> str | None:
    """Why ``backend`` does not run ``call``: first the machine, then the table, then the kernel is asked."""
    reason = _UNAVAILABLE[backend]()
    if reason is not None:
        return reason
    for kernel in TABLE[op]:
        if kernel.backend == backend:
            return _refuses(kernel, call)
    return f"it has no {op} kernel"


def select(op: str, call: Any, backend: str = "auto") -> Kernel:
    """The kernel that runs ``call``: the one asked for by name, else the first in the table that does not refuse.

    Raises: ValueError for an unknown backend; NotImplementedError if the backend asked for by name refuses.
    """
    if backend == "auto":
        backend = preference()
    check_name(op, backend)
    for kernel in TABLE[op]:
        wanted = backend == kernel.backend or (backend == "auto" and not _only_by_name(kernel.backend))
        if wanted and _UNAVAILABLE[kernel.backend]() is None and _refuses(kernel, call) is None:
            return kernel
    # Where use_backend has chosen it, backend='auto' would choose it again.
    remedy = "use_backend('auto')" if preference() == backend else "backend='auto'"
    raise NotImplementedError(
        f"{op}: backend {backend!r} cannot run this: {_refusal(op, backend, call)}. "
        f"Use {remedy} to let fastattn choose."
    )


def explain(op: str | Callable[..., Any], *args: Any, backend: str = "auto", **kwargs: Any) -> str:
    """Says which backend would run a call, and why each other one would not. Runs nothing and draws no random number.

    Of `attention_with_kv_cache` on Hopper it also names the kernels: its own, or those of 8.0 and why.

    ::

        >>> print(fastattn.explain(fastattn.attention, q, k, v, is_causal=True))
        attention: cpu runs this call.
          cuda      no: fastattn was built without CUDA kernels: this torch was built without CUDA
          triton    no: no GPU (for tests, TRITON_INTERPRET=1 runs it on CPU tensors)
          cpu       would run
          eager     would run
          emulated  no: dtype float32 is not bfloat16 or float16

    Args:
        op: the function or its name, such as ``"attention"``.
        args, kwargs: what the function would be called with, ``backend`` included.
    Raises: ValueError for an unknown op or backend, and what the function itself raises for bad arguments.
    """
    name = op if isinstance(op, str) else getattr(op, "__name__", repr(op))
    if name not in TABLE:
        raise ValueError(f"explain: {name!r} is not an op of fastattn; the ops are {', '.join(sorted(TABLE))}.")
    check_name("explain", backend)
    try:
        inspect.signature(_PREPARE[name]).bind(*args, **kwargs)
    except TypeError as error:
        raise TypeError(f"{name}: {error}, of the arguments that explain was given to pass on.") from None
    call = _PREPARE[name](*args, **kwargs)
    wanted = preference() if backend == "auto" else backend
    refusals = {each: _refusal(name, each, call) for each in BACKENDS}

    if wanted == "auto":
        running = next(k.backend for k in TABLE[name] if refusals[k.backend] is None and not _only_by_name(k.backend))
        verdict = f"{running} runs this call."
    elif refusals[wanted] is None:
        verdict = f"{wanted} runs this call, as asked for by {'use_backend' if backend == 'auto' else 'name'}."
    else:
        verdict = f"this call raises NotImplementedError: {wanted} was asked for and cannot run it."

    def line(each: str, reason: str | None) -> str:
        if reason is not None:
            return f"  {each:<9} no: {reason}"
        by_name = ", but only when asked for by name" if _only_by_name(each) else ""
        kernels = next(k.kernels for k in TABLE[name] if k.backend == each)
        which = kernels(call) if kernels is not None else ""
        return f"  {each:<9} would run{f' {which}' if which else ''}{by_name}"

    return "\n".join([f"{name}: {verdict}", *(line(each, reason) for each, reason in refusals.items())])
