"""Tiles on trial, with launches that say which tile they had."""

# mypy: disable-error-code="import-untyped"

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
import triton
from torch import Tensor

from moeify.kernels.gpu import tuned_tiles
from moeify.kernels.gpu.tiles import Tile
from moeify.kernels.tools.trials import try_tiles

pytestmark = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="nothing here depends on how kernels run")
TILES = [Tile(16, n, 64, 4, 3) for n in (64, 32, 128)]


def launch() -> Tensor:
    tile: Any = tuned_tiles._trial.get()
    if tile.n == 128:
        raise RuntimeError("out of resource\nand more")
    return torch.tensor([float(tile.n)])


def test_what_is_wrong_or_does_not_fit_has_no_time() -> None:
    def wrong(got: Tensor, want: Tensor) -> str:
        return "" if torch.equal(got, want) else f"{got.item()} and not {want.item()}"

    first, second, third = try_tiles(launch, TILES, lambda one: 7.0, wrong=wrong)
    assert (first.milliseconds, first.fault) == (7.0, "")
    assert (second.milliseconds, second.fault) == (None, "32.0 and not 64.0")
    assert (third.milliseconds, third.fault) == (None, "RuntimeError: out of resource")
    assert tuned_tiles._trial.get() is None


def test_nothing_is_launched_but_what_is_timed_where_nothing_is_checked() -> None:
    launched = [trial.tile for trial in try_tiles(lambda: None, TILES, lambda one: 1.0)]
    assert launched == TILES


def test_the_time_is_up() -> None:
    assert list(try_tiles(launch, TILES, lambda one: 1.0, until=time.time() - 1)) == []
