from __future__ import annotations

import json
import math
from pathlib import Path

from moeify.report.render import page
from moeify.report.run import collect_run
from moeify.training.run_log import RunLog
from moeify.training.stats import LayerStats
from tests.moeify.report import small


def log(path: Path, windows: int) -> Path:
    """Loads that move from the first of three experts to the second."""
    written = RunLog(path, goes_on=False)
    for n in range(windows):
        share = n / max(windows - 1, 1)
        stats = LayerStats(10, 20, (1 - share, share, 0.0), 0.5, 4, {"balance": 2.0}, 1.0)
        written.add(10 * (n + 1), math.nan if n == 1 else 5.0 - n / windows, {"layers.0": stats, "layers.1": stats})
    return path


def test_a_short_run_shows_each_window(tmp_path: Path) -> None:
    made = collect_run(log(tmp_path / "run.jsonl", 4))
    run = made.training
    assert run and run.steps == run.load_steps == (10, 20, 30, 40) and run.windows == 4
    curves = {curve.name: curve.values for curve in run.curves}
    assert curves["loss"] == (5.0, None, 4.5, 4.25) and curves["balance loss"] == (2.0,) * 4
    assert curves["experts without a token"] == (4, 2, 2, 4) and curves["dropped choices"] == (0.2,) * 4
    assert curves["busiest expert"] == (3.0, 2.0, 2.0, 3.0)
    assert run.loads[1].load == ((3.0, 2.0, 1.0, 0.0), (0.0, 1.0, 2.0, 3.0), (0.0,) * 4)
    assert json.loads(json.dumps(made.to_dict(), allow_nan=False))["notes"] == []
    assert small.Page(page(made)).tables["history-2"][2] == ["1", "0.00", "1.00", "2.00", "3.00"]


def test_a_long_run_is_averaged(tmp_path: Path) -> None:
    run = collect_run(log(tmp_path / "run.jsonl", 900)).training
    assert run and len(run.steps) == 150 and len(run.load_steps) == 60 and run.steps[-1] == 9000
    curves = {curve.name: curve.values for curve in run.curves}
    assert curves["entropy"] == (0.5,) * 150
    assert curves["loss"][:2] == (4.997, 4.99)  # of six windows each; one of the first six has no loss


def test_a_log_that_was_cut_is_reported_and_says_so(tmp_path: Path) -> None:
    path = log(tmp_path / "run.jsonl", 3)
    path.write_bytes(path.read_bytes()[:-40])
    made = collect_run(path)
    assert made.training and made.training.windows == 2
    assert made.notes == ("run.jsonl ends in the middle of a line, so the run was stopped while it wrote",)
    path.write_text("{}\n" + path.read_text())
    assert collect_run(path).notes[1] == "1 lines of run.jsonl are damaged and were left out"
