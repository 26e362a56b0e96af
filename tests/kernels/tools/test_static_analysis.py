"""What is read from machine code, on code written here; `test_cases` reads what the compiler makes."""

from __future__ import annotations

import pytest

from moeify.kernels.tools import static_analysis

LOOPS = """
.L_x_0:
        /*0000*/                   LDGSTS [R1], [R2] ;
        /*0010*/                   HMMA.16816.F32 R4, R8, R12, R4 ;
        /*0020*/                   HMMA.16816.F32 R4, R8, R12, R4 ;
        /*0030*/                   IADD3 R1, R1, 0x1, RZ ;
        /*0040*/              @!P0 BRA `(.L_x_0) ;
.L_x_1:
        /*0050*/                   IADD3 R1, R1, 0x1, RZ ;
        /*0060*/              @!P0 BRA `(.L_x_1) ;
        /*0070*/                   EXIT ;
"""


def test_instructions_per_product_are_counted_in_the_loop_that_has_products() -> None:
    loop = static_analysis._inner_loop(LOOPS)
    assert len(loop) == 5 and static_analysis._products(loop) == 2
    assert static_analysis._inner_loop(LOOPS.replace("HMMA.16816.F32", "FFMA")) == []
    assert len(static_analysis._inner_loop(LOOPS.replace("HMMA.16816.F32", "QGMMA.64x128x32.F32.E4M3.E4M3"))) == 5


def test_what_a_loop_leaves_in_flight_is_read() -> None:
    assert static_analysis.WAIT.search("/*0020*/ DEPBAR.LE SB0, 0x12 ;")[1] == "0x12"  # type: ignore[index]
    assert static_analysis.WAIT.search("/*0020*/ WARPGROUP.DEPBAR.LE gsb0, 0x1 ;") is None


def test_an_output_that_another_compiler_writes_otherwise_is_said() -> None:
    assert static_analysis._first(r"REG:(\d+)", "STACK:0 REG:42 SHARED:0") == "42"
    with pytest.raises(ValueError, match=r"lacks 'REG.*: expected Triton 3.2 or newer; update this reader"):
        static_analysis._first(r"REG:(\d+)", "registers 42")


@pytest.mark.parametrize(
    ("value", "is_type"),
    [("*bf16", True), ("i32", True), ("fp32", True), ("silu", False), (16, False), ("*u8", True), ("*u7", False)],
)
def test_types_are_told_from_values(value: object, is_type: bool) -> None:
    assert static_analysis._is_type(value) is is_type
