"""The modules inside torch's machinery: compile, export, autocast, checkpointing, DDP, FSDP2, copies, files."""

from __future__ import annotations

import copy
import io
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from processes import run_processes
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastattn
from fastattn._extension import extension, missing_reason

needs_extension = pytest.mark.skipif(extension is None, reason=str(missing_reason))
needs_gloo = pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="torch has no gloo")
ROOT = Path(__file__).resolve().parent.parent
DIM = 32


class Block(nn.Module):
    """One of each module, fastattn's or torch's."""

    def __init__(self, library, dropout: float = 0.0, int8: bool = False) -> None:
        super().__init__()
        kind = library.MultiHeadAttention if library is fastattn else nn.MultiheadAttention
        self.attention = kind(DIM, 4, dropout=dropout, batch_first=True)
        self.norm1, self.norm2 = library.LayerNorm(DIM), library.RMSNorm(DIM)
        self.linear = nn.Linear(DIM, DIM)
        if int8:
            self.linear = fastattn.Int8Linear.from_linear(self.linear)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        y = self.norm1(x)
        x = x + self.attention(y, y, y, key_padding_mask=padding, need_weights=False)[0]
        return x + self.linear(self.norm2(x))


def make_pair(**options) -> tuple[Block, Block]:
    """fastattn's block and torch's with the same weights."""
    ours, torchs = Block(fastattn, **options), Block(nn, **options)
    torchs.load_state_dict(ours.state_dict())
    return ours, torchs


def make_input(batch: int = 2, seqlen: int = 7) -> tuple[Tensor, Tensor]:
    padding = torch.zeros(batch, seqlen, dtype=torch.bool)
    padding[0, -2:] = True
    return torch.randn(batch, seqlen, DIM), padding


