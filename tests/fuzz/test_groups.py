"""A case is made of its seed and its name alone, and every damage does what it says."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest

from tests.fuzz.driver import execute
from tests.fuzz.groups import GROUPS, make_case, whole
from tests.fuzz.judge import State, state_of
from tests.fuzz.sources import copy_of, source


def made(seed: int, group: str, number: int, folder: Path) -> tuple[str, State]:
    folder.mkdir()
    case = make_case(seed, group, number, folder)
    return str(case).replace(str(folder), ""), state_of(folder)


@pytest.mark.parametrize("name", ["mixtral", "moeify"])
def test_what_is_damaged_was_whole(name: str, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("w1 w2 w3")
    assert execute(["verify", str(source("llama")), str(source(name)), "--text", "text"], tmp_path).stderr == ""


@pytest.mark.parametrize("group", ["safetensors header", "config", "gguf", "places", "moe", "onnx"])
def test_a_case_is_the_same_again(group: str, tmp_path: Path) -> None:
    first = made(3, group, 5, tmp_path / "a")
    assert first == made(3, group, 5, tmp_path / "b")
    assert first != made(4, group, 5, tmp_path / "c") != made(4, group, 6, tmp_path / "d")


@pytest.mark.parametrize("group", [name for name, group in GROUPS.items() if len(group.damages) > 1])
def test_every_damage_changes_something(group: str, tmp_path: Path) -> None:
    kind = GROUPS[group]
    for number, damage in enumerate(dict.fromkeys(damage for damage in kind.damages if damage is not whole)):
        changed = 0
        for again in range(4):  # a choice may be what was there
            work = tmp_path / f"{number}-{again}"
            work.mkdir()
            (work / "foreign.txt").touch()
            source = copy_of(kind.sources[0], work)
            before = state_of(work)
            assert damage(Random(again), source)
            changed += state_of(work) != before
        assert changed >= 2, damage.__name__
