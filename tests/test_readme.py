"""README says what is true: its examples run, and its tables are those of the backend table and of bench/results."""

from __future__ import annotations

import re

import pytest

from bench import readme
from fastattn import _extension, _triton

EXAMPLES = re.findall(r"```python\n(.*?)```", readme.README.read_text(), re.DOTALL)


@pytest.mark.parametrize("example", EXAMPLES, ids=range(len(EXAMPLES)))
def test_example_runs(example):
    exec(compile(example, "README.md", "exec"), {})


@pytest.mark.skipif(_extension.extension is None, reason=f"the explanation differs: {_extension.missing_reason}")
def test_generated_parts_are_up_to_date(monkeypatch):
    # README shows what a user sees, whose Triton is not interpreted.
    monkeypatch.setattr(_triton, "_INTERPRETED", False)
    text = readme.README.read_text()
    assert readme.render(text) == text
