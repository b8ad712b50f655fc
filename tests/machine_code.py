"""Whether machine code for Hopper leaves alone the registers that are not its own.

``wgmma`` reads the fragments of A and adds to its accumulators while the warp goes on. Until a wait includes it,
nothing else may read the accumulators or write to any of these registers (PTX ISA, wgmma.wait_group). In PTX a kernel
keeps to that, but ptxas decides which value is in which register, and releases of it gave those of A away too early
(Triton's pull request 11781 has an example of 12.9). ``setmaxnreg`` gives registers to other warps: those that a warp
has left are ptxas's to keep to, too. Neither shows before the machine code; here every path through it is followed.

    python tests/machine_code.py FILE ...

reads cubins and objects, with the disassembler that Triton's package carries.
"""

from __future__ import annotations

import argparse
import importlib.util
import multiprocessing
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

FAMILIES_OF_PRODUCTS = ("HGMMA", "IGMMA", "QGMMA")
REGISTERS = 256  # more than a thread can have
# Fragments of A: 64 rows of 32 bytes, over 128 threads.
REGISTERS_OF_A = 4
# Committed groups that are told apart; those before count as one.
GROUPS = 4

_INSTRUCTION = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+) )?([A-Z]\w*(?:\.\w+)*)\s*(.*?)\s*;")
_LABEL = re.compile(r"[.$][\w$]+")
_REGISTER = re.compile(r"(?<![A-Z])R(\d+)((?:\.\w+)*)")
_PREDICATE = re.compile(r"!?U?P(\d|T)")
# Their first registers are sources.
_WITHOUT_RESULT = re.compile(r"ST|RED|BAR|RET|CALL|BRX|JM|WARPSYNC|NANOSLEEP|FCHK|\w+SETP")


def _width(name: str) -> int:
    """The registers that an instruction moves a thread, by its suffixes."""
    family, *suffixes = name.split(".")
    if family in ("LDSM", "STSM"):
        return int(suffixes[-1]) if suffixes[-1].isdigit() else 1
    if "128" in suffixes:
        return 4
    doubled = {"64", "WIDE", "F64"} & {*suffixes} or family in ("CS2R", "DADD", "DMUL", "DFMA")
    return 2 if doubled else 1


@dataclass(frozen=True)
class Instruction:
    address: int
    predicate: str | None
    name: str
    text: str  # the operands

    def __str__(self) -> str:
        return f"{self.address:x}: {self.name} {self.text}"

    @cached_property
    def family(self) -> str:
        return self.name.split(".")[0]

    @cached_property
    def operands(self) -> list[str]:
        return [each.strip() for each in self.text.split(",")]

    @cached_property
    def targets(self) -> list[str]:
        """The labels of where it may jump."""
        if self.family not in ("BRA", "BRX", "CALL", "JMP", "JMX", "WARPSYNC"):
            return []
        found = _LABEL.findall(self.text.partition("BRANCH_TARGETS" if self.family == "BRX" else "(")[2])
        if not found and self.family != "WARPSYNC":
            raise NotImplementedError(f"{self}: where it jumps is not known")
        return found

    @cached_property
    def goes_on(self) -> bool:
        """Whether the next instruction may be the one behind it."""
        jumps = self.family in ("EXIT", "RET", "BRX") or (self.name == "BRA" and len(self.operands) == 1)
        return self.predicate is not None or not jumps

    @cached_property
    def is_product(self) -> bool:
        return self.family in FAMILIES_OF_PRODUCTS

    @cached_property
    def accumulators(self) -> frozenset[int]:
        """Of a product, whose name is like ``HGMMA.64x128x16.F32.BF16``: 128 threads share its 64 rows."""
        _, shape, accumulator = self.name.split(".")[:3]
        return _registers(self.operands[0], int(shape.split("x")[1]) // (4 if accumulator == "F16" else 2))

    @cached_property
    def fragments(self) -> frozenset[int]:
        """Of a product: the registers of A, if it is in registers."""
        return _registers(self.operands[1], REGISTERS_OF_A)

    @cached_property
    def _result(self) -> int | None:
        """Which operand is written: the first behind predicates, if it is a register."""
        if _WITHOUT_RESULT.match(self.family):
            return None
        at = next((i for i, each in enumerate(self.operands) if not _PREDICATE.fullmatch(each)), 0)
        return at if re.match(r"R\d", self.operands[at]) else None

    @cached_property
    def written(self) -> frozenset[int]:
        if self._result is None:
            return frozenset()
        return _registers(self.operands[self._result], _width(self.name))

    @cached_property
    def read(self) -> frozenset[int]:
        stored = _width(self.name) if self.family.startswith(("ST", "RED", "ATOM")) else 1
        found = set()
        for i, operand in enumerate(self.operands):
            if i != self._result:
                found |= _registers(operand, 1 if "[" in operand else stored)
        return frozenset(found)


def _registers(operand: str, count: int) -> frozenset[int]:
    """Those that an operand begins at, ``count`` of them, or two where it says so."""
    found = set()
    for first, suffixes in _REGISTER.findall(operand):
        found |= set(range(int(first), int(first) + (2 if ".64" in suffixes else count)))
    return frozenset(found)


@dataclass(frozen=True)
class InFlight:
    """A register that a product uses."""

    register: int
    accumulates: bool
    product: int  # its address


@dataclass(frozen=True)
class State:
    """What may be so before an instruction, whichever way led there."""

    # Of the products that were not committed yet, then of the last committed group, and so on.
    groups: tuple[frozenset[InFlight], ...] = (frozenset(),) * (GROUPS + 1)
    registers: int = REGISTERS  # a thread has at least so many

    @cached_property
    def in_flight(self) -> frozenset[InFlight]:
        return frozenset[InFlight]().union(*self.groups)

    @cached_property
    def busy(self) -> frozenset[int]:
        """The registers that products in flight use."""
        return frozenset(each.register for each in self.in_flight)

    def merged(self, other: State) -> State:
        # Straight on, states stay one object: what it knows of itself is worked out once.
        groups = (b if a <= b else a | b for a, b in zip(self.groups, other.groups, strict=True))
        merged = State(tuple(groups), min(self.registers, other.registers))
        return other if merged == other else merged

    def after(self, here: Instruction) -> State:
        if here.is_product:
            used = {InFlight(each, True, here.address) for each in here.accumulators}
            used |= {InFlight(each, False, here.address) for each in here.fragments}
            opened = self.groups[0] | used
            if "gsb0" not in here.operands:  # commits the group
                return State((opened, *self.groups[1:]), self.registers)
            oldest = self.groups[-2] | self.groups[-1]
            return State((frozenset(), opened, *self.groups[1:-2], oldest), self.registers)
        if here.name == "WARPGROUP.DEPBAR.LE":
            left = int(here.operands[1], 16)
            groups = (group if i <= left else frozenset() for i, group in enumerate(self.groups))
            return State(tuple(groups), self.registers)
        if here.family == "USETMAXREG":
            return State(self.groups, int(here.operands[-1], 16))
        return self


@dataclass
class Kernel:
    name: str
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)  # -> which instruction

    @property
    def products(self) -> int:
        return sum(each.is_product for each in self.instructions)

    def faults(self) -> list[str]:
        """Instructions that touch registers which are not theirs, each with the reason."""
        states = self._states()
        return [f"{here} {why}" for here, state in zip(self.instructions, states, strict=True)
                if state is not None and (why := _fault(here, state))]  # fmt: skip

    def _states(self) -> list[State | None]:
        """Before each instruction; None if it cannot be reached."""
        states: list[State | None] = [None] * len(self.instructions)
        states[0], waiting = State(), [0]
        while waiting:
            at = waiting.pop()
            here = self.instructions[at]
            after = states[at].after(here)
            following_ones = [self.labels[each] for each in here.targets]
            if here.goes_on and at + 1 < len(states):
                following_ones.append(at + 1)
            for following in following_ones:
                before = states[following]
                merged = after if before is None else before.merged(after)
                if merged != before:
                    states[following] = merged
                    waiting.append(following)
        return states


