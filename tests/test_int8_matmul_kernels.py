"""The CUDA kernels of int8_matmul, each tile and split by name, under adversarial schedules or on a device.

The integers are compared exactly: with scales of 1 and fp32 output the result is the int32 sum, rounded once.
"""

from __future__ import annotations

import ctypes
import shutil
from enum import IntEnum

import pytest
import torch
from accuracy import assert_as_accurate_as_eager
from emulated import MODES, EmulatedLibrary, KernelLibrary, device_kernels, emulated_kernels, host_compiler

import fastattn
from fastattn.ops import int8_matmul_eager as eager
from fastattn.ops.calls import Int8MatmulCall
from fastattn.ops.int8_matmul import ACTIVATIONS
from fastattn.ops.linear import ACTIVATION_FUNCTIONS

ON_DEVICE = torch.cuda.is_available() and shutil.which("nvcc") is not None
pytestmark = pytest.mark.skipif(host_compiler() is None, reason="no C++ compiler on PATH")

# DType of csrc/common/dtype.h, Activation and Int8Tile of csrc/int8_matmul.
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 5}
ACTIVATION_CODES = {name: code for code, name in enumerate(ACTIVATIONS)}


class Tile(IntEnum):
    FEW_ROWS_8 = 0
    FEW_ROWS_16 = 1
    FEW_ROWS_32 = 2
    T64X64 = 3
    T64X128 = 4
    T128X128 = 5
    T128X256 = 6
    HOPPER_128X128 = 7
    HOPPER_128X256 = 8


FEW_ROWS = (Tile.FEW_ROWS_8, Tile.FEW_ROWS_16, Tile.FEW_ROWS_32)
LARGE = (Tile.T64X64, Tile.T64X128, Tile.T128X128, Tile.T128X256)
HOPPER = (Tile.HOPPER_128X128, Tile.HOPPER_128X256)
RUNS_HOPPER_TILES = not ON_DEVICE or torch.cuda.get_device_capability() == (9, 0)


class Int8Call(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_int)
        for name in ("rows", "columns", "depth", "stride_a", "stride_b", "a_dtype", "bias_dtype", "out_dtype",
                     "activation", "tile", "splits", "multiprocessors")
    )  # fmt: skip


@pytest.fixture(params=["device"] if ON_DEVICE else MODES, ids=str)
def library(request) -> KernelLibrary:
    if request.param == "device":
        return device_kernels("int8_matmul")
    emulated = emulated_kernels("int8_matmul")
    emulated.configure(request.param)
    return emulated


@pytest.fixture
def plain_library() -> KernelLibrary:
    """For tests of arithmetic, in which the schedule plays no part."""
    if ON_DEVICE:
        return device_kernels("int8_matmul")
    emulated = emulated_kernels("int8_matmul")
    emulated.configure(MODES[0])
    return emulated


def random_int8(*shape):
    return torch.randint(-128, 128, shape, dtype=torch.int8)


def exact(a, b):
    return (a.double() @ b.double().T).float()


def poisoned(shape, dtype):
    """NaN, or bytes that no test expects; a multiple of 64 more behind it, to see that nothing is written there."""
    storage = torch.full((shape[0] * shape[1] + 64,), torch.nan if dtype.is_floating_point else 77, dtype=dtype)
    return storage, storage[: shape[0] * shape[1]].view(shape)


def multiply(library, a, b, tile, splits=1, a_scale=None, b_scale=None, bias=None, activation=None,
             out_dtype=torch.float32, multiprocessors=132):  # fmt: skip
    """One product by the kernel of ``tile``; checks that nothing but the output was written."""
    if tile in HOPPER and not RUNS_HOPPER_TILES:
        pytest.skip(f"{tile.name} is for compute capability 9.0")
    rows, columns = a.shape[0], b.shape[0]
    storage, out = poisoned((rows, columns), out_dtype)
    a_scale = torch.ones(rows) if a_scale is None else a_scale
    b_scale = torch.ones(columns) if b_scale is None else b_scale
    nothing = torch.empty(0)
    call = Int8Call(rows, columns, a.shape[1], a.stride(0), b.stride(0), DTYPES[a.dtype],
                    DTYPES[torch.float32 if bias is None else bias.dtype], DTYPES[out_dtype],
                    ACTIVATION_CODES[activation], int(tile), splits, multiprocessors)  # fmt: skip
    device = library.device
    moved = [a, a_scale, b, b_scale, nothing if bias is None else bias, out]
    if device == "cuda":
        storage = storage.cuda()
        moved = [_on_device(tensor) for tensor in moved[:-1]] + [storage[: rows * columns].view(rows, columns)]
    workspace_bytes = torch.tensor([-1])
    library.call("int8_multiply", *moved, nothing, workspace_bytes, call)
    workspace = torch.full((int(workspace_bytes) + 256,), 0x55, dtype=torch.uint8, device=device)
    offset = -workspace.data_ptr() % 256
    library.call("int8_multiply", *moved, workspace[offset:], workspace_bytes, call)
    behind = storage[rows * columns :]
    assert behind.isnan().all(), "written past the output"
    return moved[-1].cpu()


