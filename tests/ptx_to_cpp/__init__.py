"""From PTX to C++ for the emulator: what nvcc made of a kernel runs without a GPU.

A kernel becomes a function of its parameters' bytes, an instruction a statement. What a thread does alone is plain C++
(csrc/emulator/compiled.h); what concerns others goes to the emulator (csrc/emulator/instructions.h), as the wrappers of
csrc/common/ptx*.cuh do when the C++ compiler compiles a kernel. So the tests of kernels reach the text of every ``asm``
statement, what only nvcc sees of the sources, and nvcc's own work.

An instruction that is not known, in every suffix and operand, is an error.
"""

from __future__ import annotations

from collections.abc import Mapping

from ptx_to_cpp.cooperation import Cooperation
from ptx_to_cpp.parser import Instruction, Kernel, Label, UnknownPtx, entry_names, label_name, parse
from ptx_to_cpp.thread import Arithmetic, Memory
from ptx_to_cpp.writer import Operands, Statement, Suffixes

__all__ = ["UnknownPtx", "entry_names", "translate"]


class Translator(Arithmetic, Memory, Cooperation):
    """One kernel."""

    def statement(self, instruction: Instruction) -> str:
        self.here = instruction
        base = instruction.name.split(".")[0]
        method = getattr(self, f"do_{base}", None)
        code = self.arithmetic() or self.by_table()
        if code is None and method is not None:
            code = method(instruction.suffixes, instruction.operands)
        if code is None:
            raise UnknownPtx(f"line {instruction.line}: {instruction.name} {', '.join(instruction.operands)}")
        if not instruction.guard:
            return code
        return f"if ({self.value(instruction.guard, 'pred')}) {{ {code} }}"

    def do_bra(self, suffixes: Suffixes, operands: Operands) -> Statement:
        return f"goto {label_name(operands[0], self.here.scope)};" if suffixes in ([], ["uni"]) else None

    def do_ret(self, suffixes: Suffixes, operands: Operands) -> Statement:
        return None if suffixes else "return;"

    def function(self, symbol: str) -> str:
        """``void symbol(uint8_t* parameters)``. Registers start as NaN or -1: what nobody has written."""
        lines = [f"static const char {symbol}_keys[{len(self.kernel.shared) + 1}] = {{}};",
                 f'extern "C" __attribute__((visibility("default"))) void {symbol}(uint8_t* parameters) {{',
                 "  static_cast<void>(parameters);", f"  const auto& keys = {symbol}_keys;",
                 "  static_cast<void>(keys);"]  # fmt: skip
        for name, kind in self.kernel.registers.items():
            lines.append(f"  {kind} {name} = {'false' if kind == 'bool' else f'static_cast<{kind}>(-1)'};")
        for each in self.kernel.body:
            lines.append(f"{each.name}:" if isinstance(each, Label) else f"  {self.statement(each)}")
        return "\n".join([*lines, "  ;", "}"])


def translate(text: str, symbols: Mapping[str, str]) -> tuple[str, dict[str, Kernel]]:
    """The C++ source of those kernels of a PTX file that have a symbol, as functions of that name, and the kernels."""
    kernels = parse(text, lambda name: name in symbols)
    header = (
        '#include "emulator/compiled.h"\n\nusing namespace fastattn::emu;\nusing namespace fastattn::emu::compiled;\n'
    )
    functions = [Translator(kernel).function(symbols[kernel.name]) for kernel in kernels]
    return "\n".join([header, *functions, ""]), {kernel.name: kernel for kernel in kernels}
