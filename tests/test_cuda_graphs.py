"""What a CUDA graph captures of the ops is right for other contents of the same memory: nothing that the host read or
made is baked in."""

from __future__ import annotations

import pytest
import torch
from test_ecosystem import DIM, Block
from torch import Tensor

import fastattn


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_cuda_graphs_replay_forward_and_backward():
    block = Block(fastattn).cuda().half()
    x = torch.randn(2, 64, DIM, device="cuda", dtype=torch.half, requires_grad=True)

    def step() -> Tensor:
        return torch.autograd.grad(block(x).square().sum(), [x, *block.parameters()])

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
    graph.replay()
    for actual, expected in zip(captured, step(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)
