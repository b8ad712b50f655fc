"""Every wrapper of csrc/common/ptx*.cuh against a plain reference: on the emulator, and unchanged on a device.

The references spell out the layouts of the PTX manual independently of the emulator, element by element.
"""

from __future__ import annotations

import ctypes
import shutil
from collections.abc import Iterator

import pytest
import torch
from compiled import nvcc_test_kernels, why_no_nvcc_kernels
from emulated import MODES, PTX_TESTS, KernelLibrary, device_library, emulated_library, host_compiler

# "nvcc": its PTX, on the emulator.
WHERE = [*MODES, "nvcc", *(["cuda"] if torch.cuda.is_available() else [])]
LANES = torch.arange(32)
G, T = LANES // 4, LANES % 4  # the manual's groupID and threadID_in_group


def _why_no_device(capability: tuple[int, int]) -> str | None:
    if shutil.which("nvcc") is None:
        return "nvcc is not on PATH"
    found = torch.cuda.get_device_capability()
    if found < capability or (capability == (9, 0) and found[0] != 9):
        return f"the device has compute capability {found}, the kernels need {capability}"
    return None


def library_for(where: object, source: str, capability: tuple[int, int]) -> Iterator[KernelLibrary]:
    if where == "cuda":
        reason = _why_no_device(capability)
        if reason:
            pytest.skip(reason)
        yield device_library(PTX_TESTS / source)
        return
    reason = why_no_nvcc_kernels() if where == "nvcc" else None if host_compiler() else "no C++ compiler on PATH"
    if reason:
        pytest.skip(reason)
    library = emulated_library()
    if where == "nvcc":
        library.configure(MODES[1])
        with nvcc_test_kernels():
            yield library
    else:
        library.configure(where)
        yield library


@pytest.fixture(params=WHERE, ids=str)
def sm80(request: pytest.FixtureRequest) -> Iterator[KernelLibrary]:
    yield from library_for(request.param, "ptx_sm80.cu", (8, 0))


@pytest.fixture(params=WHERE, ids=str)
def sm90(request: pytest.FixtureRequest) -> Iterator[KernelLibrary]:
    yield from library_for(request.param, "ptx_sm90.cu", (9, 0))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: the wrappers run emulated only")
def test_wrappers_run_on_the_device():
    assert "cuda" in WHERE


def random_int32(*shape: int) -> torch.Tensor:
    return torch.randint(-(2**31), 2**31 - 1, shape, dtype=torch.int64).to(torch.int32)


# ---- shuffles, votes, barriers, atomics


def test_shuffles(sm80):
    values = random_int32(32)
    out, wide = torch.empty(7, 32, dtype=torch.int32), torch.empty(32, dtype=torch.float64)
    values_d, out, wide = values.to(sm80.device), out.to(sm80.device), wide.to(sm80.device)
    sm80.call("ptx_shuffle", values_d, out, wide)
    sources = torch.stack(
        [
            (LANES * 7 + 3) % 32,
            torch.where(LANES >= 3, LANES - 3, LANES),
            torch.where(LANES < 27, LANES + 5, LANES),
            LANES ^ 9,
            LANES // 8 * 8 + (LANES + 1) % 8,
            torch.where(LANES % 8 >= 2, LANES - 2, LANES),
            torch.where(LANES % 16 < 13, LANES + 3, LANES),
        ]
    )
    torch.testing.assert_close(out.cpu(), values[sources], rtol=0, atol=0)
    torch.testing.assert_close(wide.cpu(), (values.double() * 1e-9 + 1.0)[LANES ^ 1], rtol=1e-15, atol=0)


@pytest.mark.parametrize("pattern", ["all", "none", "one", "random"])
def test_votes(sm80, pattern):
    votes = {"all": torch.ones(32), "none": torch.zeros(32), "one": (LANES == 21) * 1, "random": torch.rand(32) > 0.5}
    votes = votes[pattern].to(torch.int32)
    out = torch.empty(4, 32, dtype=torch.int32).to(sm80.device)
    sm80.call("ptx_vote", votes.to(sm80.device), out)
    out = out.cpu().long()
    bits = (votes.long() << LANES).sum().item()
    assert (out[0] & 0xFFFFFFFF == bits).all()
    assert (out[1] == int(bits != 0)).all()
    assert (out[2] == int(bits == 0xFFFFFFFF)).all()
    assert (out[3, :16] == bits & 0xFFFF).all()
    assert (out[3, 16:] == int(bits >> 16 == 0xFFFF)).all()