def _on_device(tensor):
    """With the strides and the offset from an aligned address that the tensor has here."""
    storage = tensor.untyped_storage()
    moved = torch.empty(storage.nbytes(), dtype=torch.uint8, device="cuda")
    moved.copy_(torch.empty(0, dtype=torch.uint8).set_(storage))
    return moved.view(tensor.dtype).as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())


# --- every tile under every schedule ---------------------------------------------------------------------------------

# One tile short of, exactly, and one past a tile in each direction; k of one byte, one chunk, past the ring.
TILE_SHAPES = {
    Tile.FEW_ROWS_8: [(1, 8, 64), (16, 9, 2100), (7, 17, 130)],
    Tile.FEW_ROWS_16: [(1, 1, 1), (9, 33, 2063), (16, 16, 256)],
    Tile.FEW_ROWS_32: [(16, 65, 1040), (8, 32, 127), (3, 31, 17)],
    Tile.T64X64: [(64, 64, 128), (65, 63, 130), (17, 130, 640)],
    Tile.T64X128: [(64, 128, 64), (63, 130, 97), (130, 65, 400)],
    Tile.T128X128: [(128, 128, 64), (130, 97, 65), (97, 129, 272)],
    Tile.T128X256: [(128, 256, 64), (129, 130, 97), (63, 257, 400)],
    Tile.HOPPER_128X128: [(128, 128, 128), (130, 97, 65), (97, 129, 1100)],
    Tile.HOPPER_128X256: [(128, 256, 128), (129, 130, 97), (63, 257, 700)],
}


TILE_CASES = [(tile, shape) for tile, shapes in TILE_SHAPES.items() for shape in shapes]


@pytest.mark.parametrize("tile, shape", TILE_CASES, ids=[f"{t.name}-{'x'.join(map(str, s))}" for t, s in TILE_CASES])
def test_integer_sums_are_exact(library, tile, shape):
    rows, columns, depth = shape
    a, b = random_int8(rows, depth), random_int8(columns, depth)
    assert torch.equal(multiply(library, a, b, tile), exact(a, b))


@pytest.mark.parametrize("tile", [Tile.T64X64, Tile.T64X128], ids=lambda tile: tile.name)
@pytest.mark.parametrize("splits", [2, 3, 8])
def test_split_sums_are_exact(library, tile, splits):
    a, b = random_int8(66, 1000), random_int8(71, 1000)
    assert torch.equal(multiply(library, a, b, tile, splits), exact(a, b))


@pytest.mark.parametrize("tile", HOPPER, ids=lambda tile: tile.name)
@pytest.mark.parametrize("depth, blocks", [(100, 2), (300, 2), (512, 2), (900, 1)])
def test_persistent_blocks_take_several_tiles(library, tile, depth, blocks):
    """Five tiles, of which two blocks take three and two: the ring, its phases and the staging area are used again.

    900 of k are more stages than the ring has: a warpgroup that ran ahead of the other would be two phases ahead. From
    400 of k on, 128x256 tiles are written by halves: 512 are no more stages than those at both ends.
    """
    columns = 128 if tile == Tile.HOPPER_128X128 else 256
    a, b = random_int8(7, depth), random_int8(4 * columns + 3, depth)
    assert torch.equal(multiply(library, a, b, tile, multiprocessors=blocks), exact(a, b))


