from __future__ import annotations

import json
from pathlib import Path

import pytest

from moeify.errors import CheckpointError
from moeify.training.run_log import LayerWindow, RunLog, Window, read_run
from moeify.training.stats import LayerStats

STATS = {"a": LayerStats(10, 20, (0.5, 0.5, 0.0), 0.7, 4, {"balance": 1.0}, 2.0)}
LAYER = LayerWindow((1.5, 1.5, 0.0), 0.7, 0.2, 2.0, {"balance": 1.0})


def written(path: Path, *steps: int, goes_on: bool = False) -> Path:
    log = RunLog(path, goes_on=goes_on)
    for step in steps:
        log.add(step, 1.0 + step, STATS)
    return path


def test_what_is_written_is_read(tmp_path: Path) -> None:
    run = read_run(written(tmp_path / "new" / "run.jsonl", 2, 4))
    assert run.windows == (Window(2, 3.0, {"a": LAYER}), Window(4, 5.0, {"a": LAYER}))
    assert (run.damaged, run.cut) == (0, False)


def test_a_run_begins_anew_or_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    path = written(tmp_path / "run.jsonl", 1, 2, 3)
    path.write_text(path.read_text() + '\n{"moeify_run":1,"step":4,"lo')
    run = read_run(written(path, 3, 4, goes_on=True))
    assert [window.step for window in run.windows] == [1, 2, 3, 4] and (run.damaged, run.cut) == (1, False)
    assert [window.step for window in read_run(written(path, 7)).windows] == [7]


def test_a_log_that_ends_in_a_line_is_read_and_says_so(tmp_path: Path) -> None:
    path = written(tmp_path / "run.jsonl", 1, 2, 3)
    whole = path.read_bytes()
    second = whole.index(b"\n", whole.index(b"\n") + 1)
    for end in range(second + 2, len(whole), 7):
        path.write_bytes(whole[:end])
        run = read_run(path)
        assert len(run.windows) == 2 and run.cut and run.damaged == 0


@pytest.mark.parametrize(
    "change",
    [
        {"moeify_run": 9},
        {"step": "x"},
        {"step": 1e999},
        {"layers": {}},
        {"layers": []},
        {"layers": {"a": 1}},
        {"loss": []},
    ],
)
def test_lines_of_another_kind_are_left_out(tmp_path: Path, change: dict[str, object]) -> None:
    path = written(tmp_path / "run.jsonl", 1, 2)
    row = json.loads(path.read_text().splitlines()[0])
    path.write_text(json.dumps({**row, "step": 9, **change}) + "\n" + path.read_text())
    run = read_run(path)
    assert [window.step for window in run.windows] == [1, 2] and run.damaged == 1 and not run.cut


@pytest.mark.parametrize("damage", [{"load": []}, {"load": ["x"]}, {"entropy": float("nan")}, {"losses": 3}])
def test_layers_of_another_kind_are_left_out(tmp_path: Path, damage: dict[str, object]) -> None:
    path = written(tmp_path / "run.jsonl", 1)
    row = json.loads(path.read_text())
    row["layers"]["a"] |= damage
    path.write_text(json.dumps(row))
    with pytest.raises(CheckpointError, match=r"run\.jsonl holds no window of a run: expected what moeify"):
        read_run(path)


def test_a_file_that_cannot_be_written_stops_no_training(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    log = RunLog(tmp_path / "taken" / "run.jsonl", goes_on=False)
    with pytest.warns(UserWarning, match="cannot be written"):
        log.add(1, 1.0, STATS)
    log.add(2, 1.0, STATS)  # once
