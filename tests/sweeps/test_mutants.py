from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from sweeps import mutants as program
from sweeps.mutation import mutants

FILES = {
    "moeify/__init__.py": "",
    "moeify/a.py": "def double(x):\n    return x * 2\n\n\ndef is_large(x):\n    return x > 10\n",
    "tests/moeify/test_a.py": "from moeify.a import double, is_large\n\n\ndef test_a():\n    assert double(3) == 6\n"
    "    assert is_large(20) and not is_large(3)\n",
}
SURVIVES = "moeify/a.py is_large: x > 10 -> x >= 10"


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "equivalent.toml").touch()
    subprocess.run(["git", "init", "--quiet", "."], cwd=tmp_path, check=True)
    monkeypatch.setattr(program, "ROOT", tmp_path)
    monkeypatch.setattr(program, "EQUIVALENT", tmp_path / "equivalent.toml")
    return tmp_path


def run(repository: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Any:
    record = repository / "record.json"
    monkeypatch.setattr(sys, "argv", ["mutants", *arguments, "--jobs", "2", "--record", str(record)])
    program.main()
    return json.loads(record.read_text())


def seed_of_a_survivor() -> str:
    """A seed whose sample holds the mutant that the tests do not notice."""
    files = {name: text.encode() for name, text in FILES.items() if name.startswith("moeify")}
    return str(next(s for s in range(100) if SURVIVES in {mutant.key for mutant in program.draw(files, s)}))


def test_a_run_its_repetition_and_a_second_look(
    repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seed = seed_of_a_survivor()
    record = run(repository, monkeypatch, "50", "--seed", seed)
    results = dict(record["mutants"])
    assert len(results) == 2 and results.pop(SURVIVES)["status"] == "survived"
    (killed,) = results.values()
    assert (killed["status"], killed["by"]) == ("killed", "tests/moeify/test_a.py::test_a")
    assert record["fail on unchanged code"] == []
    shown = capsys.readouterr().out
    assert "all                               1          0          1        50%" in shown
    assert f"survived:\n{SURVIVES} (line 6)" in shown

    again = run(repository, monkeypatch, "50", "--seed", seed)
    assert again == record and "1/" not in capsys.readouterr().out, "nothing was left to do"

    test = repository / "tests/moeify/test_a.py"
    test.write_text(test.read_text() + "    assert not is_large(10)\n")
    record["mutants"]["moeify/a.py gone: 1 -> 2"] = record["mutants"][SURVIVES]
    (repository / "record.json").write_text(json.dumps(record))
    mended = run(repository, monkeypatch, "--again")
    assert mended["mutants"].keys() == again["mutants"].keys(), "what the code has no more leaves the record"
    assert mended["mutants"][SURVIVES]["status"] == "killed"
    assert "1/1 killed" in capsys.readouterr().out


def test_an_equivalent_mutant_is_neither_run_nor_counted(
    repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program.EQUIVALENT.write_text(f'"{SURVIVES}" = "no reason at all"\n')
    record = run(repository, monkeypatch, "50", "--seed", seed_of_a_survivor())
    assert SURVIVES not in record["mutants"]
    assert "all                               1          0          0       100%" in capsys.readouterr().out


def test_a_test_that_fails_on_unchanged_code_is_named(
    repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (repository / "tests/moeify/test_a.py").write_text("from moeify import a\n\n\ndef test_a():\n    assert 1 == 2\n")
    record = run(repository, monkeypatch, "1")
    assert record["fail on unchanged code"] == ["tests/moeify/test_a.py::test_a"]
    shown = capsys.readouterr().out
    assert "fails on unchanged code, so its kills do not count: tests/moeify/test_a.py::test_a" in shown
    assert "all                               0          0          0          -" in shown


def test_the_sample_depends_on_the_seed_only_and_grows_at_its_end() -> None:
    files = {path: text for path, text in program.sources().items() if path.startswith(("moeify/c", "moeify/h"))}
    long = [mutant.key for mutant in islice(program.draw(files, 0), 60)]
    assert [mutant.key for mutant in islice(program.draw(dict(reversed(files.items())), 0), 20)] == long[:20]
    assert [mutant.key for mutant in islice(program.draw(files, 1), 20)] != long[:20]
    areas = [program.area_of(key.partition(" ")[0]) for key in long]
    assert areas.count("moeify/checkpoint") > areas.count("moeify/hub") > 0


def test_every_area_with_a_weight_exists() -> None:
    areas = {program.area_of(path) for path in program.sources()}
    assert sorted(set(program.WEIGHTS) - areas) == []


def test_every_equivalent_mutant_can_still_be_made() -> None:
    known = {mutant.key for path, source in program.sources().items() for mutant in mutants(path, source)}
    listed = tomllib.loads(program.EQUIVALENT.read_text())
    assert sorted(set(listed) - known) == []
    assert all(isinstance(reason, str) and reason for reason in listed.values())
