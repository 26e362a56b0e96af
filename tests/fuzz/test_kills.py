"""The program that kills runs sees torn outputs, next runs that fail and what is left, and is content with moeify."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from random import Random

import pytest

from tests.fuzz import kills
from tests.fuzz.__main__ import prepare
from tests.fuzz.kills import Task, kill_once, race_once
from tests.fuzz.part_kills import kill_parts_once
from tests.fuzz.process import OPTIONS, digest, run
from tests.fuzz.sources import source


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    """A conversion of a tiny model, and what it makes."""
    prepare()
    folder = tmp_path_factory.mktemp("kills")
    shutil.copytree(source("llama"), folder / "src")
    arguments = ("convert", "src", "dst", *OPTIONS)
    assert run(arguments, folder) == (0, [])
    return Task(folder, "dst", arguments, True, None, digest(folder, "dst"), 0.1)


def test_moeify_is_right(task: Task) -> None:
    left, problem = kill_once(task, Random(0))
    assert left.partition(" and ")[0] in ("absent", "new") and problem == ""
    ended, problem = race_once(task.folder, Random(0), task.new)
    assert ended.startswith("one ") and problem == ""


def test_parts_are_right(task: Task) -> None:
    left, problem = kill_parts_once(task.folder, Random(3), task.new, 0.1)
    assert left != "torn" and problem == ""


def test_a_torn_output_is_seen(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(_: object, folder: Path, __: object) -> int:
        child = os.fork()
        if child == 0:
            (folder / "dst").mkdir()
            (folder / ".dst.moeify-partial").mkdir()
            (folder / ".dst.moeify-partial/lock").touch()
            time.sleep(3)
            os._exit(0)
        return child

    monkeypatch.setattr(kills, "start", start)
    assert kill_once(task, Random(1)) == ("torn", "a torn output: ['dst']")


def test_a_next_run_that_fails_or_leaves_something_is_seen(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    kills.prepared(task)
    monkeypatch.setattr(kills, "run", lambda *_: (1, ["Error: x"]))
    assert "ended with 1" in kills._again(task, Random(0), whole=False)
    monkeypatch.setattr(kills, "run", lambda *_: (0, []))
    assert "the next run left" in kills._again(task, Random(0), whole=False)
    assert "beside a whole output the next run ended with 0" in kills._again(task, Random(0), whole=True)
