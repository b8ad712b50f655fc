"""Instructions of one thread alone: arithmetic, loads and stores."""

from __future__ import annotations

import re
from typing import ClassVar

from ptx_to_cpp.writer import CPP_TYPES, Operands, Statement, Suffixes, Writer


def _doubled(kind: str) -> str:
    """The type of twice as many bits."""
    return f"{kind[0]}{2 * int(kind[1:])}"


class Arithmetic(Writer):
    """Instructions of one thread that leave memory alone."""

    # By name: the roundings that are known, and the function of compiled.h.
    PLAIN: ClassVar = {
        **{name: [[]] for name in ("min", "max", "neg", "abs", "and", "or", "xor", "not", "rem", "brev", "popc")},
        **{name: [[], ["rn"]] for name in ("add", "sub", "div")},
        **{"bfe": [[]], "bfi": [[]], "rcp": [["rn"]], "sqrt": [["rn"]], "fma": [["rn"], ["rm"]]},
        "mul": [[], ["lo"], ["rn"]],
    }
    APPROXIMATE: ClassVar = {
        "ex2.approx.f32": "ex2_approx_of_denormals",
        "ex2.approx.ftz.f32": "ex2_approx",
        "lg2.approx.ftz.f32": "lg2_approx",
        "rcp.approx.ftz.f32": "rcp_approx",
        "tanh.approx.f32": "tanh_approx",
        "rsqrt.approx.f32": "1.0f / std::sqrt",
        "cvt.sat.f32.f32": "saturate",
    }
    # The function, and the type of its operands.
    BY_NAME: ClassVar = {
        "dp4a.s32.s32": ("dp4a", "s32"),
        "prmt.b32": ("prmt", "b32"),
        "bfind.shiftamt.u32": ("bfind_shiftamt", "u32"),
        "mul.hi.s32": ("high_product<int64_t>", "s32"),
        "mul.hi.u32": ("high_product<uint64_t>", "u32"),
        "div.full.f32": ("div_full", "f32"),
        "mul.hi.u16": ("high_product<uint32_t>", "u16"),
        "max.relu.s32": ("max_relu", "s32"),
        "add.f16": ("add_half", "b16"),
        "add.f16x2": ("add_pairs<add_half>", "b32"),
        "add.bf16x2": ("add_pairs<add_bfloat16>", "b32"),
        "fma.rn.f16": ("fma_half", "b16"),
        "fma.rn.bf16": ("fma_bfloat16", "b16"),
        "abs.bf16x2": ("0x7FFF7FFFu & ", "b32"),
    }

    def arithmetic(self) -> Statement:
        name, suffixes, operands = self.here.name, self.here.suffixes, self.here.operands
        base = name.split(".")[0]
        if name in self.APPROXIMATE:
            return self.put(operands[0], f"{self.APPROXIMATE[name]}({self.value(operands[1], 'f32')})")
        if name in self.BY_NAME:
            function, kind = self.BY_NAME[name]
            return self.put(operands[0], f"{function}({self.values(operands[1:], kind)})")
        *modes, kind = [each for each in suffixes if each != "ftz"] or [""]
        if modes in self.PLAIN.get(base, []) and kind in CPP_TYPES:
            function = f"op_{'_'.join([base, *modes] if base == 'fma' else [base])}"
            if "ftz" not in suffixes:
                return self.put(operands[0], f"{function}({self.values(operands[1:], kind)})")
            flushed = ", ".join(f"flush_denormal({self.value(each, kind)})" for each in operands[1:])
            return self.put(operands[0], f"flush_denormal({function}({flushed}))") if kind == "f32" else None
        return None

    def do_shl(self, suffixes: Suffixes, operands: Operands) -> Statement:
        return self.put(
            operands[0], f"op_shl({self.value(operands[1], suffixes[-1])}, {self.value(operands[2], 'u32')})"
        )

    def do_shr(self, suffixes: Suffixes, operands: Operands) -> Statement:
        return self.put(
            operands[0], f"op_shr({self.value(operands[1], suffixes[-1])}, {self.value(operands[2], 'u32')})"
        )

    def do_mul(self, suffixes: Suffixes, operands: Operands) -> Statement:
        if suffixes[0] != "wide":
            return None
        return self.put(operands[0], self._wide_product(suffixes[1], operands[1:]))

    def do_mad(self, suffixes: Suffixes, operands: Operands) -> Statement:
        if suffixes[0] == "wide":
            c = self.value(operands[3], _doubled(suffixes[1]))
            return self.put(operands[0], f"op_add({self._wide_product(suffixes[1], operands[1:3])}, {c})")
        if suffixes[0] != "lo":
            return None
        a, b, c = (self.value(each, suffixes[1]) for each in operands[1:])
        return self.put(operands[0], f"op_add(op_mul({a}, {b}), {c})")

    def _wide_product(self, kind: str, factors: Operands) -> str:
        a, b = (f"{CPP_TYPES[_doubled(kind)]}({self.value(each, kind)})" for each in factors)
        return f"{a} * {b}"

    def do_setp(self, suffixes: Suffixes, operands: Operands) -> Statement:
        if len(suffixes) != 2 or len(operands) != 3:
            return None
        return self.put(operands[0], f"compare_{suffixes[0]}({self.values(operands[1:], suffixes[1])})")

    def do_selp(self, suffixes: Suffixes, operands: Operands) -> Statement:
        a, b = (self.value(each, suffixes[0]) for each in operands[1:3])
        return self.put(operands[0], f"{self.value(operands[3], 'pred')} ? {a} : {b}")

    def do_mov(self, suffixes: Suffixes, operands: Operands) -> Statement:
        target, source = operands
        if target.startswith("{"):
            return self._unpack(suffixes[0], target, source)
        if source.startswith("{"):
            return self._pack(suffixes[0], target, source)
        return self.put(target, self.value(source, suffixes[0]))

    def _unpack(self, kind: str, target: str, source: str) -> str:
        parts = self.elements(target)
        width = int(kind[1:]) // len(parts)
        bits = f"as<{CPP_TYPES[kind]}>({self.bits(source)})"
        part = CPP_TYPES[f"b{width}"]
        return " ".join(self.put(each, f"static_cast<{part}>({bits} >> {i * width})") for i, each in enumerate(parts))

    def _pack(self, kind: str, target: str, source: str) -> str:
        parts = self.elements(source)
        width, whole = int(kind[1:]) // len(parts), CPP_TYPES[kind]
        values = (f"{whole}({self.value(each, f'b{width}')}) << {i * width}" for i, each in enumerate(parts))
        return self.put(target, f"static_cast<{whole}>({' | '.join(values)})")

    def do_cvt(self, suffixes: Suffixes, operands: Operands) -> Statement:
        *modes, to, source = suffixes
        conversion = ".".join(suffixes)
        pairs = {"rn.f16x2.f32": "__floats2half2_rn", "rn.bf16x2.f32": "__floats2bfloat162_rn"}
        if conversion in pairs:
            high, low = operands[1:]  # in this order
            return self.put(operands[0], f"{pairs[conversion]}({self.values([low, high], 'f32')})")
        narrow = {"rn.f16.f32": ("__float2half_rn", "f32"), "rn.bf16.f32": ("__float2bfloat16_rn", "f32"),
                  "f32.f16": ("half_to_float", "b16"), "f32.bf16": ("bfloat16_to_float", "b16")}  # fmt: skip
        if conversion in narrow:
            function, kind = narrow[conversion]
            return self.put(operands[0], f"{function}({self.value(operands[1], kind)})")
        if to not in CPP_TYPES or source not in CPP_TYPES:
            return None
        value, integers = self.value(operands[1], source), "us"
        if to[0] in integers and source[0] == "f" and modes in (["rni"], ["rzi"]):
            return self.put(operands[0], f"to_integer<{CPP_TYPES[to]}>(op_{modes[0]}({value}))")
        exact = (to[0] in integers and source[0] in integers) or (to, source) == ("f64", "f32")
        rounded = to[0] == "f" and (source[0] in integers or (to, source) == ("f32", "f64"))
        if (exact and not modes) or (rounded and modes == ["rn"]):
            return self.put(operands[0], f"static_cast<{CPP_TYPES[to]}>({value})")
        return None

    def do_cvta(self, suffixes: Suffixes, operands: Operands) -> Statement:
        value = self.value(operands[1], "u64")
        values = {"shared": f"generic_address({value}, {self.site})", "to.shared": f"to_shared({value}, {self.site})",
                  **dict.fromkeys(("global", "to.global", "param", "to.param"), value)}  # fmt: skip
        space = ".".join(suffixes[:-1])
        return self.put(operands[0], values[space]) if space in values and suffixes[-1] == "u64" else None

    def do_mapa(self, suffixes: Suffixes, operands: Operands) -> Statement:
        if suffixes != ["shared::cluster", "u32"]:
            return None
        return self.put(operands[0], f"map_shared_rank({self.values(operands[1:], 'u32')}, {self.site})")


