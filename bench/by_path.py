"""What a file of cases does when it is run: `python bench/bench_attention.py …` is `python -m bench attention …`.

Run by `runpy.run_path`: a file started by its path cannot import this one.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

started = Path(sys.modules["__main__"].__file__ or "").resolve()
group = started.stem.removeprefix("bench_")

sys.path[0] = str(started.parents[1])  # Python puts the file's own folder there, which hides the package `bench`.
from models.needs import let_interrupts_kill, print_what_fits  # noqa: E402

print_what_fits("replace")
let_interrupts_kill()
sys.argv = [str(started), group, *sys.argv[1:]]
runpy.run_module("bench", run_name="__main__")
