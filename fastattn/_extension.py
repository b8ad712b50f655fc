"""Loads the compiled extension, or keeps the reason why there is none."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

# Also loads the libraries, OpenMP among them, that the extension links to.
import torch

from fastattn._interface import interface_stamp


def _build_report() -> dict[str, Any]:
    report = Path(__file__).with_name("_build_report.json")
    return json.loads(report.read_text()) if report.exists() else {}


def _is_stale() -> bool:
    """Whether the extension was built of other sources than those beside the package, as after a pull. An installed
    package has none there."""
    csrc, report = Path(__file__).parents[1] / "csrc", _build_report()
    if not report.get("built") or not (csrc / "ops.cpp").exists():
        return False
    return report.get("interface") != interface_stamp(csrc)


def _other_torch() -> str | None:
    """What is wrong with an extension that was built for another minor version of torch: it may not load, or crash."""
    built = _build_report().get("torch")
    if built is None or built.split(".")[:2] == torch.__version__.split(".")[:2]:
        return None
    return (
        f"the compiled extension was built for torch {built}, and this is torch {torch.__version__}; install fastattn "
        "again, or build it again with `make build`"
    )


def _load() -> tuple[ModuleType | None, str | None]:
    # Before anything is loaded: its ops would stay registered.
    if _is_stale():
        return None, (
            "the compiled extension was built before csrc changed; build it again with `make build`, or "
            "`python setup.py build_ext --inplace`"
        )
    if (reason := _other_torch()) is not None:
        return None, reason
    try:
        module = importlib.import_module("fastattn._C")
    except ImportError as error:
        # A checkout that nothing was built in has no report.
        unbuilt = "it was not built here; run `make build`, or `python setup.py build_ext --inplace`"
        why = error if _build_report().get("built") else _build_report().get("reason") or unbuilt
        return None, f"the compiled extension is missing: {why}"
    return module, None


def _without_cuda() -> str | None:
    """Why the extension has no CUDA kernels for a device, None if it has."""
    if extension is None:
        return missing_reason
    if extension.build_info()["cuda_kernels"] == "device":
        return None
    return f"fastattn was built without CUDA kernels: {_build_report().get('cuda') or 'nvcc was not used'}"


def short_way(name: str) -> Callable[..., Any]:
    """A function of the extension that gives None for calls it leaves to the general way: all, without extension."""
    return getattr(extension, name) if extension is not None else lambda *arguments: None


extension, missing_reason = _load()
without_cuda_reason = _without_cuda()
# What the CUDA kernels were compiled for, as in ("80", "90a", "80+PTX").
cuda_architectures = tuple(extension.build_info()["cuda_architectures"].split()) if extension is not None else ()
