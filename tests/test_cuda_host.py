"""What launchers ask of the CUDA runtime and the driver: tensor maps, shared memory, clusters, errors.

cuda_host.cpp stands in for both. Numbers of the driver's enumerations are those of its manual.
"""

from __future__ import annotations

import ctypes
import os
import subprocess

import pytest
from emulated import BUILD, ROOT
from setup_script import setup_script

NVCC = setup_script().find_nvcc()
pytestmark = pytest.mark.skipif(NVCC is None, reason="CUDA's headers come with nvcc, which was not found")
BFLOAT16, HALF, FLOAT, INT8 = range(4)


_ENUMERATORS = ("element", "rank", "interleave", "swizzle", "promotion", "fill")


class Encoded(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int32) for name in ("calls", *_ENUMERATORS)),
        ("box", ctypes.c_uint32 * 5),
        ("element_strides", ctypes.c_uint32 * 5),
        ("base", ctypes.c_uint64),
        ("dim", ctypes.c_uint64 * 5),
        ("stride_bytes", ctypes.c_uint64 * 4),
    )


class Launched(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_int32),
        ("block", ctypes.c_int32),
        ("clusters", ctypes.c_int32),
        ("cluster", ctypes.c_int32 * 3),
        ("shared_bytes", ctypes.c_int32),
        ("granted_shared_bytes", ctypes.c_int32),
        ("argument", ctypes.c_int32),
    )


class MapCall(ctypes.Structure):
    _fields_ = (
        ("base", ctypes.c_uint64),
        ("dim", ctypes.c_uint64 * 4),
        ("stride", ctypes.c_uint64 * 4),
        ("box", ctypes.c_uint32 * 4),
        ("swizzle", ctypes.c_int32),
    )


@pytest.fixture(scope="module")
def host() -> ctypes.CDLL:
    folder = BUILD / f"cuda_host_{os.getpid()}"  # test processes run at the same time
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / "libcuda_host.so"
    source = ROOT / "tests" / "cuda_host.cpp"  # nothing of it is for the device: nvcc only knows where its headers are
    # Its own stand-ins, though torch for CUDA has loaded the runtime whose names they have.
    command = [NVCC, "-std=c++20", "-shared", "-cudart", "none", "-Xcompiler", "-fPIC,-w", "-Xlinker", "-Bsymbolic",
               f"-I{ROOT / 'csrc'}", str(source), "-o", str(library)]  # fmt: skip
    subprocess.run(command, check=True)
    loaded = ctypes.CDLL(str(library))
    library.unlink()
    folder.rmdir()
    for name in ("encode_map", "launch"):
        getattr(loaded, name).restype = ctypes.c_char_p
    return loaded


def encode(host, element, dim, stride, box, swizzle, base=0x7F0000000100, with_context=True):
    call = MapCall(base=base, swizzle=swizzle)
    rank = len(dim)
    call.dim[:rank], call.stride[:rank], call.box[:rank] = dim, stride, box
    seen = Encoded()
    error = host.encode_map(ctypes.byref(call), element, rank, with_context, ctypes.byref(seen))
    return seen, error.decode() if error else None


# A (batch 2, heads 5, seqlen 300, head_dim 80) view of a (2, 300, 5, 80) tensor; a (1000, 200) tensor of rows of 208.
VIEW = ((80, 300, 5, 2), (1, 400, 80, 120000), (64, 128, 1, 1), 128)
ROWS = ((200, 1000), (1, 208), (128, 256), 128)
# element: its number in CUtensorMapDataType, its bytes
ELEMENTS = {BFLOAT16: (9, 2), HALF: (6, 2), FLOAT: (7, 4), INT8: (0, 1)}
# bytes: its number in CUtensorMapSwizzle
SWIZZLES = {0: 0, 32: 1, 64: 2, 128: 3}


@pytest.mark.parametrize("element, tensor", [(BFLOAT16, VIEW), (HALF, VIEW), (INT8, ROWS)])
def test_the_driver_gets_the_tensor_in_bytes(host, element, tensor):
    dim, stride, box, swizzle = tensor
    seen, error = encode(host, element, dim, stride, box, swizzle)
    number, size = ELEMENTS[element]
    assert error is None
    assert (seen.element, seen.rank, seen.swizzle) == (number, len(dim), SWIZZLES[swizzle])
    assert (seen.interleave, seen.fill) == (0, 0), "no interleaving; zeros, not NaN, past the end"
    assert (seen.base, tuple(seen.dim[: len(dim)])) == (0x7F0000000100, dim)
    assert tuple(seen.box[: len(dim)]) == box
    # Of the first dimension the driver has none.
    assert [*seen.stride_bytes[: len(dim) - 1]] == [each * size for each in stride[1:]]
    assert {*seen.element_strides[: len(dim)]} == {1}


@pytest.mark.parametrize("swizzle", SWIZZLES)
def test_swizzles_by_the_width_of_their_lines(host, swizzle):
    seen, error = encode(host, FLOAT, (64, 10), (1, 64), (8, 10), swizzle)
    assert (error, seen.swizzle, seen.element) == (None, SWIZZLES[swizzle], ELEMENTS[FLOAT][0])


@pytest.mark.parametrize("wrong", ["base", "stride", "box"])
def test_what_the_driver_refuses(host, wrong):
    base, stride, rows = {"base": (0x108, 64, 8), "stride": (0x100, 68, 8), "box": (0x100, 64, 257)}[wrong]
    _, error = encode(host, BFLOAT16, (64, 300), (1, stride), (64, rows), 128, base)
    assert error == "tensor map: the driver refused the tensor's alignment, strides or box"
    _, error = encode(host, BFLOAT16, (64, 300), (2, 64), (64, 8), 128)
    assert error == "tensor map: the innermost dimension must be contiguous"


def test_a_thread_that_has_not_used_the_device_makes_maps_too(host):
    """The driver has no context in such a thread; the runtime, which would make one, was not called yet."""
    seen, error = encode(host, BFLOAT16, *VIEW, with_context=False)
    assert (error, seen.calls, tuple(seen.dim[:4])) == (None, 2, VIEW[0])
    assert encode(host, BFLOAT16, *VIEW)[0].calls == 1


def launch(host, grid, cluster, shared_bytes, fails=False):
    seen = Launched()
    error = host.launch(grid, cluster, 384, shared_bytes, 11, fails, ctypes.byref(seen))
    return seen, error.decode() if error else None


@pytest.mark.parametrize("shared_bytes", [0, 40 << 10, 49 << 10, 227 << 10])
@pytest.mark.parametrize("cluster", [1, 4])
def test_a_launch_asks_for_what_a_block_has_not(host, cluster, shared_bytes):
    """More than 48 KiB of shared memory, static memory included, has to be asked for, and so has a cluster."""
    seen, error = launch(host, 12, cluster, shared_bytes)
    assert (error, seen.grid, seen.block, seen.shared_bytes, seen.argument) == (None, 12, 384, shared_bytes, 11)
    assert seen.granted_shared_bytes == (shared_bytes if shared_bytes > 40 << 10 else 0)
    assert (seen.clusters, tuple(seen.cluster)) == ((1, (4, 1, 1)) if cluster > 1 else (0, (0, 0, 0)))


def test_a_refused_launch_leaves_no_error_behind(host):
    """PyTorch would raise it again at its own next launch."""
    assert launch(host, 12, 1, 0, fails=True)[1] == "the runtime refused"
    assert host.error_left_behind() == 0
    assert (host.resident_clusters(False), host.resident_clusters(True)) == (5, 7)
    assert host.error_left_behind() == 0
