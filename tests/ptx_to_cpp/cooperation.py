"""Instructions that concern other threads, and asynchronous operations: calls of csrc/emulator/instructions.h."""

from __future__ import annotations

import re
from collections.abc import Callable

from ptx_to_cpp.parser import split_operands
from ptx_to_cpp.writer import CPP_TYPES, Operands, Statement, Suffixes, Writer, true_or_false


class Cooperation(Writer):
    """Barriers, what the lanes of a warp do together, and asynchronous operations."""

    def by_table(self) -> Statement:
        """Instructions that are one call each, of their operands as they come."""
        of, s = self.here.operands, self.site
        calls: dict[str, Callable[[], str]] = {
            "membar.gl": lambda: "__threadfence()",
            "trap": lambda: f'fail({s}, "the kernel gives up")',
            "prefetch.tensormap": lambda: "",
            "fence.proxy.async.global": lambda: "",  # of turns: turns.cpp
            "fence.proxy.async.shared::cta": lambda: "fence_proxy_async()",
            "fence.mbarrier_init.release.cluster": lambda: "fence_mbarrier_init()",
            "bar.warp.sync": lambda: f"sync_warp({self.value(of[0], 'u32')}, {s})",
            "barrier.cluster.arrive.release.aligned": lambda: f"cluster_arrive(true, {s})",
            "barrier.cluster.arrive.relaxed.aligned": lambda: f"cluster_arrive(false, {s})",
            "barrier.cluster.wait.acquire.aligned": lambda: f"cluster_wait({s})",
            "setmaxnreg.inc.sync.aligned.u32": lambda: f"setmaxnreg_inc({of[0]}, {s})",
            "setmaxnreg.dec.sync.aligned.u32": lambda: f"setmaxnreg_dec({of[0]}, {s})",
            "wgmma.fence.sync.aligned": lambda: f"wgmma_fence({s})",
            "wgmma.commit_group.sync.aligned": lambda: f"wgmma_commit_group({s})",
            "wgmma.wait_group.sync.aligned": lambda: f"wgmma_wait_group({of[0]}, {s})",
            "cp.async.commit_group": lambda: "cp_async_commit_group()",
            "cp.async.wait_group": lambda: f"cp_async_wait_group({of[0]})",
            "cp.async.mbarrier.arrive.noinc.shared::cta.b64": lambda: (
                f"cp_async_mbarrier_arrive_noinc({self.shared(of[0])}, {s})"),
            "cp.async.bulk.commit_group": lambda: "bulk_commit_group()",
            "cp.async.bulk.wait_group": lambda: f"bulk_wait_group({of[0]}, false, {s})",
            "cp.async.bulk.wait_group.read": lambda: f"bulk_wait_group({of[0]}, true, {s})",
            "mbarrier.init.shared::cta.b64": lambda: (
                f"mbarrier_init({self.shared(of[0])}, {self.value(of[1], 's32')}, {s})"),
            "mbarrier.inval.shared::cta.b64": lambda: f"mbarrier_inval({self.shared(of[0])}, {s})",
            "mbarrier.expect_tx.relaxed.cta.shared::cta.b64": lambda: (
                f"mbarrier_arrive({self.shared(of[0])}, 0, {self.value(of[1], 'u32')}, {s})"),
        }  # fmt: skip
        return calls[self.here.name]() + ";" if self.here.name in calls else None

    def do_bar(self, suffixes: Suffixes, operands: Operands) -> Statement:
        if (suffixes, operands) == (["sync"], ["0"]):
            return f"sync_block({self.site});"
        if suffixes in (["sync"], ["arrive"]) and len(operands) == 2:
            return f"bar_{suffixes[0]}({self.values(operands, 's32')}, {self.site});"
        return None

    def do_mbarrier(self, suffixes: Suffixes, operands: Operands) -> Statement:
        name, barrier = ".".join(suffixes), self.shared(operands[1])
        if name in ("try_wait.parity.shared::cta.b64", "try_wait.parity.acquire.cluster.shared::cta.b64"):
            wait = f"mbarrier_wait_parity({barrier}, {self.value(operands[2], 's32')}, {self.site});"
            return f"{wait} {self.put(operands[0], 'true')}"
        if operands[0] != "_":
            return None
        arrivals = {
            "arrive.shared::cta.b64": f"mbarrier_arrive({barrier}, 1, 0, {self.site});",
            "arrive.release.cluster.shared::cluster.b64": f"mbarrier_arrive_cluster({barrier}, {self.site});",
        }
        if name == "arrive.expect_tx.shared::cta.b64":
            return f"mbarrier_arrive({barrier}, 1, {self.value(operands[2], 'u32')}, {self.site});"
        return arrivals.get(name)

    def do_elect(self, suffixes: Suffixes, operands: Operands) -> Statement:
        lane, predicate = operands[0].split("|")
        if suffixes != ["sync"] or lane != "_":
            return None
        return self.put(predicate, f"elect_sync({self.value(operands[1], 'u32')}, {self.site})")

    def do_shfl(self, suffixes: Suffixes, operands: Operands) -> Statement:
        kinds = {"idx": "kIndex", "up": "kUp", "down": "kDown", "bfly": "kXor"}
        if suffixes[0] != "sync" or suffixes[1] not in kinds or suffixes[2:] != ["b32"]:
            return None
        target, *in_range = operands[0].split("|")
        if any(self.is_read(each) for each in in_range):
            return None
        value, operand, bounds, mask = (self.value(each, "u32") for each in operands[1:])
        return self.put(
            target, f"shfl(Shuffle::{kinds[suffixes[1]]}, {mask}, {value}, {operand}, {bounds}, {self.site})"
        )

    def do_redux(self, suffixes: Suffixes, operands: Operands) -> Statement:
        if suffixes[0] != "sync" or suffixes[1] not in ("add", "min", "max") or suffixes[2:] not in (["s32"], ["u32"]):
            return None
        value, mask = self.value(operands[1], suffixes[2]), self.value(operands[2], "u32")
        kind = CPP_TYPES[suffixes[2]]
        return self.put(operands[0], f"redux({mask}, {value}, op_{suffixes[1]}<{kind}>, {self.site})")

    def do_vote(self, suffixes: Suffixes, operands: Operands) -> Statement:
        predicate, mask = self.value(operands[1], "pred"), self.value(operands[2], "u32")
        votes = {
            "sync.ballot.b32": f"ballot({mask}, {predicate}, {self.site})",
            "sync.any.pred": f"ballot({mask}, {predicate}, {self.site}) != 0",
            "sync.all.pred": f"ballot({mask}, !{predicate}, {self.site}) == 0",
        }
        name = ".".join(suffixes)
        return self.put(operands[0], votes[name]) if name in votes else None

    # ---- matrices

    def _matrices(self, suffixes: Suffixes) -> tuple[int, str] | None:
        found = re.fullmatch(r"sync\.aligned\.m8n8\.x([124])(\.trans)?\.shared\.b16", ".".join(suffixes))
        return None if found is None else (int(found[1]), true_or_false(found[2]))

    def do_ldmatrix(self, suffixes: Suffixes, operands: Operands) -> Statement:
        matrices = self._matrices(suffixes)
        if matrices is None or len(self.elements(operands[0])) != matrices[0]:
            return None
        call = f"ldmatrix(d, {matrices[0]}, {matrices[1]}, {self.shared(operands[1])}, {self.site});"
        return f"{{ uint32_t d[{matrices[0]}]; {call} {self.put_all(operands[0], 'd')} }}"

    def do_stmatrix(self, suffixes: Suffixes, operands: Operands) -> Statement:
        matrices = self._matrices(suffixes)
        if matrices is None or len(self.elements(operands[1])) != matrices[0]:
            return None
        call = f"stmatrix({self.shared(operands[0])}, s, {matrices[0]}, {matrices[1]}, {self.site});"
        return f"{{ {self.array('s', operands[1])} {call} }}"

    def do_mma(self, suffixes: Suffixes, operands: Operands) -> Statement:
        d, a, b, c = operands
        kind, call = {
            "sync.aligned.m16n8k16.row.col.f32.f16.f16.f32": ("f32", "mma_m16n8k16(Element::kFloat16, "),
            "sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32": ("f32", "mma_m16n8k16(Element::kBFloat16, "),
            "sync.aligned.m16n8k32.row.col.s32.s8.s8.s32": ("s32", "mma_m16n8k32_s8("),
            # Sums of products that int32 holds, as these are (kInt8MaxDepth), are the same.
            "sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8.s32": ("s32", "mma_m16n8k32_s8("),
        }.get(".".join(suffixes), ("", ""))
        if not kind or [len(self.elements(each)) for each in operands] != [4, 4, 2, 4]:
            return None
        arrays = f"{self.array('d', c, kind)} {self.array('a', a)} {self.array('b', b)}"
        return f"{{ {arrays} {call}d, a, b, {self.site}); {self.put_all(d, 'd')} }}"

    def do_wgmma(self, suffixes: Suffixes, operands: Operands) -> Statement:
        shape = r"mma_async\.sync\.aligned\.m64n(\d+)(k16\.f32\.f16\.f16|k16\.f32\.bf16\.bf16|k32\.s32\.s8\.s8)"
        found = re.fullmatch(shape, ".".join(suffixes))
        if found is None:
            return None
        d, a, b, accumulates, *immediates = operands
        in_registers = a.startswith("{")
        element = {"f16": "kFloat16", "bf16": "kBFloat16", "s8": "kInt8"}[suffixes[-1]]
        # The signs of A and B, then whether they are transposed: A where it is in shared memory, and B.
        signs, transposed = immediates[:2], immediates[2:]
        wanted = ([], 0) if element == "kInt8" else (["1", "1"], 1 if in_registers else 2)
        if (signs, len(transposed)) != wanted or len(self.elements(d)) != int(found[1]) // 2:
            return None
        a_transposed, b_transposed = ["0", "0", *transposed][-2:]
        fields = [f"Element::{element}", found[1],
                  true_or_false(a_transposed == "1"), true_or_false(b_transposed == "1"),
                  "a" if in_registers else "nullptr", "0" if in_registers else self.value(a, "u64"),
                  self.value(b, "u64"), self.value(accumulates, "pred"), "true"]  # fmt: skip
        arrays = self.array("d", d) + (self.array("a", a) if in_registers else "")
        return f"{{ {arrays} wgmma_mma_async(d, {{{', '.join(fields)}}}, {self.site}); {self.put_all(d, 'd')} }}"

    # ---- copies

    def do_cp(self, suffixes: Suffixes, operands: Operands) -> Statement:
        name, s = ".".join(suffixes), self.site
        if name in ("async.cg.shared.global", "async.ca.shared.global"):
            target, source, size, *valid = operands
            count = self.value(valid[0], "s32") if valid else size
            return f"cp_async({self.shared(target)}, {self.pointer(source)}, {size}, {count}, {s});"
        if name == "async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes":
            target, source, size, barrier = operands
            places = f"{self.shared(target)}, {self.pointer(source)}"
            return f"bulk_load({places}, {self.value(size, 'u32')}, {self.shared(barrier)}, {s});"
        if name in (
            "async.bulk.global.shared::cta.bulk_group",
            "reduce.async.bulk.global.shared::cta.bulk_group.add.f32",
        ):
            target, source, size = operands
            moved = f"{self.pointer(target)}, {self.shared(source)}, {self.value(size, 'u32')}"
            return f"bulk_add({moved}, Element::kFloat32, {s});" if "add" in name else f"bulk_store({moved}, {s});"
        return self._tensor_copy(name, operands)

    def _tensor_copy(self, name: str, operands: Operands) -> Statement:
        """Loads: ``[shared], [map, {coordinates}], [mbarrier]``. Stores: ``[map, {coordinates}], [shared]``."""
        load = re.fullmatch(
            r"async\.bulk\.tensor\.(\d)d\.shared::cluster\.global\.tile\.mbarrier::complete_tx::bytes", name
        )
        store = re.fullmatch(r"async\.bulk\.tensor\.(\d)d\.global\.shared::cta\.tile\.bulk_group", name)
        add = re.fullmatch(r"reduce\.async\.bulk\.tensor\.(\d)d\.global\.shared::cta\.add\.tile\.bulk_group", name)
        found = load or store or add
        if found is None:
            return None
        tensor, shared = (operands[1], operands[0]) if load else (operands[0], operands[1])
        map_, coordinates = split_operands(tensor[1:-1])
        if len(self.elements(coordinates)) != int(found[1]):
            return None
        map_ = f"*reinterpret_cast<const TensorMap*>({self.bits(map_)})"
        if load:
            call = (
                f"tma_load({self.shared(shared)}, {map_}, {self.shared(operands[2])}, box_at, {found[1]}, {self.site});"
            )
        else:
            call = f"tma_store({map_}, {self.shared(shared)}, box_at, {found[1]}, {true_or_false(add)}, {self.site});"
        return f"{{ {self.array('box_at', coordinates, 's32')} {call} }}"
