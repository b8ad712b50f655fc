"""Reference Transformers in plain PyTorch: what fastattn accelerates, and what the benchmarks and tests run."""

from models.needs import command_of, end_without

# The commands; `import models.gpt` needs torch alone.
if command_of("models"):
    end_without("rich", "safetensors", "tokenizers")