@pytest.mark.parametrize("depth", [385, 4096, 4097])
def test_tiles_by_halves_and_whole(plain_library, depth):
    """The fewest and the most stages of a tile that is written by halves, and one more."""
    a, b = random_int8(130, depth), random_int8(300, depth)
    assert torch.equal(multiply(plain_library, a, b, Tile.HOPPER_128X256, multiprocessors=1), exact(a, b))


def test_many_tiles_are_each_computed_once(plain_library):
    """More than one group of tiles in the order of the blocks, and a last group of fewer rows."""
    a, b = random_int8(64 * 10 + 1, 16), random_int8(64 * 3 + 1, 16)
    assert torch.equal(multiply(plain_library, a, b, Tile.T64X64), exact(a, b))


# --- shapes and strides ----------------------------------------------------------------------------------------------

EDGES = (0, 1, 7, 16, 17, 63, 65, 97, 130)


@pytest.mark.parametrize("depth", EDGES)
@pytest.mark.parametrize("rows", EDGES)
def test_odd_shapes(plain_library, rows, depth):
    for columns in EDGES:
        a, b = random_int8(rows, depth), random_int8(columns, depth)
        tile = (FEW_ROWS if rows <= 16 else LARGE)[(columns + depth) % 3]
        assert torch.equal(multiply(plain_library, a, b, tile), exact(a, b)), (tile, columns)
        if RUNS_HOPPER_TILES and depth > 0 and columns in (1, 65, 130):
            tile = HOPPER[(columns + depth) % 2]
            assert torch.equal(multiply(plain_library, a, b, tile), exact(a, b)), (tile, columns)


@pytest.mark.parametrize(
    "tile", [Tile.FEW_ROWS_16, Tile.T64X64, Tile.T128X256, Tile.HOPPER_128X128], ids=lambda tile: tile.name
)
@pytest.mark.parametrize("depth", [97, 112, 250])
@pytest.mark.parametrize("stride, offset", [(128, 0), (128, 16), (120, 0), (131, 0), (128, 1), (128, 8), (0, 0)])
def test_strided_rows(plain_library, tile, depth, stride, offset):
    """Aligned rows are read in place, others from an aligned copy; what lies between rows is never read as data."""
    rows, columns = (11 if tile in FEW_ROWS else 66), 70
    a = random_int8(rows * 131 + 200)[offset:].as_strided((rows, depth), (stride, 1))
    b = random_int8(columns * 131 + 200)[offset:].as_strided((columns, depth), (stride, 1))
    assert torch.equal(multiply(plain_library, a, b, tile), exact(a, b))
    assert torch.equal(multiply(plain_library, a.clone(), b, tile), exact(a, b))


# --- epilogue --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    "tile, splits", [(Tile.FEW_ROWS_16, 1), (Tile.T64X64, 2), (Tile.T128X128, 1), (Tile.HOPPER_128X256, 1)]
)
def test_epilogue_is_as_accurate_as_eager(plain_library, tile, splits, activation, out_dtype):
    rows = 13 if tile in FEW_ROWS else 70
    depth = 600 if tile in HOPPER else 300
    # 132 columns are stored as vectors, 75 one by one.
    for columns, bias_dtype in ((132, torch.float32), (75, torch.bfloat16), (132, torch.float16), (75, None)):
        a, b = random_int8(rows, depth), random_int8(columns, depth)
        a_scale, b_scale = torch.rand(rows) * 0.01, torch.rand(columns) * 0.01
        bias = None if bias_dtype is None else torch.randn(columns, dtype=bias_dtype)
        actual = multiply(plain_library, a, b, tile, splits, a_scale, b_scale, bias, activation, out_dtype)
        call = Int8MatmulCall(a, b, a_scale, b_scale, bias, ACTIVATIONS[activation], out_dtype)
        reference = (a.double() @ b.double().T) * a_scale.double()[:, None] * b_scale.double()
        activate = ACTIVATION_FUNCTIONS[ACTIVATIONS[activation]]
        reference = activate(reference if bias is None else reference + bias.double())
        assert_as_accurate_as_eager(actual, eager.int8_matmul(call), reference)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_over_their_range(plain_library, activation):
    bias = torch.cat([torch.linspace(-200, 200, 801), torch.linspace(-14, 14, 1999), torch.tensor([-0.0])])
    a, b = torch.zeros(1, 16, dtype=torch.int8), torch.zeros(bias.numel(), 16, dtype=torch.int8)
    actual = multiply(plain_library, a, b, Tile.FEW_ROWS_32, bias=bias, activation=activation)
    call = Int8MatmulCall(a, b, torch.ones(1), torch.ones(bias.numel()), bias, ACTIVATIONS[activation], torch.float32)
    reference = ACTIVATION_FUNCTIONS[ACTIVATIONS[activation]](bias.double())[None]
    if activation == "gelu":
        reference = (bias.double() * 0.5 * torch.special.erfc(-bias.double() * 0.5**0.5))[None]
    assert_as_accurate_as_eager(actual, eager.int8_matmul(call), reference)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_scales_give_nan_rows(plain_library, activation):
    a, b = random_int8(20, 32), random_int8(40, 32)
    a_scale = torch.rand(20)
    a_scale[3] = torch.nan
    for tile in (Tile.FEW_ROWS_8, Tile.T64X64):
        rows = 16 if tile in FEW_ROWS else 20
        out = multiply(plain_library, a[:rows], b, tile, a_scale=a_scale[:rows], activation=activation)
        assert out.isnan().any(1).tolist() == [row == 3 for row in range(rows)] and out[3].isnan().all()


