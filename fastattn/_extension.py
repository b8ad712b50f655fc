"""Loads the compiled extension, or keeps the reason why there is none."""

from __future__ import annotations

import importlib
import json
import warnings
from pathlib import Path
from types import ModuleType

import torch  # noqa: F401  (loads the libraries, OpenMP among them, that the extension links to)


def _load() -> tuple[ModuleType | None, str | None]:
    try:
        module = importlib.import_module("fastattn._C")
    except ImportError as error:
        report = Path(__file__).with_name("_build_report.json")
        reason = json.loads(report.read_text())["reason"] if report.exists() else None
        return None, f"the compiled extension is missing: {reason or error}"
    return module, None


extension, missing_reason = _load()
if missing_reason is not None:
    # Once, at import: whoever installed without kernels should not have to find out by a profile.
    warnings.warn(f"fastattn runs on PyTorch alone (backend 'eager'): {missing_reason}.", stacklevel=2)
