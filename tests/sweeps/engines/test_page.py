"""The page of engines is what its record says."""

from __future__ import annotations

from dataclasses import replace

from moeify.families.base import LLAMA_CPP, MLX, VLLM
from sweeps.engines.page import PAGE, cell, table
from sweeps.engines.record import REFUSED, RIGHT, SGLANG_LOADER, UNKNOWN, WRONG, Row, read_record

ROW = Row("qwen2", "qwen2_moe", VLLM, "0.32.0", RIGHT, 1e-6, 2.5e-6)


def test_the_page_is_what_the_record_says() -> None:
    assert PAGE.read_text() == table(read_record()), "write it again: python -m sweeps.engines --page"


def test_a_cell_has_the_largest_difference_of_all_sources() -> None:
    rows = [ROW, replace(ROW, source="llama", copies=7e-6), replace(ROW, engine=MLX, copies=9e-6)]
    assert cell(rows, "qwen2_moe", VLLM) == "right, 7.0e-06"


def test_a_cell_says_where_an_engine_is_wrong_or_does_not_run() -> None:
    wrong = replace(ROW, source="llama", result=WRONG, copies=None)
    assert cell([wrong], "qwen2_moe", VLLM) == "**wrong**"
    assert cell([ROW, wrong], "qwen2_moe", VLLM) == "right, 2.5e-06; **wrong** from llama"
    assert cell([replace(wrong, result=REFUSED)], "qwen2_moe", VLLM) == "**does not run**"
    assert cell([replace(wrong, result=UNKNOWN)], "qwen2_moe", VLLM) == "not known"
    assert cell([ROW], "mixtral", VLLM) == "not run"


def test_a_cell_counts_many_sources() -> None:
    wrong = [replace(ROW, source=source, result=WRONG) for source in ("llama", "mistral", "seed_oss")]
    assert cell([ROW, *wrong], "qwen2_moe", VLLM) == "right, 2.5e-06; **wrong** from 3 sources"


def test_what_is_wrong_for_one_reason_is_one_line_with_its_place() -> None:
    wrong = replace(ROW, engine=LLAMA_CPP, result=WRONG, copies=0.5, differing=None)
    other = replace(wrong, source="llama", copies=0.25, differing=0.125)
    line = next(line for line in table([wrong, other]).splitlines() if line.startswith("| llama.cpp | qwen2_moe |"))
    *_, sources, numbers, where = line.strip("| ").split(" | ")
    assert (sources, numbers) == ("qwen2, llama", "wrong: 5.0e-01, 1.2e-01") and "qwen2moe.cpp:139" in where


def test_what_was_measured_has_a_line_for_each_source() -> None:
    wrong = replace(ROW, engine=LLAMA_CPP, result=WRONG, differing=None)
    other = replace(ROW, source="llama", engine=SGLANG_LOADER, copies=1e-16)
    lines = table([ROW, wrong, other, replace(ROW, source="llama", engine=MLX, result=UNKNOWN)]).splitlines()
    assert lines[-3:] == [
        "|---|---|---|---|---|---|",
        "| qwen2_moe | qwen2 | 1.0e-06 / 2.5e-06 | **1.0e-06 / NaN** | - | - |",
        "| qwen2_moe | llama | - | - | not known | right |",
    ]
