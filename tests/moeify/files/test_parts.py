"""Folders of parts: which belong together, which are missing, and what their records say."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest

from moeify.errors import CheckpointError
from moeify.files.parts import Parts
from moeify.files.staging import RESUME_RECORD, begun_folder
from moeify.files.work_folder import WorkFolder

WORDS = ("source", "size")


def finished(output: Path, number: int, count: int, record: str = "a\nb\n") -> Path:
    parts = Parts(output, count)
    parts.folder(number).mkdir()
    parts.finish(parts.folder(number), record)
    return parts.folder(number)


def test_the_division_is_that_of_the_parts_that_are_there(tmp_path: Path) -> None:
    output = tmp_path / "moe"
    with pytest.raises(CheckpointError, match="no parts beside it to join"):
        Parts(output)
    (tmp_path / "moe.part-0-of-3").mkdir()
    (tmp_path / "other.part-1-of-7").mkdir()
    finished(output, 2, 3)
    assert Parts(output).count == 3 and Parts(output).missing() == [1, 3]
    with pytest.raises(CheckpointError, match=r"part-2-of-3 is a part of another division of .*moe than 2"):
        Parts(output, 2)


@pytest.mark.parametrize(
    ("record", "words"),
    [("a\nb\n", None), ("x\nb\n", "another source"), ("a\nx\n", "another size"), ("", "another conversion")],
)
@pytest.mark.parametrize("begun", [False, True])
def test_a_record_says_what_is_another(tmp_path: Path, record: str, words: str | None, begun: bool) -> None:
    parts = Parts(tmp_path / "moe", 2)
    if begun:
        place = begun_folder(parts.folder(1))
        place.mkdir(parents=True)
        (place / RESUME_RECORD).write_text(record)
        words = words if record else None  # it is just being written
    else:
        finished(tmp_path / "moe", 1, 2, record)
    said = rf"\(part 1 of 2\) was written for {words}: give every part the same"
    with pytest.raises(CheckpointError, match=said) if words else nullcontext():
        parts.check("a\nb\n", WORDS)


def test_files_are_taken_and_parts_are_removed(tmp_path: Path) -> None:
    output, folder = tmp_path / "moe", tmp_path / "staged"
    folder.mkdir()
    (finished(output, 1, 1) / "model.safetensors").write_text("x")
    parts = Parts(output)
    parts.take(1, "model.safetensors", folder)
    parts.remove()
    parts.remove()
    assert (folder / "model.safetensors").read_text() == "x" and parts.missing() == [1]


def test_what_a_run_left_that_was_killed_when_its_part_was_whole_is_removed_too(tmp_path: Path) -> None:
    output = tmp_path / "moe"
    work = WorkFolder(finished(output, 1, 1))
    work.open()
    work.start(resume=False)
    work.close()
    assert work.path.is_dir()
    Parts(output).remove()
    assert list(tmp_path.iterdir()) == []
