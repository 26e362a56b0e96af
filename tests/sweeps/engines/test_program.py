"""What an engine's program says of a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from sweeps.engines.program import COUNT, EXPECTED, MODEL, TOKENS, Told, compared, difference, main

EXPECTED_TV = np.array([[1.0, -4.0, 2.0], [0.0, 1.0, 3.0]], np.float32)


def test_tokens_are_many_different_ones() -> None:
    assert len(TOKENS) == COUNT and len(set(TOKENS)) > 200 and min(TOKENS) >= 3 and max(TOKENS) < 49_152


def test_a_difference_is_relative_to_the_largest_logit() -> None:
    moved = EXPECTED_TV.copy()
    moved[1, 0] = 1.0
    assert difference(Told(moved), EXPECTED_TV) == 0.25
    assert difference(Told(EXPECTED_TV), EXPECTED_TV) == 0.0


def test_logits_of_some_tokens_are_compared_with_those_of_the_same_tokens() -> None:
    ids = np.array([[2, 0], [2, 1]])
    assert difference(Told(np.array([[2.0, 1.0], [3.0, 1.0]]), ids), EXPECTED_TV) == 0.0
    assert difference(Told(np.array([[1.0, 2.0], [3.0, 1.0]]), ids), EXPECTED_TV) == 0.25


def test_what_is_no_number_has_no_difference() -> None:
    assert difference(Told(np.full_like(EXPECTED_TV, np.nan)), EXPECTED_TV) is None


def test_a_position_that_is_missing_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"shape \(1, 3\), expected \(2, 3\)"):
        difference(Told(EXPECTED_TV[:1]), EXPECTED_TV)


def test_what_an_engine_refuses_is_told_and_the_next_is_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(path: Path) -> Told:
        if path.parent.name == "bad":
            raise ValueError("no\nsuch model")
        return Told(2 * EXPECTED_TV)

    folders = [str(tmp_path / name) for name in ("bad", "good")]
    for folder in folders:
        (Path(folder) / MODEL).mkdir(parents=True)
        np.save(Path(folder) / EXPECTED, EXPECTED_TV)
    monkeypatch.setattr("sys.argv", ["program", *folders])
    main(compared(run), "1.2")
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line]
    assert told == [
        {"version": "1.2", "folder": folders[0], "error": "ValueError: no such model"},
        {"version": "1.2", "folder": folders[1], "difference": 1.0},
    ]
