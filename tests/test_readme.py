"""README says what is true: its examples run, and its tables are those of the backend table and of bench/results. The
files that it and its sisters name exist."""

from __future__ import annotations

import re

import pytest
import torch

from bench import readme
from fastattn import _extension, _triton

EXAMPLES = re.findall(r"```python\n(.*?)```", readme.README.read_text(), re.DOTALL)


@pytest.mark.parametrize("example", EXAMPLES, ids=range(len(EXAMPLES)))
def test_example_runs(example):
    exec(compile(example, "README.md", "exec"), {})


@pytest.mark.skipif(_extension.extension is None, reason=f"the explanation differs: {_extension.missing_reason}")
def test_generated_parts_are_up_to_date(monkeypatch):
    # README shows what a user sees, whose Triton is not interpreted, with PyTorch for the CPU: so it is here, too.
    monkeypatch.setattr(_triton, "_INTERPRETED", False)
    monkeypatch.setattr(_triton, "_known_gpu_reason", [])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    reason = "fastattn was built without CUDA kernels: this torch was built without CUDA"
    monkeypatch.setattr(_extension, "without_cuda_reason", reason)
    text = readme.README.read_text()
    assert readme.render(text) == text


FOLDERS = ("csrc", "fastattn", "models", "bench", "tests")
PAGES = [*readme.ROOT.glob("*.md"), *(page for folder in FOLDERS for page in (readme.ROOT / folder).rglob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(readme.ROOT)))
def test_named_files_exist(page):
    """Links, and names of sources in backticks: by path, or by the file's name alone."""
    text = page.read_text()
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if not link.startswith("http")]
    assert [link for link in links if not (page.parent / link).exists()] == []
    sources = {path for folder in FOLDERS for path in (readme.ROOT / folder).rglob("*") if path.is_file()}
    known = {f"/{path.relative_to(readme.ROOT)}" for path in sources} | {
        f"/{path.name}" for path in readme.ROOT.iterdir()
    }
    named = re.findall(r"`([\w./]+\.(?:py|cpp|cuh|cu|h|sh|md))`", text)
    assert named or links or page.name == "CHANGELOG.md"
    assert [name for name in named if not any(path.endswith(f"/{name}") for path in known)] == []
