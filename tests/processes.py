"""Runs a function in several processes that are joined by torch.distributed over gloo, on the CPU."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_processes(function: Callable[..., None], *args: object, processes: int = 2) -> None:
    """Calls ``function(rank, *args)`` in each; what one of them raises is raised here."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_process, (processes, str(Path(folder) / "store"), function, args), nprocs=processes)


def _process(rank: int, processes: int, store: str, function: Callable[..., None], args: tuple[object, ...]) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=processes)
    try:
        function(rank, *args)
    finally:
        dist.destroy_process_group()
