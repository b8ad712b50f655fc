"""What an instruction names, in C++: registers, constants, addresses, places in memory."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ptx_to_cpp.parser import Instruction, Kernel, UnknownPtx, register_name, split_operands

CPP_TYPES = {
    **{f"{sign}{bits}": f"{'int' if sign == 's' else 'uint'}{bits}_t" for sign in "usb" for bits in (8, 16, 32, 64)},
    "f32": "float",
    "f64": "double",
    "pred": "bool",
}
SPECIAL_REGISTERS = {
    f"%{name}.{axis}": f"view().{member}.{axis}"
    for name, member in (
        ("tid", "thread_index"),
        ("ntid", "block_dim"),
        ("ctaid", "block_index"),
        ("nctaid", "grid_dim"),
    )
    for axis in "xyz"
} | {"%laneid": "lane()", "%cluster_ctarank": "cluster_rank()", "%cluster_nctarank": "cluster_blocks()"}

Suffixes = list[str]
Operands = list[str]
Statement = str | None  # in C++; None where the instruction is not known


def true_or_false(condition: object) -> str:
    return "true" if condition else "false"


class Writer:
    """Operands of one instruction after the other, in C++."""

    def __init__(self, kernel: Kernel):
        self.kernel = kernel
        self.here: Instruction

    def is_read(self, register: str) -> bool:
        """Whether a register is named by more than one instruction."""
        texts = (f"{each.guard} {each.operands}" for each in self.kernel.body if isinstance(each, Instruction))
        named = re.compile(re.escape(register) + r"(?!\w)")
        return sum(bool(named.search(text)) for text in texts) > 1

    @property
    def site(self) -> str:
        """The instruction, for the emulator's messages."""
        return f'at("{self.here.name}", {self.here.line})'

    def bits(self, operand: str) -> str:
        """An operand as an unsigned integer that holds its bits."""
        if operand in SPECIAL_REGISTERS:
            return SPECIAL_REGISTERS[operand]
        if register_name(operand, self.here.scope) in self.kernel.registers:
            return register_name(operand, self.here.scope)
        if operand in self.kernel.parameters:
            return f"reinterpret_cast<uint64_t>(parameters + {self.kernel.parameters[operand]})"
        if operand in self.kernel.shared:
            size, alignment = self.kernel.shared[operand]
            return f"static_address(&keys[{list(self.kernel.shared).index(operand)}], {size}, {alignment}, {self.site})"
        return self._literal(operand)

    def _literal(self, operand: str) -> str:
        if re.fullmatch(r"0[fF][0-9A-Fa-f]{8}", operand):
            return f"0x{operand[2:]}u"
        if re.fullmatch(r"0[dD][0-9A-Fa-f]{16}", operand):
            return f"0x{operand[2:]}ull"
        if re.fullmatch(r"-?(0[xX][0-9A-Fa-f]+|\d+)U?", operand):
            return f"0x{int(operand.rstrip('U'), 0) % 2**64:x}ull"
        if re.fullmatch(r"[A-Za-z_]\w*", operand):
            return "dynamic_address()"  # a kernel has one array without a size
        raise UnknownPtx(f"line {self.here.line}: operand {operand}")

    def value(self, operand: str, kind: str) -> str:
        """An operand as a number of a PTX type."""
        if kind == "pred":
            if operand in ("0", "1"):
                return true_or_false(operand == "1")
            return ("!" if operand.startswith("!") else "") + self.bits(operand.lstrip("!"))
        return f"as<{CPP_TYPES[kind]}>({self.bits(operand)})"

    def values(self, operands: Sequence[str], kind: str) -> str:
        return ", ".join(self.value(each, kind) for each in operands)

    def put(self, operand: str, value: str) -> str:
        """Writes a register; ``_`` takes anything."""
        return f"static_cast<void>({value});" if operand == "_" else f"put({self.bits(operand)}, {value});"

    def elements(self, operand: str) -> list[str]:
        """The registers of a vector, or the only one."""
        return split_operands(operand[1:-1]) if operand.startswith("{") else [operand]

    def array(self, name: str, operand: str, kind: str = "u32") -> str:
        """Declares a C++ array with a vector's values."""
        return f"{CPP_TYPES[kind]} {name}[] = {{{self.values(self.elements(operand), kind)}}};"

    def put_all(self, operand: str, name: str) -> str:
        return " ".join(self.put(each, f"{name}[{i}]") for i, each in enumerate(self.elements(operand)))

    def address(self, operand: str) -> str:
        """``[base+offset]`` as an integer."""
        found = re.fullmatch(r"\[ ?([%\w$]+)(?: ?\+ ?(-?\d+))? ?\]", operand)
        if found is None:
            raise UnknownPtx(f"line {self.here.line}: address {operand}")
        return f"{self.bits(found[1])} + ({found[2] or 0})"

    def shared(self, operand: str) -> str:
        return f"static_cast<uint32_t>({self.address(operand)})"

    def pointer(self, operand: str) -> str:
        return f"reinterpret_cast<uint8_t*>({self.address(operand)})"

    def place(self, space: str, operand: str, bytes_: str) -> str:
        """Where an access of so many bytes goes, as a pointer that has been checked."""
        if space == "shared":
            return f"shared_pointer({self.shared(operand)}, {bytes_}, {bytes_}, {self.site})"
        if space == "param":
            return self.pointer(operand)
        return f"aligned({self.pointer(operand)}, {bytes_}, {self.site})"
