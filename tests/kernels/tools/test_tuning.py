"""Tuning, under a driver that compiles and does not launch, and a timer that does not time."""

# mypy: disable-error-code="import-untyped"

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import triton

from moeify.kernels.gpu import tiles, tuned_tiles
from moeify.kernels.gpu.tiles import Tile
from moeify.kernels.tools import tuning
from tests.kernels.no_driver import no_driver

pytestmark = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="needs kernels that are compiled")
SHAPE = tuning.Shape(hidden=128, intermediate=72, experts=3, top_k=2)
TABLE = tiles.choose("rows", "sm_90", 16, 2048, 2048, 2)
OTHER = Tile(16, 32, 64, 8, 2)
OTHERS = {"tile_map_kernel", "gather_kernel"}  # which have no tiles to choose


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, int, Any]]]:
    with no_driver(monkeypatch) as seen:
        yield seen


def _tune(timer: Any) -> dict[tuple[str, int, int], Tile]:
    found = tuning.tune(SHAPE, torch.device("cpu"), dtypes=(torch.bfloat16,), shares=(16,), timer=timer)
    return {(t.kernel, t.tile.m, t.itemsize): t.tile for t in found}


def test_the_fastest_tile_that_lives_is_chosen(launches: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Tile] = []

    def faults(kernel: str, architecture: str, tile: Tile, itemsize: int) -> list[str]:
        asked.append(tile)
        return ["spills"] if tile.warps == 8 else []

    def fewer_columns_are_faster(launch: Any) -> float:
        tile = tuned_tiles._trial.get()
        assert tile is not None and tile.warps != 8, "timed a tile that spills"
        return float(tile.n)

    monkeypatch.setattr(tuning, "tile_faults", faults)
    chosen = _tune(fewer_columns_are_faster)
    assert {kernel for kernel, _, _ in chosen} == {"up", "short_rows", "down_backward"}
    assert all(tile.n == 32 for tile in chosen.values()) and 8 in {tile.warps for tile in asked}
    assert tuned_tiles._trial.get() is None


def test_a_tile_on_trial_is_launched(launches: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "_survivors", lambda kernel, m, itemsize: [TABLE, OTHER])

    def timer(launch: Any) -> float:
        launch()
        return -float(launches[-1][2].metadata.num_warps)

    assert set(_tune(timer).values()) == {OTHER}
    kernels = [(name, compiled.metadata.num_warps) for name, _, compiled in launches if name not in OTHERS]
    assert kernels == [(f"{name}_kernel", warps) for name in ("up", "rows", "down_backward") for warps in (4, 8)]
