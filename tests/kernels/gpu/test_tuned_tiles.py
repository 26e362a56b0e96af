"""The file of tiles that MOEIFY_TILES names, under a driver that compiles and does not launch."""

# mypy: disable-error-code="import-untyped"

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import triton

from moeify.kernels.gpu import experts, tiles, tuned_tiles
from moeify.kernels.gpu.tiles import Tile
from tests.kernels.no_driver import no_driver

TABLE = tiles.choose("rows", "sm_90", 16, 2048, 2048, 2)
OTHER = Tile(16, 32, 64, 8, 2)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, int, Any]]]:
    tuned_tiles._read.cache_clear()
    with no_driver(monkeypatch) as seen:
        yield seen
    tuned_tiles._read.cache_clear()


def _launch_rows() -> None:
    offsets = torch.tensor([0, 7, 7, 20], dtype=torch.int32)
    a, w = torch.zeros(20, 72, dtype=torch.bfloat16), torch.zeros(3, 128, 72, dtype=torch.bfloat16)
    experts.launch_rows(a, w.transpose(1, 2), None, offsets)


def test_the_file_changes_what_is_launched(
    launches: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "tiles.json"
    file.write_text(tuned_tiles.text_of({("rows", 16, 2): OTHER}))
    _launch_rows()
    tuned_tiles._read.cache_clear()
    monkeypatch.setenv("MOEIFY_TILES", str(file))
    _launch_rows()
    warps = [compiled.metadata.num_warps for name, _, compiled in launches if name == "rows_kernel"]
    assert warps == [TABLE.warps, OTHER.warps] == [4, 8]
    assert tuned_tiles.pick("rows", 16, 2048, 2048, 2) == OTHER
    assert tuned_tiles.pick("rows", 16, 20, 2048, 2).n == 32
    assert tuned_tiles.pick("rows", 16, 2048, 2048, 4) == tiles.choose("rows", "sm_90", 16, 2048, 2048, 4)


WRONG = {
    "cannot be read .No such file": None,
    "is not a file of tiles": "{",
    r"is not a file of tiles .KeyError": {"architecture": None},
    "was measured on sm_80 with Triton": {"architecture": "sm_80"},
    f"with Triton 3.1.0, this is sm_90 with Triton {triton.__version__}": {"triton": "3.1.0"},
    "no kernel 'rows' takes Tile.m=16, n=48": {"n": 48},
    "no kernel 'down' takes": {"kernel": "down"},
    "unexpected keyword argument 'height'": {"height": 3},
    "holds a tile that cannot be used .* bytes of shared memory": {"n": 128, "k": 128, "stages": 8},
}


@pytest.mark.parametrize("message", WRONG)
def test_a_wrong_file_is_refused_in_one_line(
    message: str, launches: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
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
        _launch_rows()
    assert "\n" not in str(raised.value)
    assert not [name for name, _, _ in launches if name == "rows_kernel"]
