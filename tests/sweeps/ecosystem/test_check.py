"""The outcome of a check."""

from __future__ import annotations

from pathlib import Path

from sweeps.ecosystem.check import FAILS, WITH_A_LINE, WORKS, Check, outcome
from sweeps.ecosystem.models import Subject

SUBJECT = Subject("llama", Path("models/llama"), Path("scratch"))


def works(subject: Subject) -> None:
    assert subject is SUBJECT


def fails(_: Subject) -> None:
    raise ValueError("no linear\nlayers")


def test_a_check_that_raises_does_not_work() -> None:
    row = outcome(Check("pytest", "x", fails, issue="pytest#1"), SUBJECT)
    assert (row.result, row.why, row.line, row.issue) == (FAILS, "ValueError: no linear layers", "", "pytest#1")


def test_a_check_that_works_needs_no_line() -> None:
    row = outcome(Check("pytest", "x", works, line="y", with_line=fails, issue="pytest#1"), SUBJECT)
    assert (row.result, row.why, row.line, row.issue) == (WORKS, "", "", "")


def test_its_line_is_tried_next_and_the_first_failure_is_kept() -> None:
    row = outcome(Check("pytest", "x", fails, line="y", with_line=works), SUBJECT)
    assert (row.result, row.why, row.line) == (WITH_A_LINE, "ValueError: no linear layers", "y")
    row = outcome(Check("pytest", "x", fails, line="y", with_line=fails), SUBJECT)
    assert (row.result, row.why, row.line) == (FAILS, "ValueError: no linear layers", "")
