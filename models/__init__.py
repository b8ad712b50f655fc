"""Reference Transformers in plain PyTorch: what fastattn accelerates, and what the benchmarks and tests run."""

import signal

from models.needs import command_of, end_without, print_what_fits

# The commands; `import models.gpt` needs torch alone.
if command_of("models"):
    end_without("rich", "safetensors", "tokenizers")
    # Texts that are written to a file lose nothing.
    print_what_fits("backslashreplace")
    # While torch is imported, for some seconds, Ctrl-C ends the process without a traceback; `commands.run` takes over.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
