from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moeify.config import MoEConfig
from tests.moeify import tiny
from tests.moeify.command import moeify_command

verify = partial(moeify_command, "verify")


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    src = tiny.save(tiny.build("llama"), tmp_path / "src")
    tiny.convert_files(src, tmp_path / "moe", MoEConfig(3, 2))
    return src, tmp_path / "moe"


def test_json_is_one_document_with_the_promised_fields(pair: tuple[Path, Path]) -> None:
    result = verify(*pair, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report.keys() == {
        "max_abs_diff",
        "max_abs_logit",
        "relative",
        "top1_agreement",
        "tolerance",
        "passed",
        "layers",
        "outside",
        "nan",
        "unused",
        "altered",
    }
    assert report["passed"] and report["relative"] < report["tolerance"] == 1e-2
    assert [layer["name"] for layer in report["layers"]] == [f"model.layers.{number}.mlp" for number in range(3)]
    assert all(layer["dtype"] == "float64" and layer["relative"] < 1e-12 for layer in report["layers"])
    assert report["outside"] < 1e-6


def test_one_changed_weight_is_exit_code_1(pair: tuple[Path, Path]) -> None:
    path = pair[1] / "model.safetensors"
    tensors = load_file(path)
    for expert in range(3):
        tensors[f"model.layers.0.block_sparse_moe.experts.{expert}.w2.weight"] *= 1.001
    save_file(tensors, path, {"format": "pt"})
    result = verify(*pair)
    assert result.exit_code == 1
    assert "not what moeify.json makes of the dense model: 3, first model.layers.0" in result.stderr
    (pair[1] / "moeify.json").unlink()
    result = verify(*pair)
    assert result.exit_code == 1
    assert "Error: model.layers.0.mlp differs from its dense FFN by" in result.stderr
    assert "3 layers, the worst model.layers.0.mlp" in result.stdout


@pytest.mark.parametrize("change", ["missing", "unexpected"])
def test_tensors_that_do_not_fit_are_errors(pair: tuple[Path, Path], change: str) -> None:
    path, name = pair[1] / "model.safetensors", "model.layers.1.block_sparse_moe.gate.weight"
    tensors = load_file(path)
    if change == "missing":
        del tensors[name]
    else:
        tensors["model.layers.1.stray.weight"] = torch.zeros(2)
    save_file(tensors, path, {"format": "pt"})
    result = verify(*pair)
    assert result.exit_code == 1 and f"{change} tensor" in result.stderr


def test_a_path_that_is_not_there(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    result = verify(pair[0], tmp_path / "nothing")
    assert result.exit_code == 1 and "does not exist" in result.stderr
    result = moeify_command("verify", pair[0], "x" * 300)
    assert result.exit_code == 1 and "does not exist" in result.stderr


def test_a_tensor_that_a_conversion_leaves_out_is_noted(pair: tuple[Path, Path]) -> None:
    path = pair[0] / "model.safetensors"
    save_file(load_file(path) | {"stray.weight": torch.zeros(2)}, path, {"format": "pt"})
    result = verify(*pair)
    assert result.exit_code == 0
    assert result.stderr == "note: the dense model has no place for stray.weight; it is left out\n"


def test_a_damaged_record_is_one_line(pair: tuple[Path, Path]) -> None:
    (pair[1] / "moeify.json").write_text("[]")
    result = verify(*pair)
    assert result.exit_code == 1 and len(result.stderr.splitlines()) == 1
    assert "moeify.json holds a JSON list, expected an object" in result.stderr


@pytest.mark.parametrize("target", ["auto", "moeify"])
def test_nan_where_the_dense_model_gives_nan_too_is_a_warning(pair: tuple[Path, Path], target: str) -> None:
    tensors = load_file(pair[0] / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.weight"].fill_(torch.nan)
    save_file(tensors, pair[0] / "model.safetensors", {"format": "pt"})
    moe = pair[1].with_name("nan")
    arguments = ["convert", str(pair[0]), str(moe), "--experts", "3", "--top-k", "2", "--to", target]
    result = moeify_command(*arguments)
    assert result.exit_code == 0, result.output
    assert "logits are NaN in both models, at the same places" in result.stderr
    verified = verify(pair[0], moe)
    assert verified.exit_code == 0 and "logits are NaN in both models" in verified.stderr
    assert verify(pair[0], pair[1]).exit_code == 1
