"""Benchmarks: ``python -m bench`` checks every kernel's answer, then times it beside the strongest form PyTorch has."""
