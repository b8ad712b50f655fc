"""Tiles, warps and pipeline stages of attention's Triton kernels, by architecture, dtype and head_dim."""

from __future__ import annotations

from typing import NamedTuple

import torch

from fastattn._triton import is_interpreted
from fastattn.ops.triton_launch import device_of


class Gpu(NamedTuple):
    """What tiles are chosen for. capability (0, 0): Triton's interpreter."""

    capability: tuple[int, int]


INTERPRETER = Gpu((0, 0))


def gpu_of(tensor: torch.Tensor) -> Gpu:
    return INTERPRETER if is_interpreted() else Gpu(device_of(tensor).capability)


class Tile(NamedTuple):
    block_q: int
    block_k: int
    num_warps: int
    num_stages: int

    def launch_options(self) -> dict[str, int]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}


_SMALL = Tile(32, 32, 4, 1)


def forward(gpu: Gpu, dtype: torch.dtype, block_d: int, seqlen_q: int) -> Tile:
    if gpu is INTERPRETER:
        return _SMALL
    return Tile(128, 64, 4, 3) if block_d <= 64 else Tile(128, 64, 8, 3) if block_d <= 128 else Tile(64, 32, 4, 2)


def dq(gpu: Gpu, dtype: torch.dtype, block_d: int) -> Tile:
    if gpu is INTERPRETER:
        return _SMALL
    return Tile(128, 64, 8, 3) if block_d <= 128 else Tile(64, 32, 4, 2)


def dkdv(gpu: Gpu, dtype: torch.dtype, block_d: int) -> Tile:
    if gpu is INTERPRETER:
        return _SMALL
    return Tile(64, 128, 8, 3) if block_d <= 128 else Tile(32, 64, 4, 2)


def scores(gpu: Gpu, dtype: torch.dtype, block_d: int) -> Tile:
    if gpu is INTERPRETER:
        return _SMALL
    return Tile(64, 64, 4, 2)
