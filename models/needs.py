"""The packages that a command needs besides torch."""

from __future__ import annotations

import io
import signal
import sys
from importlib.util import find_spec


def command_of(package: str) -> str | None:
    """The module of ``package`` that ``python -m`` is about to run, while it imports the packages that hold it: Python
    tells that moment by ``sys.argv[0]``. None at any other import."""
    if sys.argv[:1] != ["-m"]:
        return None
    return next((word for word in sys.orig_argv if word == package or word.startswith(f"{package}.")), None)


def print_what_fits(errors: str) -> None:
    """Has standard output write characters that its encoding lacks as ``errors`` says ("replace": question marks,
    "backslashreplace": their numbers) instead of ending the command: a terminal's locale may be an old one."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors=errors)


def let_interrupts_kill() -> None:
    """Has Ctrl-C end the process without a traceback while torch is imported, for some seconds; the command that is
    then run calls ``let_interrupts_raise``."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def let_interrupts_raise() -> None:
    """Has Ctrl-C raise KeyboardInterrupt again, unless whoever started the process has it ignored."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def end_without(*packages: str) -> None:
    """Ends the process with one line and exit status 2 unless ``packages`` are installed."""
    missing = " ".join(package for package in packages if find_spec(package) is None)
    if missing:
        print(f"error: this command needs what is not installed here: pip install {missing}", file=sys.stderr)
        raise SystemExit(2)
