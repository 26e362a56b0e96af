from __future__ import annotations

import json
from pathlib import Path

import pytest

from moeify.families.table import FAMILIES
from tests.moeify import tiny
from tests.moeify.command import moeify_command


def test_all_families_are_listed_with_sources_and_engines() -> None:
    result = moeify_command("families", env={"COLUMNS": "80"})
    assert result.exit_code == 0, result.output
    text = " ".join(result.stdout.split())
    assert all(f"{name}: made from {', '.join(family.sources)}" in text for name, family in FAMILIES.items())
    assert max(map(len, result.stdout.splitlines())) <= 80


def test_a_source_is_told_what_it_can_become_and_what_the_rest_fails(tmp_path: Path) -> None:
    src = str(tiny.save(tiny.build("qwen2"), tmp_path))
    result = moeify_command("families", src, "--json")
    assert result.exit_code == 0, result.output
    found = {name: entry["for this checkpoint"] for name, entry in json.loads(result.stdout).items()}
    assert {name for name, said in found.items() if said == "exact"} == {"glm4_moe", "qwen2_moe"}
    assert found["mixtral"].startswith("mixtral can be made from llama")
    few = moeify_command("families", src, "--layers", "0")
    assert "glm4_moe: in glm4_moe only the first layers can stay dense" in " ".join(few.stdout.split())


@pytest.mark.parametrize("name", ["nowhere"])
def test_a_source_that_is_not_there_is_one_line(name: str, tmp_path: Path) -> None:
    result = moeify_command("families", tmp_path / name)
    assert result.exit_code == 1 and len(result.stderr.splitlines()) == 1
