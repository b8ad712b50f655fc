"""Launches of Triton's kernels for a key/value cache, planned on meta tensors, for tests that compile them ahead of
time."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fastattn.ops.triton_launch import Launch

BATCH, HEADS, HEADS_KV, CAPACITY = 4, 16, 4, 8192
# Queries of a step, of which four heads share keys: tiles of 16, 32 and 64 rows.
QUERIES = {"decode": 1, "few": 8, "prompt": 512}
# Tokens of a block; None: a cache in one piece. Tiles of keys divide 256, and 16 divides them.
BLOCK_SIZES = {"contiguous": None, "paged_16": 16, "paged_256": 256}


def launches(
    capability: tuple[int, int], dtype: torch.dtype, head_dim: int, queries: int, block_size: int | None, plain: bool
) -> Iterator[Launch]:
    """Every kernel of a step that appends as many tokens as it has queries, and rotates; ``plain``: causal alone."""
    from fastattn.ops import attention_with_kv_cache_triton_plan as plan
    from fastattn.ops.attention_triton_tiles import Gpu

    with torch.device("meta"):
        query, out = (torch.empty(BATCH, queries, HEADS, head_dim, dtype=dtype) for _ in range(2))
        fresh = tuple(torch.empty(BATCH, queries, HEADS_KV, head_dim, dtype=dtype) for _ in range(2))
        lse, lengths = torch.empty(BATCH, HEADS, queries), torch.empty(BATCH, dtype=torch.int32)
        entries = BATCH if block_size is None else BATCH * CAPACITY // block_size
        caches = (torch.empty(entries, block_size or CAPACITY, HEADS_KV, head_dim, dtype=dtype) for _ in range(2))
        table = None if block_size is None else torch.empty(BATCH, CAPACITY // block_size, dtype=torch.int32)
        rotation = plan.Rotation(*(torch.empty(CAPACITY, head_dim // 2) for _ in range(2)), plain)
        extras = (None, None) if plain else (torch.empty(HEADS), torch.empty(HEADS))
    cache = plan.Cache(*caches, lengths, 0, queries, table)
    scores = plan.Scores(*extras, True, 0.125, -1 if plain else 500, -1, 0.0 if plain else 30.0)
    yield plan.plan_append(query, fresh, cache, rotation)[0]
    yield from plan.plan_attention(query, cache, out, lse, scores, Gpu(capability), multiprocessors=132)


def aot_cases(capability: tuple[int, int], quick: bool) -> Iterator[tuple[str, Launch]]:
    """Each kernel in each of the tables' tiles."""
    for dtype in (torch.float16,) if quick else (torch.float16, torch.bfloat16, torch.float32):
        for head_dim in (128,) if quick else (16, 64, 80, 128, 256) if dtype == torch.float16 else (64, 128, 256):
            for step in ("decode",) if quick else QUERIES:
                for blocks, block_size in BLOCK_SIZES.items():
                    # What differs is how rows are found: in float16, of head_dims with tiles of their own.
                    if blocks == "paged_16" or (dtype == torch.float16 and head_dim in (64, 128, 256)):
                        for plain in (True,) if quick or blocks != "paged_16" else (True, False):
                            variant = f"{step}_{blocks}" + ("" if plain else "_everything")
                            for launch in launches(capability, dtype, head_dim, QUERIES[step], block_size, plain):
                                # Of the other kernels, one variant each says enough.
                                if "BLOCK_Q" in launch.arguments or (step == "decode" and blocks == "paged_16"):
                                    yield _name(launch, dtype, head_dim, variant), launch


def aot_candidates(capability: tuple[int, int]) -> Iterator[tuple[str, Launch]]:
    """Nothing is tuned."""
    yield from ()


def _name(launch: Launch, dtype: torch.dtype, head_dim: int, variant: str) -> str:
    tile = f"{launch.arguments.get('BLOCK_Q', '-')}x{launch.arguments.get('BLOCK_K', '-')}"
    name = launch.kernel.__name__.removesuffix("_kernel")
    return f"{name} {str(dtype).removeprefix('torch.')} {head_dim} {variant} {tile} s{launch.options['num_stages']}"
