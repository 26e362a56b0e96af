"""A judge that calls everything right would be no judge: one right outcome, and each way to spoil it."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from tests.fuzz.damage.code import MARKER
from tests.fuzz.damage.leftovers import WORK_FOLDER
from tests.fuzz.driver import Outcome
from tests.fuzz.judge import State, judge, state_of, wrong_card

BEFORE = {"work": "folder", "work/src": "folder", "work/src/config.json": "1", "work/foreign.txt": "2"}
MADE = {**BEFORE, "work/dst": "folder", "work/dst/config.json": "3"}
DONE = Outcome(0, 0, "", "llama → mixtral: 3 FFNs become 3 experts, top-2\nwritten to dst\n", 0, 1.0, "")
REFUSED = replace(DONE, code=1, stderr="llama → mixtral: 3 FFNs\nError: src/config.json is damaged\n")
WRONG_USAGE = replace(DONE, code=2, stderr="Usage: moeify convert\nTry 'moeify convert -h' for help.\n\nError: no\n")
NET = replace(DONE, code=1, stderr="Error: KeyError: 'x'; set MOEIFY_DEBUG=1 to see where\n")


def outcome_of(outcome: Outcome, after: State, before: State = BEFORE) -> str:
    return judge(outcome, before, after, ("work/dst",))[0]


@pytest.mark.parametrize(
    ("outcome", "after", "word"),
    [
        (DONE, MADE, "accepted"),
        (REFUSED, BEFORE, "handled"),
        (WRONG_USAGE, BEFORE, "handled"),
    ],
)
def test_what_is_right(outcome: Outcome, after: State, word: str) -> None:
    assert outcome_of(outcome, after) == word


@pytest.mark.parametrize(
    ("outcome", "word"),
    [
        (NET, "unforeseen"),
        (replace(REFUSED, code=-7, signal=signal.SIGBUS), "killed"),
        (replace(REFUSED, code=-14, signal=signal.SIGALRM), "hang"),
        (replace(REFUSED, code=-24, signal=signal.SIGXCPU), "hang"),
        (replace(REFUSED, growth=2 * 2**30), "memory"),
        (replace(REFUSED, stderr="Error: RuntimeError: DefaultCPUAllocator: can't allocate memory\n"), "memory"),
        (replace(REFUSED, code=97, stderr="Traceback (most recent call last):\nKeyError: 1\n"), "traceback"),
        (replace(REFUSED, code=120), "traceback"),
        (replace(REFUSED, stderr="Error: a\nError: b\n"), "not one line"),
        (replace(REFUSED, stderr="Error: a\nb\n"), "not one line"),
        (replace(REFUSED, stderr=""), "not one line"),
        (replace(REFUSED, stderr="x.py:3: UserWarning: y\nError: a\n"), "not one line"),
        (replace(REFUSED, stderr="[transformers] y\nError: a\n"), "not one line"),
        (replace(REFUSED, stderr="Error: \x1b[1m\n"), "not one line"),
        (replace(REFUSED, stdout="a\u202eb\n"), "not one line"),
    ],
)
def test_what_is_wrong_with_the_end_of_a_process(outcome: Outcome, word: str) -> None:
    assert outcome_of(outcome, BEFORE) == word


@pytest.mark.parametrize(
    ("outcome", "after", "word"),
    [
        (REFUSED, MADE, "left behind"),
        (REFUSED, {**BEFORE, "work/.dst.moeify-partial": "folder"}, "left behind"),
        (DONE, {**MADE, "work/.dst.moeify-old": "folder"}, "left behind"),
        (DONE, {**MADE, "work/dst2": "folder"}, "left behind"),
        (DONE, {**MADE, "x": "1"}, "left behind"),
        (DONE, {**MADE, "work/src/config.json": "9"}, "lost or changed"),
        (REFUSED, {**BEFORE, "work/foreign.txt": "9"}, "lost or changed"),
        (REFUSED, {name: BEFORE[name] for name in BEFORE if "foreign" not in name}, "lost or changed"),
        (DONE, {**MADE, f"work/{MARKER}": "1"}, "code ran"),
        (DONE, {**MADE, f"work/dst/{MARKER}": "1"}, "code ran"),
    ],
)
def test_what_is_wrong_with_the_files(outcome: Outcome, after: State, word: str) -> None:
    assert outcome_of(outcome, after) == word


def test_what_an_interrupted_run_left_may_go_and_must_go_in_the_end() -> None:
    left = {f"work/{WORK_FOLDER}": "folder", f"work/{WORK_FOLDER}/lock": "1"}
    assert outcome_of(REFUSED, BEFORE, {**BEFORE, **left}) == "handled"
    assert outcome_of(REFUSED, {**BEFORE, **left}, {**BEFORE, **left}) == "handled"
    assert outcome_of(DONE, MADE, {**BEFORE, **left}) == "accepted"
    assert outcome_of(DONE, {**MADE, **left}, {**BEFORE, **left}) == "left behind"
    foreign = {**BEFORE, **left, f"work/{WORK_FOLDER}/foreign.txt": "2"}
    assert outcome_of(REFUSED, BEFORE, foreign) == "lost or changed"


def test_an_old_output_may_be_replaced_and_not_lost() -> None:
    old = {**BEFORE, "work/dst": "folder", "work/dst/config.json": "0"}
    assert outcome_of(DONE, MADE, old) == "accepted"
    assert outcome_of(REFUSED, BEFORE, old) == "lost or changed"


def test_the_state_of_a_folder_is_names_kinds_and_contents(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/file").write_text("x")
    (tmp_path / "link").symlink_to("a")
    os.mkfifo(tmp_path / "pipe")
    before = state_of(tmp_path)
    assert sorted(before) == ["a", "a/file", "link", "pipe"] and before["link"] == "link to a"
    (tmp_path / "a/file").write_text("y")
    assert [name for name, content in state_of(tmp_path).items() if content != before[name]] == ["a/file"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("---\ntags: [moe, x]\n---\n\n# a\n", ""),
        ("---\ntags: [x]\n---\n", "the card has the tags ['x']"),
        ("# a\n", "the card has the tags None"),
        ("---\ntags: [moe\n---\n", "the hub cannot read the card"),
        ("---\ntags: [moe]\n---\n\n<script>", "the card holds markup of its source"),
    ],
)
def test_what_is_wrong_with_a_card(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(text)
    assert wrong_card(tmp_path / "README.md").startswith(said)
    assert bool(wrong_card(tmp_path / "README.md")) == bool(said)
