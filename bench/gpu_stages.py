"""A stage of ``make gpu``: one command, its log, its limits, and what is done when it hangs."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
POLL_S = 0.2
# A process that waits in the driver for a device that does not answer outlives even SIGKILL: it is left behind.
KILL_S = 10
# What a command may exit with that has done its work; whatever else (a signal, a lost device) is worth going on after.
FINISHED = (0, 1, 2)


def missing(module: str) -> str | None:
    """Why a stage that needs ``module`` cannot run here."""
    return None if importlib.util.find_spec(module) is not None else f"{module} is not installed"


@dataclass
class Stage:
    name: str
    command: list[str]
    limit_s: float
    needs: tuple[str, ...] = ()
    grace_s: float = 0.0  # to write its report in, once interrupted
    stall_s: float | None = None  # without a word for so long, it hangs
    again: list[str] | None = None  # the arguments that let the command go on where it was ended
    seconds: float = 0.0
    outcome: str = "not run"
    last_line: str = ""
    attempts: list[str] = field(default_factory=list)  # how each ended that was gone on from

    def run(self, log: Path, environment: dict[str, str]) -> bool:
        """Runs the command, its output in ``log`` and on the terminal; True if it succeeded within its time."""
        print(f"== {self.name}: {' '.join(self.command)}", flush=True)
        start = time.monotonic()
        reasons = [reason for reason in map(missing, self.needs) if reason is not None]
        with log.open("a") as file:
            file.write(f"== {self.name}: {' '.join(self.command)}\n")
            file.flush()
            at = file.tell()
            if reasons:
                self.outcome = f"not run: {', '.join(reasons)}"
            else:
                code = self._attempt(self.command, file, environment, start)
                while self.again is not None and code not in FINISHED and self._time_left(start) > 5:
                    self.attempts.append(self.outcome)
                    file.write(f"== {self.name}: {self.outcome}; going on\n")
                    file.flush()
                    code = self._attempt([*self.command, *self.again], file, environment, start)
            file.write(f"== {self.name}: {self.outcome}\n")
        self.seconds = time.monotonic() - start
        output = log.read_bytes()[at:].decode(errors="replace").rstrip().splitlines()[:-1]
        self.last_line = output[-1] if output else ""
        print("\n".join([*output[-40:], f"== {self.name}: {self.outcome}, {self.seconds:.0f} s\n"]), flush=True)
        return self.outcome == "ok"

    def _time_left(self, start: float) -> float:
        return start + self.limit_s - time.monotonic()

    def _attempt(self, command: list[str], file, environment: dict[str, str], start: float) -> int | None:
        """The exit status, None if the command was ended here; ``outcome`` says in words."""
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT,
                                   stdin=subprocess.DEVNULL, start_new_session=True,
                                   preexec_fn=_hear_ctrl_c)  # fmt: skip
        try:
            return self._watch(process, file, start)
        except KeyboardInterrupt:
            self.outcome = "interrupted"
            self._end(process)
            raise

    def _watch(self, process: subprocess.Popen, file, start: float) -> int | None:
        size, heard = -1, time.monotonic()
        while process.poll() is None:
            now, grown = time.monotonic(), os.fstat(file.fileno()).st_size
            if grown != size:
                size, heard = grown, now
            if self._time_left(start) < 0:
                self.outcome = f"stopped after {self.limit_s:.0f} s"
            elif self.stall_s is not None and now - heard > self.stall_s:
                self.outcome = f"stopped, having said nothing for {self.stall_s:.0f} s"
            else:
                time.sleep(POLL_S)
                continue
            self._end(process)
            return None
        self.outcome = "ok" if process.returncode == 0 else f"failed ({process.returncode})"
        return process.returncode

    def _end(self, process: subprocess.Popen) -> None:
        """As Ctrl-C does, upon which pytest writes its report; then with all its children."""
        if self.grace_s > 0:
            process.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                process.wait(self.grace_s)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        try:
            process.wait(KILL_S)
        except subprocess.TimeoutExpired:
            self.outcome += "; it cannot be killed"


def answer(command: list[str], limit_s: float) -> subprocess.CompletedProcess | None:
    """What a command that takes a moment says; None if it is not there or has not ended after ``limit_s``, whether it
    can be killed or not."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        try:
            process = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=err, stdin=subprocess.DEVNULL)
            code = process.wait(limit_s)
        except OSError:
            return None
        except subprocess.TimeoutExpired:
            process.kill()
            return None
        out.seek(0)
        err.seek(0)
        return subprocess.CompletedProcess(command, code, out.read(), err.read())


def _hear_ctrl_c() -> None:
    """A shell starts what runs in the background deaf to SIGINT, and children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