@pytest.mark.parametrize("kernel, threads", [("ptx_syncwarp", 64), ("ptx_syncthreads", 6 * 256)])
def test_barriers_publish_shared_memory(sm80, kernel, threads):
    values = random_int32(threads)
    out = torch.empty_like(values).to(sm80.device)
    sm80.call(kernel, values.to(sm80.device), out)
    group = 32 if kernel == "ptx_syncwarp" else 256
    assert torch.equal(out.cpu(), values.view(-1, group).flip(1).flatten())


@pytest.mark.parametrize("rounds", [1, 2, 7])
def test_named_barriers_pass_a_buffer_to_and_fro(sm80, rounds):
    values = random_int32(rounds, 64)
    out = torch.empty_like(values).to(sm80.device)
    sm80.call("ptx_named_barriers", values.to(sm80.device), out, rounds)
    assert torch.equal(out.cpu(), values.flip(1))


def test_atomics(sm80):
    values = torch.randint(-1000, 1000, (5 * 64,), dtype=torch.int32)
    results = [torch.zeros(1, dtype=dtype) for dtype in (torch.int32, torch.int32, torch.float32, torch.int32)]
    results[1] -= 5000
    results = [result.to(sm80.device) for result in results]
    sm80.call("ptx_atomics", values.to(sm80.device), *results, 5)
    remainders = torch.fmod(values, 8).float()  # C's % keeps the sign
    expected = [values.sum().item(), values.max().item(), remainders.sum().item(), 320]
    assert [result.item() for result in results] == expected


# ---- cp.async, ldmatrix, mma


@pytest.mark.parametrize("size", [4, 8, 16])
def test_cp_async(sm80, size):
    data = torch.randint(0, 256, (3, 64, size), dtype=torch.uint8)
    out = torch.zeros_like(data).to(sm80.device)
    sm80.call("ptx_cp_async", data.to(sm80.device), out, size)
    data[1, 1::2] = 0
    valid_bytes = torch.arange(64) % (size + 1)
    data[2].masked_fill_(torch.arange(size) >= valid_bytes[:, None], 0)
    assert torch.equal(out.cpu(), data)


def _matrix_registers(rows: torch.Tensor, matrices: int, trans: bool) -> torch.Tensor:
    """rows (32, 8) 16-bit patterns -> (32, matrices): what ldmatrix leaves in lane l's registers."""
    tiles = rows[: 8 * matrices].view(matrices, 8, 8)
    tiles = tiles.transpose(1, 2) if trans else tiles
    low, high = tiles[:, G, 2 * T], tiles[:, G, 2 * T + 1]
    return (low | high << 16).T


@pytest.mark.parametrize("matrices", [1, 2, 4])
@pytest.mark.parametrize("trans", [False, True])
def test_ldmatrix(sm80, matrices, trans):
    rows = torch.randint(0, 1 << 16, (32, 8))
    out = torch.empty(32, matrices, dtype=torch.int32).to(sm80.device)
    sm80.call("ptx_ldmatrix", rows.to(torch.uint16).to(sm80.device), out, matrices, int(trans))
    assert torch.equal(out.cpu().long() & 0xFFFFFFFF, _matrix_registers(rows, matrices, trans))


@pytest.mark.parametrize("matrices", [2, 4])
@pytest.mark.parametrize("trans", [False, True])
def test_stmatrix_is_the_inverse_of_ldmatrix(sm90, matrices, trans):
    rows = torch.randint(0, 1 << 16, (32, 8))
    registers = _matrix_registers(rows, matrices, trans).to(torch.uint32)
    out = torch.empty(8 * matrices, 8, dtype=torch.int32).to(torch.uint16).to(sm90.device)
    sm90.call("ptx_stmatrix", registers.contiguous().to(sm90.device), out, matrices, int(trans))
    assert torch.equal(out.cpu().long(), rows[: 8 * matrices])


