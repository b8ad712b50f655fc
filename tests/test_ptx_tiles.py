"""The tiles of Hopper's attention kernels, byte by byte: what TMA puts where, against what wgmma takes from there.

Neither side is asked of the emulator. Where a copy puts an element follows from the driver API's manual, where a
product looks for it from the PTX ISA ("Matrix descriptor format", "Strides", "Shared memory matrix layout"), whose
tables count units of 16 bytes: a swizzle of w units has atoms of 8 lines of w units.
"""

from __future__ import annotations

import pytest
import torch
from emulated import emulated_library, host_compiler

pytestmark = pytest.mark.skipif(host_compiler() is None, reason="no C++ compiler on PATH")

ADDRESS = 3 * 1024
LINE_UNITS = {0: 1, 1: 8, 2: 4, 3: 2}  # by the descriptor's swizzle mode: none, 128, 64 and 32 bytes
UNIT = 16


def swizzled(address: torch.Tensor, line_units: int) -> torch.Tensor:
    """The number of the unit in its line, XORed with the number of 128 bytes, as far as the line has units."""
    return address ^ (address // 128 % line_units * UNIT)


def copied_to(rows: int, cols: int, panel_cols: int) -> torch.Tensor:
    """(rows, cols): the byte address of each 16-bit element, of boxes of all rows and `panel_cols` columns."""
    row, col = torch.meshgrid(torch.arange(rows), torch.arange(cols), indexing="ij")
    line = panel_cols * 2
    address = ADDRESS + col // panel_cols * rows * line + row * line + col % panel_cols * 2
    return swizzled(address, line // UNIT)


def taken_from(descriptor: int, mn_major: bool, mn: int) -> torch.Tensor:
    """(mn, 16): the byte address of each 16-bit element of one step."""
    start, leading, stride = (UNIT * (descriptor >> bit & 0x3FFF) for bit in (0, 16, 32))
    mode = descriptor >> 62
    reserved = descriptor & ~(0x3FFF | 0x3FFF << 16 | 0x3FFF << 32 | 3 << 62)
    assert reserved == 0, "a base offset, or bits that mean nothing"
    units = LINE_UNITS[mode]
    i, k = torch.meshgrid(torch.arange(mn), torch.arange(16), indexing="ij")
    if mn_major:
        # ((8, units, m), (8, 2)): ((1, 8, leading), (a line, stride))
        offset = i % 8 * 2 + i // 8 % units * UNIT + i // (8 * units) * leading + k % 8 * units * UNIT + k // 8 * stride
    else:
        # ((8, m), (8, 2)): ((a line, stride), (1, the next unit))
        offset = i % 8 * units * UNIT + i // 8 * stride + k % 8 * 2 + k // 8 * UNIT
    assert mode != 0, "these tiles are swizzled"
    return swizzled(start + offset, units)


# (rows, columns) of a tile and the columns of its panels
TILES = {(64, 64): 64, (128, 64): 64, (128, 96): 32, (128, 128): 64, (96, 192): 64, (80, 256): 64}
# major, the tile, the first row or column, how many of them a product takes
CASES = [(False, tile, 0, tile[0]) for tile in TILES] + [(False, (128, 64), 64, 64), (False, (128, 96), 64, 64)]
CASES += [(True, tile, 0, tile[1]) for tile in TILES] + [(True, (128, 128), 64, 64), (True, (128, 96), 64, 32)]


@pytest.mark.parametrize("mn_major, tile, first, count", CASES, ids=str)
def test_products_take_elements_from_where_copies_put_them(mn_major, tile, first, count):
    rows, cols = tile
    depth = rows if mn_major else cols
    descriptors = torch.zeros(depth // 16, dtype=torch.int64)
    places = torch.zeros(rows, cols // 8, dtype=torch.int32)
    emulated_library().call("attention_tile", rows, cols, int(mn_major), first, descriptors, places)

    copied = copied_to(rows, cols, TILES[tile])
    assert torch.equal(places.long(), copied[:, ::8]), "ordinary loads and stores look elsewhere"
    operand = (copied.T if mn_major else copied)[first : first + count]
    for step, descriptor in enumerate(descriptors.tolist()):
        taken = taken_from(descriptor & 0xFFFFFFFFFFFFFFFF, mn_major, count)
        assert torch.equal(taken, operand[:, 16 * step : 16 * step + 16]), f"step {step}"
