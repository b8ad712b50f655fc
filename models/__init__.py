"""Reference Transformers in plain PyTorch: what fastattn accelerates, and what the benchmarks and tests run."""