def _a_fragments(a: torch.Tensor, per_register: int) -> torch.Tensor:
    """a (16, 8 * per_register) -> (32 lanes, 4 registers, per_register), the A operand of mma."""
    columns = per_register * T[:, None] + torch.arange(per_register)
    parts = [a[(G + 8 * (q % 2))[:, None], columns + 4 * per_register * (q // 2)] for q in range(4)]
    return torch.stack(parts, 1)


def _b_fragments(b: torch.Tensor, per_register: int) -> torch.Tensor:
    """b (8 * per_register, 8) -> (32 lanes, 2 registers, per_register), the B operand of mma."""
    rows = per_register * T[:, None] + torch.arange(per_register)
    return torch.stack([b[rows + 4 * per_register * q, G[:, None]] for q in range(2)], 1)


def _d_fragments(d: torch.Tensor) -> torch.Tensor:
    """d (16, n) -> (32 lanes, n / 2), the accumulators of mma.m16n8 and wgmma for one warp."""
    columns = torch.arange(0, d.shape[1], 8)[:, None]
    parts = [d[(G + 8 * (q // 2))[None], columns + (2 * T + q % 2)[None]] for q in range(4)]
    return torch.stack(parts, 2).transpose(0, 1).flatten(1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_mma_m16n8k16(sm80, dtype):
    a, b, c = torch.randn(16, 16).to(dtype), torch.randn(16, 8).to(dtype), torch.randn(16, 8)
    operands = [_a_fragments(a, 2), _b_fragments(b, 2), _d_fragments(c)]
    d = torch.empty(32, 4).to(sm80.device)
    sm80.call("ptx_mma", *[x.contiguous().to(sm80.device) for x in operands], d, int(dtype == torch.float16))
    expected = _d_fragments(a.double() @ b.double() + c.double())
    torch.testing.assert_close(d.cpu().double(), expected, rtol=1e-6, atol=4e-6)


def test_mma_m16n8k32_s8(sm80):
    a, b = [torch.randint(-128, 128, shape, dtype=torch.int8) for shape in ((16, 32), (32, 8))]
    c = torch.randint(-(2**20), 2**20, (16, 8), dtype=torch.int32)
    operands = [_a_fragments(a, 4), _b_fragments(b, 4), _d_fragments(c)]
    d = torch.empty(32, 4, dtype=torch.int32).to(sm80.device)
    sm80.call("ptx_mma_s8", *[x.contiguous().to(sm80.device) for x in operands], d)
    assert torch.equal(d.cpu(), _d_fragments(a.int() @ b.int() + c))


# ---- arithmetic, conversions, reductions


def test_math(sm80):
    x = torch.cat([torch.randn(500) * 4, torch.tensor([0.0, -0.0, torch.inf, 1e-40, 2.5, -3.5, 126.0, -140.0])])
    out = torch.empty(6, len(x)).to(sm80.device)
    sm80.call("ptx_math", x.to(sm80.device), out, len(x))
    flushed = torch.where(x.abs() < 1.1754944e-38, 0 * x, x).double()
    power = torch.exp2(x.double())
    expected = [
        torch.where(power < 1.1754944e-38, 0.0, power),
        torch.log2(flushed),
        1 / flushed,
        torch.tanh(x.double()),
        torch.rsqrt(x.double()),
        torch.round(x.double()).clamp(max=2.0**31 - 1),
    ]
    rtol = [4e-7, 1e-6, 4e-7, 2**-10, 4e-7, 1e-7]
    for row, (actual, wanted) in enumerate(zip(out.cpu().double(), expected, strict=True)):
        torch.testing.assert_close(actual, wanted, rtol=rtol[row], atol=1e-6 if row == 1 else 0, equal_nan=True)


def test_integer_intrinsics(sm80):
    a, b = random_int32(32), random_int32(32)
    a[0] = 0
    out = torch.empty(4, 32, dtype=torch.int32).to(sm80.device)
    sm80.call("ptx_integer", a.to(sm80.device), b.to(sm80.device), out)
    bytes_a, bytes_b = a.view(torch.int8).view(32, 4).int(), b.view(torch.int8).view(32, 4).int()
    dot = (bytes_a * bytes_b).sum(1, dtype=torch.int32) + LANES.int()
    picked = torch.cat([bytes_a, bytes_b], 1)[:, [0, 4, 2, 6]].to(torch.int8).view(torch.int32).flatten()
    bits = (a.long()[:, None] >> torch.arange(32)) & 1
    first = torch.where(bits.any(1), bits.argmax(1) + 1, 0)
    for actual, expected in zip(out.cpu(), [dot, picked, bits.sum(1).int(), first.int()], strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_conversions_round_to_nearest_even(sm80, dtype):
    patterns = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(dtype).float()
    between = (patterns[:-1] + patterns[1:]) / 2  # ties, where both neighbours are finite
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 65519.0, 65520.0, 1e-8, 5.9e-8, -3e-8, 1e30])
    x = torch.cat([patterns, between, torch.randn(4096) * 100, special])
    x = x[: len(x) // 256 * 256 - 256]
    x = torch.cat([x, special, special.new_zeros(256 - len(special))])
    single, pairs = torch.empty_like(x, dtype=dtype), torch.empty_like(x, dtype=dtype)
    back = torch.empty_like(x)
    single, pairs, back = single.to(sm80.device), pairs.to(sm80.device), back.to(sm80.device)
    sm80.call("ptx_convert", x.to(sm80.device), single, pairs, back, len(x), int(dtype == torch.float16))
    for name, actual in {"single": single, "pairs": pairs, "back": back}.items():
        torch.testing.assert_close(actual.cpu().to(dtype), x.to(dtype), rtol=0, atol=0, equal_nan=True, msg=name)


def test_reductions(sm80):
    x = torch.randn(128)
    out = torch.empty(4, 128).to(sm80.device)
    sm80.call("ptx_reduce", x.to(sm80.device), out)
    expected = torch.stack(
        [
            x.view(32, 4).sum(1).repeat_interleave(4),
            x.view(4, 32).amax(1).repeat_interleave(32),
            x.sum().expand(128),
            x.amax().expand(128),
        ]
    )
    torch.testing.assert_close(out.cpu(), expected, rtol=1e-5, atol=1e-5)


# ---- sm_90: election, mbarriers, bulk copies


def test_elect_sync_elects_one_lane_a_warp(sm90):
    out = torch.empty(8, 32, dtype=torch.int32).to(sm90.device)
    sm90.call("ptx_elect", out)
    assert (out.cpu().sum(1) == 1).all()


@pytest.mark.parametrize("rounds", [1, 4, 9])
def test_mbarrier_ring(sm90, rounds):
    values = random_int32(rounds, 32)
    out = torch.empty(rounds, 3, 32, dtype=torch.int32).to(sm90.device)
    sm90.call("ptx_mbarrier", values.to(sm90.device), out, rounds)
    assert torch.equal(out.cpu(), values.flip(1)[:, None].expand(-1, 3, -1))


def test_cp_async_arrives_at_an_mbarrier(sm90):
    values = random_int32(64, 4)
    out = torch.empty_like(values).to(sm90.device)
    sm90.call("ptx_cp_async_arrive", values.to(sm90.device), out)
    assert torch.equal(out.cpu(), values.flip(0))


def test_bulk_copies(sm90):
    blocks = 3
    values = torch.randint(-100, 100, (blocks, 64)).float()  # integers: the order of the additions does not matter
    out, total = torch.empty_like(values).to(sm90.device), torch.ones(64).to(sm90.device)
    sm90.call("ptx_bulk", values.to(sm90.device), out, total, blocks)
    assert torch.equal(out.cpu(), values)
    assert torch.equal(total.cpu(), 1 + (values + 1).sum(0))


class TmaShape(ctypes.Structure):
    _fields_ = (
        ("dim", ctypes.c_uint64 * 5),
        ("stride", ctypes.c_uint64 * 5),
        ("box", ctypes.c_uint32 * 5),
        ("load_at", ctypes.c_int32 * 5),
        ("store_at", ctypes.c_int32 * 5),
    )


def _swizzled(address: torch.Tensor, swizzle: int) -> torch.Tensor:
    """Byte addresses under a swizzle of 32, 64 or 128 bytes: bits 4.. are XORed with bits 7.."""
    return address ^ ((address >> 7) % (swizzle // 16) << 4) if swizzle else address


# name: dims, box, load at, store at (innermost first), dtype, swizzle. The rows of the tensor have padding.
TMA_CASES = {
    "1d": ((100,), (64,), (0,), (0,), torch.float32, 0),
    "1d-past-the-end": ((100,), (64,), (80,), (70,), torch.float32, 0),
    "2d-128B": ((96, 40), (64, 16), (0, 8), (32, 20), torch.bfloat16, 128),
    # Only loads may start before the tensor (PTX ISA, "Restriction on Tensor Copy instructions").
    "2d-64B-before-the-start": ((72, 40), (32, 24), (-8, -3), (3, 20), torch.float16, 64),
    "2d-32B": ((48, 33), (16, 32), (16, 1), (40, 30), torch.float16, 32),
    "2d-int8-128B": ((200, 20), (128, 8), (100, 16), (72, 0), torch.int8, 128),
    "3d-outside": ((64, 8, 3), (64, 4, 2), (0, 4, 5), (0, 2, 1), torch.bfloat16, 128),
    "4d-128B": ((64, 3, 37, 2), (64, 1, 16, 1), (0, 2, 30, 1), (0, 1, 5, 0), torch.float16, 128),
    "5d": ((16, 3, 4, 2, 3), (8, 2, 3, 2, 1), (8, 1, 2, 1, 2), (4, 0, 0, 0, 1), torch.int32, 0),
}


def _box(tensor: torch.Tensor, at: tuple[int, ...], box: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """For each element of the box, innermost dimension fastest: its flat index in ``tensor``, and if it is inside."""
    coordinates = torch.cartesian_prod(*[torch.arange(b) + a for a, b in zip(at[::-1], box[::-1], strict=True)])
    coordinates = coordinates.view(-1, len(box))
    sizes = torch.tensor(tensor.shape)
    inside = ((coordinates >= 0) & (coordinates < sizes)).all(1)
    index = (coordinates * torch.tensor(tensor.stride())).sum(1)
    return index, inside


@pytest.mark.parametrize("adds", [False, True], ids=["store", "reduce-add"])
@pytest.mark.parametrize("case", TMA_CASES)
def test_tma(sm90, case, adds):
    dim, box, load_at, store_at, dtype, swizzle = TMA_CASES[case]
    if adds and dtype == torch.int8:
        pytest.skip("there is no 8-bit addition")
    padding = 16  # elements between rows that belong to no tensor
    storage = torch.randint(-100, 100, (*dim[:0:-1], dim[0] + padding)).to(dtype)
    storage = storage[..., : (dim[0] + padding) // 16 * 16].contiguous()
    source = storage[..., : dim[0]]
    target_storage = torch.randint(-20, 20, storage.shape).to(dtype)
    target = target_storage[..., : dim[0]]

    rank, size = len(dim), dtype.itemsize
    shape = TmaShape()
    shape.dim[:rank], shape.stride[:rank], shape.box[:rank] = dim, source.stride()[::-1], box
    shape.load_at[:rank], shape.store_at[:rank] = load_at, store_at
    elements = torch.tensor(box).prod().item()
    image = torch.zeros(elements * size, dtype=torch.uint8).to(sm90.device)
    element = [torch.float32, torch.float16, torch.bfloat16, torch.int32, torch.int8].index(dtype)
    storage_d, target_d = storage.to(sm90.device), target_storage.clone().to(sm90.device)
    sm90.call("ptx_tma", storage_d, target_d, shape, rank, element, swizzle, int(adds), image)

    index, inside = _box(source, load_at, box)
    loaded = torch.where(inside, storage.flatten()[torch.where(inside, index, 0)], torch.zeros((), dtype=dtype))
    byte = torch.arange(elements * size)
    expected_image = torch.empty_like(image.cpu())
    expected_image[_swizzled(byte, swizzle)] = loaded.view(torch.uint8)
    assert torch.equal(image.cpu(), expected_image)

    index, inside = _box(target, store_at, box)
    expected = target_storage.flatten().clone()
    values = loaded[inside] + (expected[index[inside]] if adds else 0)
    expected[index[inside]] = values.to(dtype)
    assert torch.equal(target_d.cpu().flatten(), expected)


# ---- wgmma


_TILE_FIELDS = ("offset", "leading_bytes", "stride_bytes", "step_bytes", "steps_per_block", "block_bytes")


class WgmmaTile(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_uint32) for name in _TILE_FIELDS)


class WgmmaCall(ctypes.Structure):
    _fields_ = (
        ("a", WgmmaTile),
        ("b", WgmmaTile),
        ("image_bytes", ctypes.c_uint32),
        *((name, ctypes.c_int) for name in ("swizzle", "steps", "a_in_registers", "a_is_mn_major", "b_is_mn_major")),
    )


def _lay_out(matrix: torch.Tensor, mn_major: bool, swizzle: int) -> tuple[torch.Tensor, WgmmaTile]:
    """Lays a (rows, k) operand out in shared memory as the matrix descriptors want it; returns bytes and descriptor.

    K-major: blocks of ``swizzle`` bytes of k lie one after another, each a column of lines, one line a row. MN-major:
    the same with rows and k exchanged. Without swizzle a line has 16 bytes.
    """
    rows, depth = matrix.shape
    size = matrix.element_size()
    line = swizzle or 16
    r, k = torch.meshgrid(torch.arange(rows), torch.arange(depth), indexing="ij")
    along, across = (r, k) if mn_major else (k, r)  # contiguous index, index of the line
    lines = depth if mn_major else rows
    block = along * size // line
    address = block * lines * line + across * line + along * size % line
    image = torch.zeros(rows * depth * size, dtype=torch.uint8)
    byte = _swizzled(address[..., None] + torch.arange(size), swizzle)
    image[byte.flatten()] = matrix.contiguous().view(torch.uint8).flatten()
    next_block, next_eight_lines = lines * line, 8 * line
    if mn_major:
        # 16 k a step, that is two patterns of 8 lines.
        leading, stride = (next_block, next_eight_lines) if swizzle else (next_eight_lines, next_block)
        return image, WgmmaTile(0, leading, stride, 2 * next_eight_lines, depth, 0)
    if swizzle:
        return image, WgmmaTile(0, 16, next_eight_lines, 32, swizzle // 32, next_block)
    return image, WgmmaTile(0, next_block, next_eight_lines, 2 * next_block, depth, 0)


def _run_wgmma(library: KernelLibrary, a: torch.Tensor, b: torch.Tensor, swizzle: int, a_source: str, b_mn: bool):
    """a (64, k), b (n, k) -> accumulators (4 warps, 32 lanes, n / 2) of a @ b.T."""
    a_mn = a_source == "mn"
    per_register = 4 // a.element_size()
    a_image, a_tile = _lay_out(a, a_mn, swizzle)
    b_image, b_tile = _lay_out(b, b_mn, swizzle)
    b_tile.offset = (len(a_image) + 1023) // 1024 * 1024
    image = torch.zeros(b_tile.offset + (len(b_image) + 1023) // 1024 * 1024, dtype=torch.uint8)
    image[: len(a_image)] = a_image
    image[b_tile.offset : b_tile.offset + len(b_image)] = b_image
    step = 8 * per_register
    steps = a.shape[1] // step
    tiles = a.view(4, 16, steps, step).permute(2, 0, 1, 3)  # (step, warp, row, k)
    fragments = torch.stack([_a_fragments(tile, per_register) for tile in tiles.flatten(0, 1)])
    call = WgmmaCall(a_tile, b_tile, len(image), swizzle, steps, int(a_source == "registers"), int(a_mn), int(b_mn))
    element = {torch.float16: 1, torch.bfloat16: 2, torch.int8: 4}[a.dtype]
    n = b.shape[0]
    d = torch.full((4, 32, n // 2), torch.nan).to(library.device)
    library.call("ptx_wgmma", image.to(library.device), fragments.contiguous().to(library.device), call, element, n, d)
    return d.cpu()


@pytest.mark.parametrize("swizzle", [0, 32, 64, 128])
@pytest.mark.parametrize("majors", [("k", False), ("registers", False), ("registers", True), ("k", True), ("mn", True)])
@pytest.mark.parametrize("n, dtype", [(16, torch.float16), (64, torch.bfloat16), (96, torch.float16)])
def test_wgmma_m64k16(sm90, n, dtype, majors, swizzle):
    a_source, b_mn = majors
    if b_mn and n * 2 % (swizzle or 16):
        pytest.skip("N-major tiles are whole lines of N")
    k = 64
    a, b = torch.randn(64, k).to(dtype), torch.randn(n, k).to(dtype)
    d = _run_wgmma(sm90, a, b, swizzle, a_source, b_mn)
    product = a.double() @ b.double().T
    for warp in range(4):
        expected = _d_fragments(product[16 * warp : 16 * warp + 16])
        torch.testing.assert_close(d[warp].double(), expected, rtol=1e-5, atol=2e-5)


def test_wgmma_of_256_columns(sm90):
    a, b = torch.randn(64, 64).bfloat16(), torch.randn(256, 64).bfloat16()
    product = a.double() @ b.double().T
    for b_mn in (False, True):
        d = _run_wgmma(sm90, a, b, 128 if b_mn else 64, "k", b_mn)
        for warp in range(4):
            expected = _d_fragments(product[16 * warp : 16 * warp + 16])
            torch.testing.assert_close(d[warp].double(), expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("swizzle", [0, 32, 64, 128])
@pytest.mark.parametrize("a_source", ["k", "registers"])
@pytest.mark.parametrize("n", [16, 64, 256])
def test_wgmma_m64k32_s8(sm90, n, a_source, swizzle):
    a, b = [torch.randint(-128, 128, (rows, 128), dtype=torch.int8) for rows in (64, n)]
    d = _run_wgmma(sm90, a, b, swizzle, a_source, False)
    product = (a.int() @ b.int().T).float()  # below 2^24: exact in fp32
    for warp in range(4):
        assert torch.equal(d[warp], _d_fragments(product[16 * warp : 16 * warp + 16]))
