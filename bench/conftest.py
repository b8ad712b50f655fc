"""Options of ``pytest bench``."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--bench-all", action="store_true", help="every case of python -m bench, not only the quick ones")
    parser.addoption("--bench-backend", default="cpu", help="whose kernels to time")
