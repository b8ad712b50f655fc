"""A stamp of what Python and the compiled extension must agree on. setup.py runs this file too: it imports no torch."""

from __future__ import annotations

import hashlib
from pathlib import Path


def interface_stamp(csrc: Path) -> str:
    """Of the files that say what Python may call: the schemas of the ops, and the functions of ``fastattn._C``."""
    files = [file for name in ("ops.cpp", "bindings.cpp", "*/*_bindings.cpp") for file in sorted(csrc.glob(name))]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]
