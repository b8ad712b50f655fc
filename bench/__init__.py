"""Benchmarks: ``python -m bench`` checks every kernel's answer, then times it beside the strongest form PyTorch has."""

from models.needs import command_of, end_without, let_interrupts_kill, print_what_fits

if command_of("bench"):
    # Columns stay where they are.
    print_what_fits("replace")
# `python -m bench.gpu` has stages that need neither, and tells of those that do.
if command_of("bench") not in (None, "bench.gpu"):
    end_without("rich", "typer")
    let_interrupts_kill()
