"""What a benchmark's numbers depend on besides the code: processor, threads, versions, commit."""

from __future__ import annotations

import platform
import re
import subprocess
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
_L3 = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")


@dataclass(frozen=True)
class Machine:
    cpu: str
    family: str  # as the processor numbers itself; tells apart those that share a name
    isa: str  # the build of the CPU kernels in use
    threads: int
    l3_bytes: int  # the cache before memory: a GPU's L2
    torch: str
    python: str
    system: str
    fastattn: str
    commit: str
    date: str
    gpu: str = ""  # empty: a run on the processor
    gpu_software: str = ""  # driver, CUDA, Triton
    clocks: str = ""  # of the GPU, before and after

    @property
    def device(self) -> str:
        """What ran the kernels."""
        return self.gpu or f"{self.cpu}, {self.threads} threads"

    @property
    def slug(self) -> str:
        """A folder name: ``amd-epyc-family-26-2-threads``, ``nvidia-h100-80gb-hbm3``."""
        if self.gpu:
            return re.sub(r"[^a-z0-9]+", "-", self.gpu.lower()).strip("-")
        name = re.sub(r"\(r\)|\(tm\)|\bcpu\b|\bprocessor\b|@.*", " ", self.cpu.lower())
        # Cloud machines often report a bare product line, which generations of processors share.
        name = name if re.search(r"\d", name) else f"{name} family {self.family}"
        return re.sub(r"[^a-z0-9]+", "-", f"{name} {self.threads} threads").strip("-")

    def as_dict(self) -> dict:
        return asdict(self)


def describe(threads: int, device: str = "cpu") -> Machine:
    """The machine as it is now, for a run with ``threads`` threads, or on the GPU."""
    import fastattn
    from fastattn import _extension

    cpu, family = _cpu_name()
    return Machine(
        cpu=cpu,
        family=family,
        isa=_extension.extension.active_cpu_isa() if _extension.extension else "none",
        threads=threads,
        l3_bytes=_l3_bytes() if device == "cpu" else torch.cuda.get_device_properties(0).L2_cache_size,
        torch=torch.__version__,
        python=platform.python_version(),
        system=f"{platform.system()} {platform.machine()}",
        fastattn=getattr(fastattn, "__version__", "unknown"),
        commit=_commit(),
        date=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        gpu="" if device == "cpu" else torch.cuda.get_device_name(0),
        gpu_software="" if device == "cpu" else _gpu_software(),
    )


def _gpu_software() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    try:
        driver = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        driver = "unknown"
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "none"
    return f"driver {driver}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}, Triton {triton}"


def _cpu_name() -> tuple[str, str]:
    cpuinfo = Path("/proc/cpuinfo")
    facts = {}
    if cpuinfo.exists():
        lines = [line.split(":", 1) for line in cpuinfo.read_text().split("\n\n")[0].splitlines() if ":" in line]
        facts = {key.strip(): value.strip() for key, value in lines}
    name = facts.get("model name") or platform.processor() or platform.machine()
    return re.sub(r"\s+", " ", name), facts.get("cpu family", "unknown")


def _l3_bytes() -> int:
    text = _L3.read_text().strip() if _L3.exists() else "32M"
    return int(text[:-1]) * {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}[text[-1]]


def _commit() -> str:
    """The short commit, with ``+`` if tracked files differ from it; ``unknown`` outside a git checkout."""
    try:
        run = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--abbrev=9", "--exclude=*"],
            cwd=ROOT, capture_output=True, text=True, check=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return run.stdout.strip()