# --- quantisation ----------------------------------------------------------------------------------------------------


def quantize(library, x, stride_q=None):
    rows, depth = x.shape
    stride_q = depth if stride_q is None else stride_q
    q, scale = torch.full((rows * stride_q + 16,), 77, dtype=torch.int8), torch.full((rows + 1,), torch.nan)
    device = [x, q, scale] if library.device == "cpu" else [_on_device(x), q.cuda(), scale.cuda()]
    library.call("int8_quantize", *device, rows, depth, x.stride(0), stride_q, DTYPES[x.dtype])
    q, scale = device[1].cpu(), device[2].cpu()
    assert (q[rows * stride_q :] == 77).all() and scale[rows:].isnan().all(), "written past the output"
    assert (q[: rows * stride_q].view(rows, stride_q)[:, depth:] == 77).all(), "written between rows"
    return q[: rows * stride_q].view(rows, stride_q)[:, :depth], scale[:rows]


def assert_quantizes_like_eager(library, x, stride_q=None):
    q, scale = quantize(library, x, stride_q)
    expected_q, expected_scale = eager.quantize(x)
    assert torch.equal(q, expected_q)
    assert torch.equal(scale.isnan(), expected_scale.isnan())
    assert torch.equal(scale.nan_to_num(), expected_scale.nan_to_num())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("depth", [1, 7, 16, 100, 1024, 1025, 4097])
def test_quantization_equals_eager_bit_for_bit(library, dtype, depth):
    assert_quantizes_like_eager(library, (torch.randn(9, depth) * torch.rand(9, 1).exp()).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("depth", [0, 17, 65, 513, 2049, 8193, 16385, 20000])
def test_quantization_of_any_depth_and_stride(plain_library, dtype, depth):
    x = torch.randn(5, depth + 24).to(dtype)
    for offset in (0, 1, 8):
        assert_quantizes_like_eager(plain_library, x[:, offset : offset + depth])
    assert_quantizes_like_eager(plain_library, x[:1, :depth].expand(3, -1), stride_q=depth + 13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_quantization_of_special_rows(plain_library, dtype):
    for depth in (70, 3000, 17000):
        x = torch.randn(8, depth)
        x[0], x[1], x[2] = 0.0, -0.0, 1e-44
        x[3, depth - 1], x[4, 0], x[5, depth // 2] = torch.nan, torch.inf, -torch.inf
        x[6] *= 1e-38
        assert_quantizes_like_eager(plain_library, x.to(dtype))


def test_ties_round_to_even(plain_library):
    q, scale = quantize(plain_library, torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, -127.0]]))
    assert scale.item() == 1.0 and q[0].tolist() == [127, 0, 2, 2, 0, -2, -2, -127]


