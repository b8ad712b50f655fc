"""What machine_code.py finds in machine code, in a few lines of it."""

from __future__ import annotations

import re

import machine_code
import pytest

# Two groups of products: that of R24 reads A in registers.
LISTING = """
.text.kernel:
  /*0000*/ S2R R0, SR_TID.X ;
  /*0010*/ USETMAXREG.TRY_ALLOC.CTAPOOL UP0, 0xe0 ;
.L_x_0:
  /*0020*/ IMAD.MOV.U32 R8, RZ, RZ, R0 ;
  /*0030*/ WARPGROUP.ARRIVE ;
  /*0040*/ HGMMA.64x8x16.F32.BF16 R24, R8, gdesc[UR4].tnspB, RZ, !UPT ;
  /*0050*/ HGMMA.64x8x16.F32.BF16 R24, R12, gdesc[UR8].tnspB, R24, gsb0 ;
  /*0060*/ HGMMA.64x16x16.F32.BF16 R40, gdesc[UR8], R40, gsb0 ;
  /*0070*/ MOV R9.reuse, R0 ;
  /*0080*/ WARPGROUP.DEPBAR.LE gsb0, 0x1 ;
  /*0090*/ FADD R1, R24, R25 ;
  /*00a0*/ WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
  /*00b0*/ STG.E.128 desc[UR4][R2.64], R44 ;
  /*00c0*/ @P0 BRA `(.L_x_0) ;
  /*00d0*/ @P1 BRX R4 -0x100 (*"BRANCH_TARGETS .L_x_0,.L_x_1"*);
  /*00e0*/ EXIT ;
.L_x_1:
  /*00f0*/ FADD R1, R40, R1 ;
  /*0100*/ EXIT ;
"""


def faults(listing: str) -> list[str]:
    (kernel,) = machine_code.kernels(listing)
    return kernel.faults()


def test_registers_of_a_product_in_flight():
    """R9 is a fragment of the first product, whose group the first wait includes."""
    assert faults(LISTING) == ["70: MOV R9.reuse, R0 touches R9, which the product at 40 still reads"]


RIGHT = LISTING.replace("MOV R9.reuse", "MOV R7")
# What of RIGHT is replaced by what. -> the register, at which instruction
WRONG = {
    "fragment is overwritten": ("MOV R7, R0", "LDS.64 R14, [R3]", ("R15", "70")),
    "fragment is overwritten under a predicate": ("MOV R7, R0", "@!P0 MOV R11, R0", ("R11", "70")),
    "accumulator is overwritten": ("MOV R7, R0", "LDSM.16.M88.4 R22, [R3]", ("R24", "70")),
    "accumulator is read": ("MOV R7, R0", "SHFL.BFLY PT, R7, R27, 0x1, 0x1f", ("R27", "70")),
    "accumulator is stored": ("MOV R7, R0", "STG.E.128 desc[UR4][R2.64], R23", ("R24", "70")),
    "accumulator is compared": ("MOV R7, R0", "FSETP.GT.AND P0, PT, R26, RZ, PT", ("R26", "70")),
    "accumulator is an address": ("MOV R7, R0", "LDG.E R7, desc[UR4][R26.64]", ("R26", "70")),
    "wait includes too few groups": ("gsb0, 0x1", "gsb0, 0x2", ("R24", "90")),
    "last group is not waited for": ("gsb0, 0x0", "gsb0, 0x1", ("R44", "b0")),
    "fragment is made of an accumulator": ("R24, R12, gdesc", "R24, R26, gdesc", ("R26", "50")),
    "product of other accumulators": ("R40, gdesc[UR8], R40", "R8, gdesc[UR8], R8", ("R8", "60")),
    "reached by a jump back": ("@P1 BRX", "HGMMA.64x8x16.F32 R16, R8, gdesc[UR4], R16 ; <> @P1 BRX", ("R8", "20")),
    "register was given back": ("0xe0", "0x28", ("R47", "60")),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_fault_is_found(wrong):
    old, new, (register, address) = WRONG[wrong]
    assert RIGHT.count(old) == 1
    found = faults(RIGHT.replace(old, new.replace("<>", "\n  /*00d8*/")))
    assert any(re.match(rf"{address}: .* {register}\b", each) for each in found), found


def test_right_code_has_none():
    assert faults(RIGHT) == []
    (kernel,) = machine_code.kernels(RIGHT)
    assert kernel.products == 3


def test_a_jump_that_goes_nowhere_known_is_refused():
    with pytest.raises(NotImplementedError, match="d0: BRX R4"):
        faults(re.sub(r"\(\*.*\*\)", "", RIGHT))
