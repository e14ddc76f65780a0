"""The readings of machine code: loops, K-steps, and the table."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("triton", reason="Triton has no build for this platform")

from bench.machine_code.__main__ import cell, lines_of, markdown
from bench.machine_code.launches import Launch
from bench.machine_code.programs import innermost_loop, k_steps

LOOP = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   LDGSTS.E.BYPASS.128 [R5], desc[UR4][R2.64] ;
                                                                          /* 0x000fe200 */
        /*0020*/                   HGMMA.64x128x16.F32.BF16 R24, R108, gdesc[UR4], R24 ;
        /*0030*/                   HGMMA.64x128x16.F32.BF16 R24, R108, gdesc[UR8], R24 ;
        /*0040*/              @!P0 BRA `(.L_x_1) ;
.L_x_2:
        /*0050*/                   BRA `(.L_x_2);
"""


class Kernel:
    """A kernel has tiles of 128 x 128 x 16."""


LAUNCH = Launch(Kernel(), (), (("BLOCK_M", 128), ("BLOCK_N", 128), ("BLOCK_K", 16)), (), ())


def test_the_loop_on_tensor_cores_is_found():
    loop = innermost_loop(LOOP, "HGMMA")
    assert [line.split()[1] for line in loop] == [
        "LDGSTS.E.BYPASS.128",
        "HGMMA.64x128x16.F32.BF16",
        "HGMMA.64x128x16.F32.BF16",
        "@!P0",
    ]
    assert innermost_loop(LOOP, "UTCHMMA") == []


def test_an_unrolled_loop_is_from_its_first_to_its_last_product():
    straight = LOOP.replace("@!P0 BRA `(.L_x_1)", "     EXIT")
    assert len(innermost_loop(straight, "HGMMA")) == 2


def test_k_steps_are_counted_by_multiply_adds():
    """Two warp groups of four warps each multiply 64 x 128 x 16 per instruction."""
    assert k_steps(innermost_loop(LOOP, "HGMMA"), LAUNCH, warps=8) == 2
    assert k_steps([], LAUNCH, warps=8) == 1


def test_the_table_has_a_line_per_kernel_and_a_column_per_release():
    row = {"kernel": "a_fwd_kernel", "call": "c", "capability": 90, "triton": "3.6.0", "registers": 100, "stack": 0}
    row |= {"blocks": 2, "shared": 2048, "warps": 8, "instructions": 60.0, "other_loads": 0.0}
    later = row | {"triton": "3.9.0", "stack": 8, "tensor_cycles": 512.0, "other_loads": 4.0}
    assert cell(row | {"shared": 0}) == "100, 2 blocks"
    assert cell(row) == "100, 2 blocks of 2 KB"
    assert cell(later) == "100 (**8 spilled**), 2 blocks of 2 KB, 120 / 512 LDG"
    assert json.loads(lines_of([row, later])) == {"rows": [row, later]}
    lines = markdown([row, later]).splitlines()
    assert "| a_fwd | c | 100, 2 blocks of 2 KB | 100 (**8 spilled**), 2 blocks of 2 KB, 120 / 512 LDG |" in lines
    assert "| kernel | call | Triton 3.6.0 | Triton 3.9.0 |" in lines
