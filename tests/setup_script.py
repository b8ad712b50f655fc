"""The module setup.py, which sets nothing up: what it would compile, and how."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType
from unittest import mock

from emulated import ROOT


def setup_script() -> ModuleType:
    """A module of its own for each call."""
    name = "fastattn_setup"
    spec = importlib.util.spec_from_file_location(name, ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Its dataclasses look themselves up by the module's name.
    with mock.patch("setuptools.setup"), mock.patch.dict(sys.modules, {name: module}):
        spec.loader.exec_module(module)
    return module