# --- the whole linear layer ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "rows, tile, splits",
    [
        (1, Tile.FEW_ROWS_8, 1),
        (3, Tile.FEW_ROWS_32, 1),  # quantised by the product itself, as the row above
        (5, Tile.FEW_ROWS_8, 1),
        (40, Tile.T64X64, 4),
        (40, Tile.HOPPER_128X128, 1),
    ],
)
def test_linear_equals_quantize_then_matmul(library, dtype, rows, tile, splits):
    x = torch.randn(rows, 203).to(dtype)
    x[0, 7] = torch.nan if rows == 3 else 1.0
    weight, weight_scale = fastattn.quantize_int8(torch.randn(50, 203), backend="eager")
    bias = torch.randn(50)
    q, scale = eager.quantize(x)
    fused = multiply(library, x, weight, tile, splits, None, weight_scale, bias, "silu", dtype)
    separate = multiply(library, q, weight, tile, splits, scale, weight_scale, bias, "silu", dtype)
    assert torch.equal(fused.isnan(), separate.isnan()) and torch.equal(fused.nan_to_num(), separate.nan_to_num())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("depth", [0, 1, 16, 130, 1030, 8192, 8200])
def test_quantisation_inside_the_product(plain_library, dtype, depth):
    """4 rows of 8192 are the most that one launch does; expanded and offset rows are read in place."""
    weight, weight_scale = fastattn.quantize_int8(torch.randn(9, depth), backend="eager")
    full = torch.randn(4, depth + 3).to(dtype)
    for x in (full[:, :depth], full[:, 3:], full[:1, :depth].expand(4, -1)):
        q, scale = eager.quantize(x)
        fused = multiply(plain_library, x, weight, Tile.FEW_ROWS_16, 1, None, weight_scale, out_dtype=dtype)
        assert torch.equal(fused, multiply(plain_library, q, weight, Tile.T64X64, 1, scale, weight_scale,
                                           out_dtype=dtype))  # fmt: skip


def test_quantisation_inside_the_product_with_much_shared_memory(plain_library):
    """Beyond 40 KiB a launch asks for it, and a kernel for the same always: the emulator reports what differs."""
    for depth in (6400, 7000, 8192):
        weight, weight_scale = fastattn.quantize_int8(torch.randn(3, depth), backend="eager")
        x = torch.randn(4, depth).half()
        q, scale = eager.quantize(x)
        fused = multiply(plain_library, x, weight, Tile.FEW_ROWS_32, 1, None, weight_scale, out_dtype=x.dtype)
        separate = multiply(plain_library, q, weight, Tile.FEW_ROWS_32, 1, scale, weight_scale, out_dtype=x.dtype)
        assert torch.equal(fused, separate)


# --- the choice of a tile --------------------------------------------------------------------------------------------


def plan(library, *shape, multiprocessors=132, compute_capability=80):
    result = torch.zeros(2, dtype=torch.int32)
    library.call("int8_plan", *shape, multiprocessors, compute_capability, result)
    return Tile(int(result[0])), int(result[1])


@pytest.mark.parametrize(
    "shape, capability, expected",
    [
        ((1, 4096, 4096), 80, (Tile.FEW_ROWS_8, 1)),
        ((16, 14336, 4096), 90, (Tile.FEW_ROWS_32, 1)),
        ((8192, 8192, 8192), 80, (Tile.T128X256, 1)),
        ((8192, 8192, 8192), 120, (Tile.T128X256, 1)),
        ((8192, 8192, 8192), 90, (Tile.HOPPER_128X256, 1)),
        ((1024, 1024, 4096), 90, (Tile.HOPPER_128X128, 1)),
        ((0, 0, 0), 90, (Tile.FEW_ROWS_8, 1)),
    ],
)
def test_plans(plain_library, shape, capability, expected):
    assert plan(plain_library, *shape, compute_capability=capability) == expected


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_narrow_products_are_split_over_the_card(plain_library, capability):
    tile, splits = plan(plain_library, 32, 4096, 4096, compute_capability=capability)
    assert tile in (Tile.T64X64, Tile.T64X128) and splits > 1
    for rows in (17, 64, 100, 1000):
        for columns in (1, 100, 1000, 5000):
            for depth in (0, 1, 64, 100, 5000):
                tile, splits = plan(plain_library, rows, columns, depth, compute_capability=capability)
                assert 1 <= splits <= 8
                assert tile in LARGE or (tile in HOPPER and capability == 90 and depth > 0)


def test_the_emulated_library_is_the_one_under_test(plain_library):
    assert ON_DEVICE or isinstance(plain_library, EmulatedLibrary)
