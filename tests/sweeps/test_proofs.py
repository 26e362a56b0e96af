"""Right conversions on a few inputs, and every wrong one."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.record import read
from moeify.measure import TOLERANCE
from sweeps.corruptions import COPY, CORRUPTIONS, build, convert, refusal
from sweeps.proofs import CONVERSIONS, PAGE, RECORD, missed, page, prove, refusals, summary


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
def test_no_right_conversion_is_refused(name: str) -> None:
    tally = prove(name, 10)
    assert (tally.inputs, tally.refused) == (10, 0)
    assert tally.layer < TOLERANCE["float64"] and tally.outside < 1e-6 < 1e-4 > tally.whole


@pytest.mark.parametrize(
    "name",
    ["missing renormalization", "bias of an expert", "lost shard", "one weight by 1e-3, last layer", "another epsilon",
     "router order, of copies", "biases of attention lost"],
)  # fmt: skip
def test_every_wrong_one_is(name: str) -> None:  # the others take minutes: `python -m sweeps.proofs`
    row = refusals(name)
    assert not missed({name: row}), row


def test_what_is_damaged_was_right_before(tmp_path: Path) -> None:
    for source in {corruption.source for corruption in CORRUPTIONS.values()}:
        assert refusal(*convert(build(source), tmp_path / source, COPY)) is None


def test_the_page_is_what_the_record_says() -> None:
    assert PAGE.read_text() == page(read(RECORD).runs), "write it again: python -m sweeps.proofs --page"
    assert read(RECORD).summary == summary(read(RECORD).runs)


def test_the_page_says_what_was_refused() -> None:
    row = {"target": "mixtral", "inputs": 9, "refused": 1, "layer": 1e-15, "outside": 0.0, "whole": 1e-6, "above": 2}
    wrong = {"lost shard": {"with the plan": None, "without": "because"}}
    text = page({"right": dict.fromkeys(CONVERSIONS, row), "wrong": wrong})
    assert "72 random inputs, 8 refused" in text and "1 kinds, 1 not refused" in text
    assert "| lost shard | not refused | because |" in text
