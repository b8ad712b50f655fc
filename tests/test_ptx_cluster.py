"""Every wrapper of csrc/common/ptx_cluster.cuh against a plain reference: emulated, and unchanged on a device."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
import torch
from emulated import KernelError, KernelLibrary, Mode, emulated_library, host_compiler
from test_ptx import WHERE, library_for, random_int32

THREADS = 64
needs_compiler = pytest.mark.skipif(host_compiler() is None, reason="no C++ compiler on PATH")


@pytest.fixture(params=WHERE, ids=str)
def clusters(request: pytest.FixtureRequest) -> Iterator[KernelLibrary]:
    yield from library_for(request.param, "ptx_cluster_sm90.cu", (9, 0))


@pytest.mark.parametrize(
    "grid, cluster",
    [((3, 1, 1), (1, 1, 1)), ((6, 1, 1), (2, 1, 1)), ((16, 1, 1), (8, 1, 1)), ((4, 6, 2), (2, 3, 1)),
     ((2, 2, 4), (1, 2, 2)), ((2, 4, 2), (2, 2, 2))],
    ids=str,
)  # fmt: skip
def test_ranks_count_x_fastest(clusters, grid, cluster):
    out = torch.full((*grid[::-1], 2), -1, dtype=torch.int32).to(clusters.device)
    sizes = [torch.tensor(each, dtype=torch.int32) for each in (grid, cluster)]  # in host memory
    clusters.call("ptx_cluster_rank", out, *sizes)
    z, y, x = (torch.arange(n) % c for n, c in zip(grid[::-1], cluster[::-1], strict=True))
    expected = (z[:, None, None] * cluster[1] + y[None, :, None]) * cluster[0] + x
    assert torch.equal(out[..., 0].cpu(), expected.int())
    assert (out[..., 1].cpu() == cluster[0] * cluster[1] * cluster[2]).all()


@pytest.mark.parametrize("words", [1, 2, 4])
@pytest.mark.parametrize("blocks, cluster", [(4, 1), (4, 2), (8, 4), (8, 8)], ids=str)
def test_loads_and_stores(clusters, words, blocks, cluster):
    values = random_int32(blocks // cluster, cluster, THREADS, words)
    loaded, stored = (torch.zeros_like(values).to(clusters.device) for _ in range(2))
    clusters.call("ptx_cluster_exchange", values.to(clusters.device), loaded, stored, words, blocks, cluster)
    from_the_right = values.roll(-1, 1).flip(2)
    assert torch.equal(loaded.cpu(), from_the_right)
    assert torch.equal(stored.cpu(), from_the_right.roll(-1, 1))


@pytest.mark.parametrize("words", [1, 2, 4])
# Not in clusters of one block, where PTX leaves st.async undefined.
@pytest.mark.parametrize("blocks, cluster", [(2, 2), (8, 4), (8, 8)], ids=str)
def test_asynchronous_stores(clusters, words, blocks, cluster):
    rounds = 5
    values = torch.randint(0, 1 << 16, (rounds, blocks // cluster, cluster, THREADS, words), dtype=torch.int32)
    out = torch.zeros_like(values).to(clusters.device)
    clusters.call("ptx_store_async", values.to(clusters.device), out, words, rounds, blocks, cluster)
    expected = torch.zeros_like(values[:, :, 0])
    for rank in range(cluster):
        expected = expected * 3 + values[:, :, rank]
    assert torch.equal(out.cpu(), expected[:, :, None].expand_as(values))


@pytest.mark.parametrize("blocks, cluster", [(2, 2), (8, 4), (8, 8)], ids=str)
def test_arrivals_at_mbarriers_of_other_blocks(clusters, blocks, cluster):
    values = random_int32(7) // 2
    out = torch.zeros(blocks // cluster, cluster, 7, dtype=torch.int32).to(clusters.device)
    clusters.call("ptx_cluster_ring", values.to(clusters.device), out, 7, blocks, cluster)
    expected = values + torch.arange(cluster, dtype=torch.int32)[:, None]
    assert torch.equal(out[:, 1:].cpu(), expected[1:].expand(blocks // cluster, -1, -1))


@needs_compiler
@pytest.mark.parametrize(
    "grid, cluster, message",
    [((3, 1, 1), (2, 1, 1), "not a whole number of clusters"), ((2, 3, 1), (1, 2, 1), "not a whole number of clusters"),
     ((16, 1, 1), (16, 1, 1), "a cluster has 1 to 8 blocks, not 16"), ((1, 1, 1), (0, 1, 1), "1 to 8 blocks, not 0")],
    ids=str,
)  # fmt: skip
def test_impossible_clusters_are_refused(grid, cluster, message):
    sizes = [torch.tensor(each, dtype=torch.int32) for each in (grid, cluster)]
    with pytest.raises(KernelError, match=re.escape(message)):
        emulated_library().call("ptx_cluster_rank", torch.zeros(64, dtype=torch.int32), *sizes)


@needs_compiler
@pytest.mark.parametrize("os_threads", [1, 3])
def test_clusters_are_shared_out_between_os_threads(os_threads):
    (library,) = library_for(Mode(os_threads=os_threads), "ptx_cluster_sm90.cu", (9, 0))
    values = random_int32(7, 2, THREADS, 1)
    loaded, stored = torch.zeros_like(values), torch.zeros_like(values)
    library.call("ptx_cluster_exchange", values, loaded, stored, 1, 14, 2)
    assert torch.equal(loaded, values.roll(-1, 1).flip(2))
