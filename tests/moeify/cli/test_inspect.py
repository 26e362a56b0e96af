from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from moeify.cli import main
from tests.moeify import tiny


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_json_is_one_document_with_the_promised_fields(name: str, tmp_path: Path) -> None:
    src = tiny.save(tiny.build(name), tmp_path / "src")
    result = CliRunner().invoke(main, ["inspect", str(src), "--json"])
    assert result.exit_code == 0, result.output
    seen = json.loads(result.stdout)
    assert seen["model_type"] == name and len(seen["ffns"]) == tiny.LAYERS
    ffn = seen["ffns"][1]
    assert ffn["hidden"] == tiny.HIDDEN and ffn["intermediate"] == tiny.INTERMEDIATE
    matrices = {"llama": 3, "bert": 2}[name] * tiny.HIDDEN * tiny.INTERMEDIATE
    biases = {"llama": 0, "bert": tiny.HIDDEN + tiny.INTERMEDIATE}[name]
    assert ffn["count_params"] == matrices + biases
    assert seen["cost"]["moe"]["parameters"] > seen["cost"]["dense"]["parameters"]


def test_people_get_tables(tmp_path: Path) -> None:
    src = tiny.save(tiny.build("bert"), tmp_path / "src")
    result = CliRunner().invoke(main, ["inspect", str(src)])
    assert "3 dense FFNs" in result.stdout and "gelu" in result.stdout
    assert "cls.predictions.decoder" in result.stdout and "head" in result.stdout


def test_example_inputs_are_taken_in_the_place_of_guesses(tmp_path: Path) -> None:
    src, given = tiny.save(tiny.build("llama"), tmp_path / "src"), tmp_path / "inputs.json"
    given.write_text('{"inputs_embeds": {"shape": [2, 5, 36]}, "use_cache": false}')
    result = CliRunner().invoke(main, ["inspect", str(src), "--json", "--example-inputs", str(given)])
    assert result.exit_code == 0, result.output
    assert len(json.loads(result.stdout)["ffns"]) == tiny.LAYERS
    given.write_text('{"waveform": [[0.5]]}')
    result = CliRunner().invoke(main, ["inspect", str(src), "--example-inputs", str(given)])
    assert result.exit_code == 1
    assert "exactly one of input_ids" in result.stderr and "--example-inputs FILE" in result.stderr
