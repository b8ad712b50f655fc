"""Reads PTX as nvcc and Triton write it (PTX ISA, "Syntax"): kernels, what they declare, their instructions."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

# What holds the bits of a register of each type.
REGISTER_TYPES = {
    "pred": "bool",
    **dict.fromkeys(("b16", "u16", "s16", "f16"), "uint16_t"),
    **dict.fromkeys(("b32", "u32", "s32", "f32"), "uint32_t"),
    **dict.fromkeys(("b64", "u64", "s64", "f64"), "uint64_t"),
}


class UnknownPtx(ValueError):
    """PTX that is not read, or not translated: it is never left out."""


@dataclass(frozen=True)
class Instruction:
    """``@guard name operands;``"""

    guard: str  # "", "%p1" or "!%p1"
    name: str  # with all its suffixes
    operands: list[str]
    line: int  # in the file
    scope: int  # which braces it stands in: names without % are known there alone

    @property
    def suffixes(self) -> list[str]:
        return self.name.split(".")[1:]


@dataclass(frozen=True)
class Label:
    """A place to branch to, by its C++ name."""

    name: str


@dataclass
class Kernel:
    """An entry point."""

    name: str
    parameters: dict[str, int] = field(default_factory=dict)  # where each starts, in bytes
    parameter_bytes: int = 0
    registers: dict[str, str] = field(default_factory=dict)  # C++ types by C++ names
    shared: dict[str, tuple[int, int]] = field(default_factory=dict)  # static arrays: bytes, alignment
    body: list[Instruction | Label] = field(default_factory=list)


def split_operands(text: str) -> list[str]:
    """``"{%f1, %f2}, [%r1], 3"`` -> ``["{%f1, %f2}", "[%r1]", "3"]``"""
    parts, depth, start = [], 0, 0
    for i, character in enumerate(text):
        depth += (character in "{[") - (character in "}]")
        if character == "," and depth == 0:
            parts.append(text[start:i].strip())
            start = i + 1
    last = text[start:].strip()
    return [*parts, last] if last else parts


def register_name(name: str, scope: int) -> str:
    """What a register is called in C++: ``%r1`` -> ``r1``; names of an asm statement belong to its braces."""
    return name[1:] if name.startswith("%") else f"{name}_{scope}"


def label_name(name: str, scope: int) -> str:
    return name.replace("$", "") if name.startswith("$") else f"{name}_{scope}"


# A brace, a label, a directive that ends with its line, or a statement that ends with a semicolon.
_TOKEN = re.compile(r"\s*(?:([{}])|([$\w]+:)(?!:)|(\.(?:loc|pragma)[^\n]*)|([^;]+);)")
_ENTRY = re.compile(r"\.entry (\w+)\(\s*(.*?)\)\s*(?:\.\w+[^\n{]*\s*)*\{", re.S)
_PARAMETER = re.compile(r"\.param(?: \.align (\d+))? \.(\w+)(?: \.ptr \.\w+ \.align \d+)? (\w+)(?:\[(\d+)\])?")
_SHARED = re.compile(r"\.shared \.align (\d+) \.(\w+) ([\w$]+)(?:\[(\d+)\])?")
_INSTRUCTION = re.compile(r"(?:@(!?[%\w]+) )?([\w.:]+)(?: (.*))?")


def _bytes(kind: str) -> int:
    return int(kind[1:]) // 8


def _tokens(text: str, line: int) -> Iterator[tuple[str, int]]:
    text, position = text.rstrip(), 0
    while position < len(text):
        found = _TOKEN.match(text, position)
        if found is None:
            raise UnknownPtx(f"line {line}: {text[position : position + 80]!r}")
        start = found.start(found.lastindex or 0)
        line += text.count("\n", position, start)
        yield re.sub(r"\s+", " ", found[found.lastindex or 0]).strip(), line
        line += text.count("\n", start, found.end())
        position = found.end()


def _end_of_body(text: str, start: int) -> int:
    depth = 1
    for brace in re.compile(r"[{}]").finditer(text, start):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return brace.start()
    raise UnknownPtx("a body without an end")


def _read_parameters(kernel: Kernel, text: str) -> None:
    end = 0
    for align, kind, name, count in _PARAMETER.findall(text):
        alignment = int(align or _bytes(kind))
        kernel.parameters[name] = -(-end // alignment) * alignment
        end = kernel.parameters[name] + _bytes(kind) * int(count or 1)
    kernel.parameter_bytes = end


def _declare_registers(kernel: Kernel, statement: str, scope: int) -> None:
    kind, *names = re.split(r",? ", statement.removeprefix(".reg ."))
    for name in names:
        several = re.fullmatch(r"%(\w+)<(\d+)>", name)
        if several:
            kernel.registers |= {f"{several[1]}{i}": REGISTER_TYPES[kind] for i in range(1, int(several[2]))}
        else:
            kernel.registers[register_name(name, scope)] = REGISTER_TYPES[kind]


def _declare_shared(kernel: Kernel, statement: str) -> None:
    found = _SHARED.fullmatch(statement)
    if found is None:
        raise UnknownPtx(statement)
    align, kind, name, count = found.groups()
    kernel.shared[name] = (int(count or 1) * _bytes(kind), int(align))


def _read_body(kernel: Kernel, text: str, first_line: int) -> None:
    scopes, opened = [0], 0
    for token, line in _tokens(text, first_line):
        if token == "{":
            opened += 1
            scopes.append(opened)
        elif token == "}":
            scopes.pop()
        elif token.endswith(":"):
            kernel.body.append(Label(label_name(token[:-1], scopes[-1])))
        elif token.startswith(".reg "):
            _declare_registers(kernel, re.sub(r",(?=\S)", ", ", token), scopes[-1])
        elif token.startswith(".shared "):
            _declare_shared(kernel, token)
        elif not token.startswith((".loc", ".pragma")):
            found = _INSTRUCTION.fullmatch(token)
            if found is None:
                raise UnknownPtx(f"line {line}: {token}")
            operands = split_operands(found[3] or "")
            kernel.body.append(Instruction(found[1] or "", found[2], operands, line, scopes[-1]))


def entry_names(text: str) -> list[str]:
    return [found[1] for found in _ENTRY.finditer(text)]


def parse(text: str, wanted: Callable[[str], bool] = lambda name: True) -> list[Kernel]:
    """The kernels of a PTX file whose (mangled) names are ``wanted``."""
    text = re.sub(r"//[^\n]*", "", text)
    kernels = []
    for found in _ENTRY.finditer(text):
        if not wanted(found[1]):
            continue
        kernel = Kernel(found[1])
        _read_parameters(kernel, found[2])
        body = text[found.end() : _end_of_body(text, found.end())]
        _read_body(kernel, body, text.count("\n", 0, found.end()) + 1)
        kernels.append(kernel)
    return kernels
