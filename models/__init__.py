"""Reference Transformers in plain PyTorch: what fastattn accelerates, and what the benchmarks and tests run."""

from models.needs import command_of, end_without, let_interrupts_kill, print_what_fits

# The commands; `import models.gpt` needs torch alone.
if command_of("models"):
    end_without("rich", "safetensors", "tokenizers")
    # Texts that are written to a file lose nothing.
    print_what_fits("backslashreplace")
    let_interrupts_kill()
