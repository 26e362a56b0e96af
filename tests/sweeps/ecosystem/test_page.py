"""The page of other tools is what its record says."""

from __future__ import annotations

from dataclasses import replace

from sweeps.ecosystem.__main__ import CHECKS, PAGE, read_record
from sweeps.ecosystem.check import FAILS, WITH_A_LINE, WORKS, Row
from sweeps.ecosystem.page import table

ROW = Row("trl", "1.16.0", "5.24.0", "`SFTTrainer`", "llama", WORKS, seconds=3.7)


def test_the_page_is_what_the_record_says() -> None:
    assert PAGE.read_text() == table(read_record()), "write it again: python -m sweeps.ecosystem --page"


def test_every_row_of_the_record_is_of_a_check() -> None:
    places = {(check.tool, check.done, model) for check in CHECKS for model in check.models}
    assert {(row.tool, row.done, row.model) for row in read_record()} <= places


def test_models_with_the_same_outcome_share_a_line() -> None:
    other = replace(ROW, model="gpt2", seconds=8.2)
    assert "| trl 1.16.0, transformers 5.24.0 | `SFTTrainer` | llama, gpt2 | works | 8 |\n" in table([ROW, other])


def test_what_does_not_work_says_why_and_where_it_is_known() -> None:
    failed = replace(ROW, result=FAILS, why=f"ValueError: a|b {'x' * 300}", issue="trl#1")
    lined = replace(ROW, result=WITH_A_LINE, line="moeify.linearize(model)", why="no linears")
    text = table([failed, lined, ROW])
    assert f"| does not: ValueError: a\\|b {'x' * 144}… (trl#1) |" in text
    assert "| works with a line of code: `moeify.linearize(model)`; without it: no linears |" in text
    assert "\n3 runs: 1 work, 1 work with a line of code, 1 do not.\n" in text
