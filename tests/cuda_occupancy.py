"""How many warps of a kernel a multiprocessor holds at once: registers, shared memory and its slots decide."""

from __future__ import annotations

import re
import shlex
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from emulated import HOST_FLAGS, host_compiler


@dataclass(frozen=True)
class Multiprocessor:
    """CUDA C++ Programming Guide, "Compute Capabilities", technical specifications."""

    warps: int
    blocks: int
    shared_kib: int  # of which each block takes one for the system


MULTIPROCESSORS = {
    "80": Multiprocessor(64, 32, 164),
    "86": Multiprocessor(48, 16, 100),
    "89": Multiprocessor(48, 24, 100),
    "90a": Multiprocessor(64, 32, 228),
    "100": Multiprocessor(64, 32, 228),
    "120": Multiprocessor(48, 24, 100),
}
_QUARTERS = 4  # a multiprocessor has four schedulers with 16384 registers each
_QUARTER_REGISTERS = 16384


def resident_warps(architecture: str, registers: int, threads: int, shared_bytes: int) -> int:
    """Warps on a multiprocessor; with ``threads`` 0 (unknown) as many as registers allow."""
    card = MULTIPROCESSORS[architecture]
    per_warp = -(-registers * 32 // 256) * 256  # registers are handed out to warps by 256
    warps = min(_QUARTERS * (_QUARTER_REGISTERS // per_warp), card.warps)
    if threads == 0:
        return warps
    block_warps = -(-threads // 32)
    blocks = min(warps // block_warps, card.blocks, (card.shared_kib << 10) // (shared_bytes + 1024))
    return blocks * block_warps


@dataclass(frozen=True)
class LaunchSize:
    """What a launch asks for: threads a block, bytes of dynamic shared memory; 0 where it is not known."""

    threads: int = 0
    shared_bytes: int = 0


# A kernel's first template argument says what its launch asks for: kThreads and kSmemBytes. Those whose launch asks
# for something else:
_THREADS = {"attention_bwd_dmask_kernel": "fastattn::kDmaskThreads"}
_SHARED_BYTES = {
    "attention_bwd_dmask_kernel": "fastattn::kDmaskSmemBytes",
    "int8_matmul_sm90_kernel": "sizeof(fastattn::Int8Sm90Smem<{0}>)",
}
_PROBE = """
template <typename T>
constexpr int threads() {
  if constexpr (requires { T::Shape::kBlockThreads; }) return T::Shape::kBlockThreads;
  else if constexpr (requires { T::kThreads; }) return T::kThreads;
  else return 0;
}
template <typename T>
constexpr int shared_bytes() {
  if constexpr (requires { T::kSmemBytes; }) return T::kSmemBytes;
  else return 0;
}
#include <cstdio>
int main() {
"""


def split_name(name: str) -> tuple[str, str | None]:
    """``void fastattn::kernel<A<1>, 2>(P)`` -> ``kernel``, ``A<1>``: its name and its first template argument."""
    found = re.match(r"(?:void )?(?:\w+::|\(anonymous namespace\)::)*(\w+)<?", name)
    assert found is not None, name
    depth, argument = 0, ""
    for character in name[found.end() :] if found[0].endswith("<") else "":
        depth += (character in "<(") - (character in ">)")
        if depth < 0 or (depth == 0 and character == ","):
            break
        argument += character
    return found[1], argument if re.match(r"[A-Za-z_]", argument) else None


def launch_sizes(names: Sequence[str], sources: Iterable[Path]) -> dict[str, LaunchSize]:
    """By the demangled names of kernels: the C++ compiler evaluates their traits, as the emulator has them."""
    includes = sorted({line for path in sources for line in re.findall(r"#include \".*cuh\"", path.read_text())})
    lines = [*includes, _PROBE]
    for name in names:
        kernel, argument = split_name(name)
        threads = _THREADS.get(kernel, f"threads<{argument}>()" if argument else "0")
        shared = _SHARED_BYTES.get(kernel, f"shared_bytes<{argument}>()" if argument else "0")
        values = f"static_cast<int>({threads}), static_cast<int>({shared})".format(argument)
        lines.append(f'  std::printf("%d %d\\n", {values});')
    compiler = host_compiler()
    if compiler is None:
        return dict.fromkeys(names, LaunchSize())
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "probe"
        # Nothing runs but main, so the emulator's runtime is not linked, and what calls it is dropped.
        linking = ["-ffunction-sections", "-Wl,--gc-sections", "-Wl,--unresolved-symbols=ignore-all"]
        flags = [*HOST_FLAGS, "-O0", "-w", *linking, "-x", "c++", "-"]
        command = [*shlex.split(compiler), *flags, "-o", program]
        subprocess.run(command, input="\n".join([*lines, "}"]), text=True, check=True)
        output = subprocess.run([program], capture_output=True, text=True, check=True).stdout
    sizes = [LaunchSize(*map(int, line.split())) for line in output.splitlines()]
    return dict(zip(names, sizes, strict=True))
