"""Records are read as they were written, and every page in benchmarks/ is what its record says."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from benchmarks.measure import GIB, Run, key, medians, raw, table
from benchmarks.record import ROOT, Record, measured, programs, read, record_of, rounded, write

RECORD = Record("x → y", "z", "a machine", "2026-11-27", "abc", "python -m x", {"torch": "2"}, ["moeify"],
                {"a": {"b": 1.5}, "c": 2}, {"a": [{"seconds": 1.0}]})  # fmt: skip


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    write(RECORD, tmp_path / "x.json")
    assert read(tmp_path / "x.json") == RECORD
    assert '\n  "a": {"b": 1.5},\n  "c": 2\n' in (tmp_path / "x.json").read_text(), "a line for each"


def test_a_record_says_where_when_and_with_what_it_was_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", [str(ROOT / "benchmarks/gpu/__main__.py"), "--dry"])
    made = measured("x", "y", ["moeify"], {}, [], packages=("click", "no-such-package"), versions={"peer": "1"})
    assert made.command == "python -m benchmarks.gpu --dry"
    assert made.versions["peer"] == "1" and made.versions["no-such-package"] == "not installed"
    assert "cores" in made.machine and made.date.count("-") == 2
    assert f"Measured on {made.date}" in made.line() and "`python -m benchmarks.gpu --dry`" in made.line()


@pytest.mark.parametrize("name", programs())
def test_a_page_and_a_summary_are_those_of_the_record(name: str) -> None:
    program, record = import_module(name), read(record_of(name))
    assert record_of(name).with_suffix(".md").read_text() == program.page(record), (
        "python -m benchmarks.record writes it"
    )
    if record.runs:
        found = numbers(program.summary(record.runs))
        assert found == pytest.approx(numbers(record.summary), rel=0.02 if record.note else 1e-9)
    else:
        assert record.note, "raw runs are kept, or a note says why not"


def numbers(tree: Any, path: str = "") -> dict[str, float]:
    """The numbers of a summary by their paths."""
    if not isinstance(tree, dict):
        return {path: tree} if isinstance(tree, (int, float)) else {}
    return {name: at for child, each in tree.items() for name, at in numbers(each, f"{path}.{child}").items()}


def test_names_are_made_fit_for_links() -> None:
    assert [key(name) for name in ("… --workers 2", "cp -r", "com.microsoft::MoE, by hand")] == [
        "workers_2", "cp_r", "com_microsoft_MoE_by_hand",
    ]  # fmt: skip


def test_samples_keep_few_digits() -> None:
    assert rounded({"a": [1.23456, 123456.0]}) == {"a": [1.235, 123500.0]}


def test_medians_are_told_beside_the_peer() -> None:
    runs = {"a": [Run(s, 1.0, GIB, 2 * GIB) for s in (3.0, 1.0, 2.0)], "b c": [Run(4.0, 2.0, 3 * GIB, GIB)]}
    found = medians(raw(runs), "b c")
    assert found["a"]["seconds"] == 2.0 and found["a"]["time"] == 0.5 and found["b_c"]["time"] == 1.0
    line = "| a | 3 | 2.00 GiB | 2.0 s | 1.0 s, 3.0 s | 1.0 s | 1.00 GiB | 0.50 |"
    assert line in table(found, "b c").splitlines()