class Memory(Writer):
    """Loads, stores, atomics."""

    SPACES = ("global", "shared", "shared::cta", "shared::cluster", "param")

    def _access(self, suffixes: Suffixes) -> tuple[str, int, str] | None:
        """State space, elements and type of a plain load or store."""
        found = re.fullmatch(
            rf"(?:({'|'.join(self.SPACES)})\.)?(?:(?:nc|cs)\.)?(?:v([248])\.)?(\w+)", ".".join(suffixes)
        )
        if found is None or found[3] not in CPP_TYPES:
            return None
        return (found[1] or "generic").removesuffix("::cta"), int(found[2] or 1), CPP_TYPES[found[3]]

    def do_ld(self, suffixes: Suffixes, operands: Operands) -> Statement:
        target, source = operands
        if suffixes == ["acquire", "gpu", "global", "s32"]:
            return self.put(target, f"load_acquire({self.pointer(source)})")
        access = self._access(suffixes)
        if access is None:
            return None
        space, count, kind = access
        if space == "shared::cluster":
            load = f"load_cluster(loaded, {self.shared(source)}, sizeof loaded, {self.site});"
        else:
            load = f"std::memcpy(loaded, {self.place(space, source, 'sizeof loaded')}, sizeof loaded);"
        return f"{{ {kind} loaded[{count}]; {load} {self.put_all(target, 'loaded')} }}"

    def do_st(self, suffixes: Suffixes, operands: Operands) -> Statement:
        if suffixes[:3] == ["async", "shared::cluster", "mbarrier::complete_tx::bytes"] and suffixes[-1] == "u32":
            target, source, barrier = operands
            return (f"{{ {self.array('stored', source)} store_async({self.shared(target)}, stored, sizeof stored, "
                    f"{self.shared(barrier)}, {self.site}); }}")  # fmt: skip
        access = self._access(suffixes)
        if access is None:
            return None
        (target, source), (space, count, kind) = operands, access
        values = ", ".join(f"as<{kind}>({self.bits(each)})" for each in self.elements(source))
        if space == "shared::cluster":
            store = f"store_cluster({self.shared(target)}, stored, sizeof stored, {self.site});"
        else:
            store = f"std::memcpy({self.place(space, target, 'sizeof stored')}, stored, sizeof stored);"
        return f"{{ const {kind} stored[{count}] = {{{values}}}; {store} }}"

    def do_atom(self, suffixes: Suffixes, operands: Operands) -> Statement:
        functions = {"add": "atomicAdd", "max": "atomicMax", "exch": "atomicExch", "cas": "atomicCAS"}
        if len(suffixes) != 3 or suffixes[0] not in ("global", "shared") or suffixes[1] not in functions:
            return None
        space, function, kind = suffixes[0], functions[suffixes[1]], suffixes[2]
        place = self.place(space, operands[1], f"sizeof({CPP_TYPES[kind]})")
        pointer = f"reinterpret_cast<{CPP_TYPES[kind]}*>({place})"
        return self.put(operands[0], f"{function}({pointer}, {self.values(operands[2:], kind)})")

    def do_red(self, suffixes: Suffixes, operands: Operands) -> Statement:
        if suffixes != ["release", "gpu", "global", "add", "s32"]:
            return None
        pointer = f"reinterpret_cast<int*>({self.pointer(operands[0])})"
        return f"release_add({pointer}, {self.value(operands[1], 's32')}, {self.site});"