def gradients(module: nn.Module, x: Tensor, padding: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    return list(torch.autograd.grad(module(x, padding).square().sum(), [x, *module.parameters()]))


def assert_same(actual: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# --- Tracing ----------------------------------------------------------------------------------------------------------


@needs_extension
@pytest.mark.parametrize("int8", [False, True], ids=["float", "int8"])
def test_compiles_whole_and_once_for_all_shapes(int8):
    torch._dynamo.reset()
    block = Block(fastattn, int8=int8)
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph

    # Dimensions marked, not dynamic=True, with which dynamo would read options that are floats by .item() itself.
    compiled = torch.compile(block, fullgraph=True, backend=backend)
    for batch, seqlen in ((2, 7), (3, 12), (5, 33)):
        x, padding = make_input(batch, seqlen)
        for tensor, dim in ((x, 0), (x, 1), (padding, 0), (padding, 1)):
            torch._dynamo.mark_dynamic(tensor, dim)
        torch.testing.assert_close(compiled(x, padding), block(x, padding), rtol=1e-5, atol=1e-5)
    assert len(graphs) == 1
    targets = " ".join(str(node.target) for node in graphs[0].graph.nodes)
    assert "fastattn.attention" in targets and "fastattn.layer_norm" in targets
    assert not [node for node in graphs[0].graph.nodes if node.target in ("item", "tolist")]


@needs_extension
def test_compiled_training_matches():
    torch._dynamo.reset()
    block = Block(fastattn)
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch, seqlen in ((2, 7), (3, 12)):
        x, padding = make_input(batch, seqlen)
        assert_same(gradients(compiled, x, padding), gradients(block, x, padding))


@needs_extension
@pytest.mark.parametrize("int8", [False, True], ids=["float", "int8"])
def test_exports_with_dynamic_shapes_and_loads_from_a_file(int8):
    block = Block(fastattn, int8=int8).eval()
    batch, seqlen = torch.export.Dim("batch", min=2, max=64), torch.export.Dim("seqlen", min=2, max=512)
    shape = {0: batch, 1: seqlen}
    program = torch.export.export(block, make_input(), dynamic_shapes={"x": shape, "padding": shape})
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for sizes in ((2, 7), (3, 19)):
        x, padding = make_input(*sizes)
        torch.testing.assert_close(loaded(x, padding), block(x, padding), rtol=1e-5, atol=1e-5)


# --- Precision, memory ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_gives_the_dtypes_of_torch(dtype):
    ours, torchs = make_pair()
    x, padding = make_input()
    results = []
    for block in (ours, torchs):
        with torch.autocast("cpu", dtype):
            out = block(x, padding)
            y = block.norm1(x)
            attended = block.attention(y, y, y, need_weights=False)[0]
        out.float().square().sum().backward()
        results.append((out, attended, *(p.grad for p in block.parameters())))
    for name, actual, expected in zip(("out", "attended", *dict(ours.named_parameters())), *results, strict=True):
        assert actual.dtype == expected.dtype, name
        assert (actual - expected).abs().max() <= 0.05 * expected.abs().max(), name


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["saved tensors", "reentrant"])
def test_checkpointing_repeats_the_very_dropout(use_reentrant):
    block = Block(fastattn, dropout=0.3)
    x, padding = make_input()

    class Checkpointed(nn.Module):
        def forward(self, x, padding):
            return checkpoint(block, x, padding, use_reentrant=use_reentrant)

    results = []
    for module in (block, Checkpointed()):
        torch.manual_seed(3)
        block.zero_grad()
        leaf = x.clone().requires_grad_()
        module(leaf, padding).square().sum().backward()
        results.append([leaf.grad, *(p.grad.clone() for p in block.parameters())])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


# --- Parameters that are attributes, as parametrizations and FSDP leave them ------------------------------------------


class CentredNorm(nn.Module):
    """A layer norm of another library."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = nn.Parameter(torch.rand(DIM)), nn.Parameter(torch.rand(DIM)), 1e-5

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + self.eps) * self.weight + self.bias


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


@pytest.mark.parametrize("how", ["parametrized", "replica"])
@pytest.mark.parametrize("kind", ["norm", "int8", "int8 attention"])
@torch.no_grad()
def test_a_bias_that_is_an_attribute_is_added(kind, how):
    torch.manual_seed(0)
    model = {"norm": CentredNorm, "int8": lambda: nn.Linear(DIM, DIM)}.get(
        kind, lambda: nn.MultiheadAttention(DIM, 4, batch_first=True)
    )()
    for name, parameter in model.named_parameters():
        if "bias" in name:
            parameter.uniform_(1, 2)
    fastattn.accelerate(model, int8=kind != "norm", verbose=False)
    assert type(model).__name__ == {"norm": "ForeignNorm", "int8": "Int8Linear"}.get(kind, "Int8MultiHeadAttention")
    holder = model.v_proj if kind == "int8 attention" else model
    x = torch.randn(2, 3, DIM)

    def run() -> Tensor:
        return model(x, x, x)[0] if kind == "int8 attention" else model(x)

    before = run()
    if how == "parametrized":
        nn.utils.parametrize.register_parametrization(holder, "bias", Doubled())
        after = run()
        nn.utils.parametrize.remove_parametrizations(holder, "bias", leave_parametrized=True)
    else:
        bias = 2 * holder.bias
        del holder.bias
        holder.bias = bias
        after = run()
        del holder.bias
        holder.bias = nn.Parameter(bias)
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, run(), rtol=1e-5, atol=1e-5)


def test_restore_refuses_modules_whose_class_changed():
    model = fastattn.accelerate(nn.Sequential(nn.LayerNorm(DIM), nn.LayerNorm(DIM)), verbose=False)
    nn.utils.parametrize.register_parametrization(model[1], "weight", Doubled())
    with pytest.raises(ValueError, match="restore: 1 is a ParametrizedLayerNorm and no longer the LayerNorm"):
        fastattn.restore(model)
    assert type(model[0]) is fastattn.LayerNorm
    nn.utils.parametrize.remove_parametrizations(model[1], "weight")
    assert [type(module) for module in fastattn.restore(model)] == [nn.LayerNorm, nn.LayerNorm]


# --- Copies and files -------------------------------------------------------------------------------------------------


def reload_by_torch(block: Block) -> Block:
    file = io.BytesIO()
    torch.save(block, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def reload_by_safetensors(block: Block) -> Block:
    from safetensors.torch import load, save

    fresh = Block(fastattn, int8=isinstance(block.linear, fastattn.Int8Linear))
    fresh.load_state_dict(load(save(block.state_dict())))
    return fresh


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda block: pickle.loads(pickle.dumps(block)),
    "torch.save": reload_by_torch,
    "safetensors": reload_by_safetensors,
}


@pytest.mark.parametrize("int8", [False, True], ids=["float", "int8"])
@pytest.mark.parametrize("how", COPIES)
def test_copies_compute_the_same_and_share_nothing(how, int8):
    block, (x, padding) = Block(fastattn, int8=int8), make_input()
    expected = block(x, padding)
    twin = COPIES[how](block)
    assert torch.equal(twin(x, padding), expected)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.zero_()
        block.linear.weight.zero_()
    assert torch.equal(twin(x, padding), expected)


# --- Several processes ------------------------------------------------------------------------------------------------


def train_in_parallel(rank: int) -> None:
    """Each process takes half of the batch; the gradients must be those of the whole batch in one process."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    torch.manual_seed(1)
    block, (x, padding) = Block(fastattn), make_input(4, 6)
    whole = copy.deepcopy(block)
    whole(x, padding).square().mean().backward()
    mine = slice(2 * rank, 2 * rank + 2)
    expected = {name: p.grad for name, p in whole.named_parameters()}

    ddp = DistributedDataParallel(copy.deepcopy(block))
    ddp(x[mine], padding[mine]).square().mean().backward()
    for name, parameter in ddp.module.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-5)

    sharded = copy.deepcopy(block)
    mesh = init_device_mesh("cpu", (2,))
    fully_shard(sharded.attention, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    out = sharded(x[mine], padding[mine])
    torch.testing.assert_close(out, block(x[mine], padding[mine]), rtol=1e-5, atol=1e-5)
    out.square().mean().backward()
    for name, parameter in sharded.named_parameters():
        assert parameter.to_local().numel() < parameter.numel()
        torch.testing.assert_close(parameter.grad.full_tensor(), expected[name], rtol=1e-4, atol=1e-5)


def normalise_in_parallel(rank: int) -> None:
    """What tensor parallelism makes of norms: each process has a part of the sequence, as a DTensor."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import SequenceParallel, parallelize_module

    norms = torch.nn.Sequential(fastattn.LayerNorm(8), fastattn.RMSNorm(8))
    x = torch.randn(2, 6, 8)
    expected = norms(x)
    parallelize_module(norms, init_device_mesh("cpu", (2,)), {"0": SequenceParallel(), "1": SequenceParallel()})
    out = norms(x[:, 3 * rank : 3 * rank + 3])
    torch.testing.assert_close(out.full_tensor(), expected)
    assert "input is a DTensor" in fastattn.explain("rms_norm", out, 8)


def run_in_parallel(rank: int) -> None:
    train_in_parallel(rank)
    normalise_in_parallel(rank)


FORKED = """
import multiprocessing, torch, fastattn
from torch.utils.data import DataLoader, Dataset

torch.set_num_threads(2)
x, linear = torch.randn(4, 4, 128, 32), fastattn.Int8Linear.from_linear(torch.nn.Linear(512, 512))
batch = torch.ones(64, 512)

class Items(Dataset):
    def __len__(self): return 4
    def __getitem__(self, i):
        results = fastattn.attention(x, x, x), fastattn.layer_norm(x, (32,)), linear(batch).detach()
        return torch.cat([result.flatten()[::100] for result in results])

expected = Items()[0]  # now there is a pool of threads, which no child has

def child(queue):
    torch.set_num_threads(1)
    queue.put(Items()[0].tolist())

loaded = list(DataLoader(Items(), num_workers=2, batch_size=2, multiprocessing_context="fork"))
assert torch.equal(torch.cat(loaded), expected.expand(4, -1))
fork = multiprocessing.get_context("fork")
queue = fork.Queue()
process = fork.Process(target=child, args=(queue,))
process.start()
assert queue.get(timeout=60) == expected.tolist()
print("same")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_forked_processes_compute_the_same():
    """As DataLoader's workers do, a child takes one thread: with more PyTorch's own ops hang there, and so do ours."""
    command = [sys.executable, "-W", "ignore", "-c", FORKED]
    outcome = subprocess.run(command, capture_output=True, text=True, timeout=200,
                             env={**os.environ, "PYTHONPATH": str(ROOT)})  # fmt: skip
    assert outcome.stdout == "same\n", outcome.stderr


@needs_gloo
def test_ddp_fsdp2_and_sequence_parallel_norms_match_the_whole_batch():
    run_processes(run_in_parallel)


def test_blocks_agree_with_torch():
    ours, torchs = make_pair()
    x, padding = make_input()
    assert_same(gradients(ours, x, padding), gradients(torchs, x, padding))
    assert F.mse_loss(ours(x, padding), ours(x)) != 0


@pytest.mark.parametrize("kind", ["layer_norm", "rms_norm", "int8", "linear"])
def test_jagged_tensors_go_through_swapped_modules(kind):
    module = {"layer_norm": nn.LayerNorm, "rms_norm": nn.RMSNorm}.get(kind, lambda size: nn.Linear(size, size))(32)
    sequences = [torch.randn(3, 32), torch.randn(5, 32)]
    jagged = torch.nested.nested_tensor(sequences, layout=torch.jagged)
    expected = module(jagged)
    fastattn.accelerate(module, int8=kind == "int8", linear=True, verbose=False)
    alone = [module(x) for x in sequences]
    jagged.requires_grad_()
    out = module(jagged)
    assert out.shape == expected.shape  # the ragged size too, so that the two can be added
    for each, one in zip(out.unbind(), alone, strict=True):
        torch.testing.assert_close(each, one)
    out.values().square().sum().backward()
    assert jagged.grad.values().abs().sum() > 0


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_jagged_tensors_of_more_dims_go_through_swapped_norms(norm):
    jagged = torch.nested.nested_tensor([torch.randn(3, 4, 8), torch.randn(5, 4, 8)], layout=torch.jagged)
    for shape in (8, (4, 8)):
        module = norm(shape)
        expected = module(jagged)
        out = fastattn.accelerate(module, verbose=False)(jagged)
        torch.testing.assert_close(out.values(), expected.values())
