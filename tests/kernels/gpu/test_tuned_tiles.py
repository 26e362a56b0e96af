"""The file of tiles that MOEIFY_TILES names, as on an sm_90."""

# mypy: disable-error-code="import-untyped"

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import triton

from moeify.kernels.gpu import tiles, tuned_tiles
from moeify.kernels.gpu.tiles import Tile

TABLE = tiles.choose("rows", "sm_90", 16, 2048, 2048, 2)
OTHER = Tile(16, 32, 64, 8, 2)
WIDE = Tile(128, 256, 32, 8, 3, tma=True)


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(tuned_tiles, "architecture", lambda: "sm_90")
    tuned_tiles._read.cache_clear()
    yield
    tuned_tiles._read.cache_clear()


def test_the_file_changes_what_is_picked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "tiles.json"
    file.write_text(tuned_tiles.text_of({("rows", 16, 2): OTHER, ("short_rows", 128, 2): WIDE}))
    assert tuned_tiles.pick("rows", 16, 2048, 2048, 2) == TABLE
    monkeypatch.setenv("MOEIFY_TILES", str(file))
    assert tuned_tiles.pick("rows", 16, 2048, 2048, 2) == OTHER
    assert tuned_tiles.pick("rows", 16, 20, 2048, 2).n == 32
    assert tuned_tiles.pick("rows", 128, 2048, 1024, 2) == WIDE != tuned_tiles.pick("rows", 128, 2048, 1025, 2)
    assert tuned_tiles.pick("rows", 16, 2048, 2048, 4) == tiles.choose("rows", "sm_90", 16, 2048, 2048, 4)
    with tuned_tiles.on_trial(Tile(16, 64, 32, 4, 2)):
        assert tuned_tiles.pick("rows", 16, 2048, 2048, 2) == Tile(16, 64, 32, 4, 2)
    assert tuned_tiles.pick("rows", 16, 2048, 2048, 2) == OTHER


@pytest.mark.parametrize("warps", [2, 4, 8])
def test_every_number_of_warps_that_the_kernels_are_written_for(
    warps: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tile, file = replace(OTHER, warps=warps), tmp_path / "tiles.json"
    file.write_text(tuned_tiles.text_of({("rows", 16, 2): tile}))
    monkeypatch.setenv("MOEIFY_TILES", str(file))
    assert tuned_tiles.pick("rows", 16, 2048, 2048, 2) == tile


WRONG = {
    "cannot be read .No such file": None,
    "is not a file of tiles": "{",
    r"is not a file of tiles .KeyError": {"architecture": None},
    "was measured on sm_80 with Triton": {"architecture": "sm_80"},
    f"with Triton 3.1.0, this is sm_90 with Triton {triton.__version__}": {"triton": "3.1.0"},
    "no kernel 'rows' takes Tile.m=16, n=48": {"n": 48},
    "no kernel 'down' takes": {"kernel": "down"},
    "no kernel 'rows' takes .*tma=1": {"tma": 1},
    "no kernel 'rows' takes .*tma=False, persistent=True": {"tma": False, "persistent": True},
    "unexpected keyword argument 'height'": {"height": 3},
    "holds a tile that cannot be used .* bytes of shared memory": {"n": 128, "k": 128, "stages": 8},
}


@pytest.mark.parametrize("message", WRONG)
def test_a_wrong_file_is_refused_in_one_line(message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file, change = tmp_path / "tiles.json", WRONG[message]
    content = json.loads(tuned_tiles.text_of({("rows", 16, 2): OTHER}))
    if isinstance(change, dict):
        content |= {name: value for name, value in change.items() if name in content}
        content["tiles"][0] |= {name: value for name, value in change.items() if name not in content}
        file.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))
    elif change is not None:
        file.write_text(change)
    monkeypatch.setenv("MOEIFY_TILES", str(file))
    with pytest.raises(ValueError, match=f"^MOEIFY_TILES=.*{message}.*: run `moeify doctor --tune`") as raised:
        tuned_tiles.pick("rows", 16, 2048, 2048, 2)
    assert "\n" not in str(raised.value)
