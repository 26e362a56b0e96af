"""The claims of docs/kernels.md that a reader would check first; the report itself checks every tile."""

# mypy: disable-error-code="import-untyped"

from __future__ import annotations

from dataclasses import replace

import pytest
import triton
from packaging.version import Version

from moeify.kernels.gpu.tiles import Tile, choose, least_shared
from moeify.kernels.tools.cases import CASES, DENSE_MARGIN, Entry, dense_kernel, faults, measure, slow_loops

pytestmark = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="needs kernels that are compiled")
UP = next(case for case in CASES if case.name == "up")
DENSE = next(case for case in CASES if case.kernel is dense_kernel)
TILE = Tile(64, 64, 64, 4, 3)
# Registers of Liger's fused up projection with this tile and Triton 3.9, and the tensor-core instruction to be found.
LIGER = {"sm_80": (190, "HMMA"), "sm_90": (128, "HGMMA"), "sm_100": (110, "UTCHMMA")}


@pytest.mark.parametrize("architecture", LIGER)
def test_up_projection_beside_a_plain_product_and_ligers_kernel(architecture: str) -> None:
    assert choose("up", architecture, 64, 2048, 2048, 2) == TILE
    up, dense = (Entry(case, "bf16", TILE, measure(case, TILE, architecture)) for case in (UP, DENSE))
    registers, instruction = LIGER[architecture]
    if Version(triton.__version__) >= Version("3.9"):  # what Liger's has under older ones was not measured
        assert up.found.registers <= registers
    assert instruction in up.found.tensor_ops
    assert 0 < up.found.loop_ratio <= DENSE_MARGIN * dense.found.loop_ratio
    assert faults(up) == [] and slow_loops([up, dense]) == []
    assert least_shared("up", TILE, 2) <= up.found.shared
    slow = replace(up, found=replace(up.found, loop_ratio=1.2 * dense.found.loop_ratio, spill=8, fits=False, ctas=0))
    assert len(slow_loops([slow, dense])) == 1 and len(faults(slow)) == 3


@pytest.mark.parametrize(("name", "tma"), [("d up", False), ("d down", True)])
def test_gradients_of_weights_are_wide_and_leave_loads_in_flight(name: str, tma: bool) -> None:
    case, tile = next(case for case in CASES if case.name == name), choose("weights", "sm_90", 128, 2048, 2048, 2)
    entry = Entry(case, "bf16", tile := replace(tile, tma=tma), measure(case, tile, "sm_90"))
    assert faults(entry) == [] and (tile.m, tile.n) == (128, 256)
    assert entry.found.async_copies.keys() == {"UTMALDG" if tma else "LDGSTS"}
    assert tma or entry.found.in_flight == 4, "of three blocks of each side, two"
    drained = replace(entry, found=replace(entry.found, in_flight=0))
    assert [fault for fault in faults(drained) if "waits for all its loads" in fault]


def test_programs_that_take_tiles_by_turns_spill_nothing_and_store_inside_the_loop_of_products() -> None:
    case, tile = next(case for case in CASES if case.name == "down"), choose("rows", "sm_90", 128, 2048, 2048, 2)
    entry = Entry(case, "bf16", tile := replace(tile, persistent=True), measure(case, tile, "sm_90"))
    assert faults(entry) == [] and entry.found.async_copies.keys() == {"UTMALDG"}
    assert entry.found.loop_ratio > 100, "one loop: of the summed elements, and of the tiles with their stores"


@pytest.mark.parametrize(("name", "product"), [("e4m3 down", "QGMMA"), ("int4 down", "HGMMA")])
def test_quantized_weights_meet_tensor_cores(name: str, product: str) -> None:
    case = next(case for case in CASES if case.name == name)
    entry = Entry(case, "bf16", case.tiles[-2], measure(case, case.tiles[-2], "sm_90"))
    assert faults(entry) == [] and product in entry.found.tensor_ops and entry.found.in_flight


@pytest.mark.parametrize(("kind", "cores"), [("fp32", False), ("tf32", True)])
def test_four_byte_tiles(kind: str, cores: bool) -> None:
    down = next(case for case in CASES if case.name == "d input")
    tile = choose("rows", "sm_90", 32, 2048, 2048, 4)
    entry = Entry(down, kind, tile, measure(down, tile, "sm_90", kind))
    assert faults(entry) == [] and bool(entry.found.tensor_ops) == cores
    assert least_shared("rows", tile, 4) <= entry.found.shared