def _fault(here: Instruction, state: State) -> str | None:
    if here.is_product:
        # Products are in order among themselves: those that add to the same accumulators need no wait.
        touched = here.accumulators | here.fragments
        written, read = here.accumulators, here.fragments
    else:
        touched, written, read = here.written | here.read, here.written, here.read
    if touched and max(touched) >= state.registers:
        return f"uses R{max(touched)} of {state.registers} registers"
    if state.busy.isdisjoint(touched):
        return None
    for each in state.in_flight:
        chained = here.is_product and each.accumulates
        if (each.register in written and not chained) or (each.register in read and each.accumulates):
            purpose = "adds to" if each.accumulates else "reads"
            return f"touches R{each.register}, which the product at {each.product:x} still {purpose}"
    return None


def kernels(listing: str) -> Iterator[Kernel]:
    """Those in what ``nvdisasm -c`` prints."""
    kernel = None
    for line in listing.splitlines():
        if found := re.fullmatch(r"\.text\.(\S+):", line):
            if kernel is not None:
                yield kernel
            kernel = Kernel(found[1])
        elif kernel is not None and (found := _INSTRUCTION.match(line)):
            kernel.instructions.append(Instruction(int(found[1], 16), found[2], found[3], found[4]))
        elif kernel is not None and re.fullmatch(r"[.$]\S+:", line):
            kernel.labels[line[:-1]] = len(kernel.instructions)
    if kernel is not None:
        yield kernel


def tool(name: str) -> Path | None:
    """Of those in Triton's package."""
    triton = importlib.util.find_spec("triton")
    path = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / name if triton else None
    return path if path is not None and path.exists() else None


def listing_of(file: Path) -> str:
    """Of a cubin, or of all those in an object."""
    if file.suffix == ".cubin":
        return subprocess.run([tool("nvdisasm"), "-c", file], capture_output=True, text=True, check=True).stdout
    with tempfile.TemporaryDirectory() as folder:
        extract = [tool("cuobjdump"), "-xelf", "all", file.resolve()]
        subprocess.run(extract, cwd=folder, capture_output=True, check=True)
        return "".join(listing_of(each) for each in sorted(Path(folder).glob("*.cubin")))


@dataclass
class Report:
    """Of some files: how much there was to look at, and what was found."""

    kernels: int = 0
    products: int = 0
    faults: list[str] = field(default_factory=list)

    def __add__(self, other: Report) -> Report:
        return Report(self.kernels + other.kernels, self.products + other.products, self.faults + other.faults)

    def __str__(self) -> str:
        return (f"{self.kernels} kernels with {self.products} wgmma: {len(self.faults)} instructions touch registers "
                "that are not theirs")  # fmt: skip


def report_on(file: Path) -> Report:
    report = Report()
    for kernel in kernels(listing_of(file)):
        report.kernels += 1
        report.products += kernel.products
        report.faults += [f"{kernel.name}: {fault}" for fault in kernel.faults()]
    return report


def report_on_all(files: Sequence[Path]) -> Report:
    with multiprocessing.Pool() as pool:
        return sum(pool.map(report_on, files, chunksize=1), Report())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    report = report_on_all(parser.parse_args().files)
    print(*report.faults, report, sep="\n")
    return 1 if report.faults or not report.kernels else 0


if __name__ == "__main__":
    raise SystemExit(main())
