"""Runs of a real model: a record that is whole is kept, and two runs are compared at equal steps and at equal time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from examples.smollm2 import pictures, run


def record(variant: str, losses: list[float], seconds: float, **changes: Any) -> dict[str, Any]:
    """A run with a measurement every 10 steps that take so many seconds each."""
    points = [
        {"step": 10 * i, "seconds": 10 * i * seconds, "a step": seconds, "loss": loss} for i, loss in enumerate(losses)
    ]
    return {"variant": variant, "seed": 0, "parameters": 2e6, "points": points, "minutes": 5, "whole": True, **changes}


@pytest.mark.parametrize(
    ("changes", "minutes", "made"),
    [({}, 5, 0), ({}, 4, 0), ({}, 6, 2), ({"whole": False}, 5, 2)],
    ids=["whole", "longer than asked for", "too short", "cut off"],
)
def test_a_run_with_a_whole_record_is_not_made_again(
    changes: dict[str, Any], minutes: float, made: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[str] = []
    monkeypatch.setattr(run, "run", lambda setting, variant, seed, path: runs.append(path.name))
    for variant in ("moe", "dense"):
        (tmp_path / f"{variant}-0.json").write_text(json.dumps(record(variant, [3.0], 1.0, **changes)))
    run.run_all(run.Setting(lambda: None, {}, tmp_path, minutes), seeds=1)
    assert len(runs) == made


def test_runs_are_compared_at_equal_steps_and_at_equal_time() -> None:
    dense = record("dense", [3.0, 2.9, 2.8, 2.7], seconds=1.0)  # 30 steps in 30 seconds
    moe = record("MoE", [3.0, 2.8, 2.6], seconds=2.0)  # 20 steps in 40
    _, rows = pictures.table([moe, dense])
    of_moe, of_dense = (dict(zip(pictures.HEADER, row, strict=True)) for row in rows)
    assert of_dense["at equal tokens"] == "2.800 (step 20)" and of_moe["at equal tokens"] == "2.600 (step 20)"
    assert of_dense["at equal time"].startswith("2.700") and of_moe["at equal time"].startswith("2.700")
