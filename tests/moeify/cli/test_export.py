from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.moeify import tiny
from tests.moeify.command import moeify_command


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense checkpoint with a tokenizer of one word for each id."""
    folder = tiny.save(tiny.build("llama"), tmp_path_factory.mktemp("source") / "src")
    tiny.tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("form", ["moe.onnx", "moe"])
def test_a_dense_checkpoint_converts_exports_and_speaks(
    source: Path, tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(tiny._LLAMA, "num_hidden_layers", 1)
    out = tmp_path / form
    result = moeify_command("export", source, out, "--preset", "mixtral", "--experts", 3, "--layers", "0", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["relative"] <= report["tolerance"] and report["operators"]["moeify::SparseMoE"] == 1
    spoken = moeify_command("run", out, "--prompt", "w5 w17 w3", "--max-new-tokens", 4, "--threads", 1)
    assert spoken.exit_code == 0, spoken.output
    assert 1 <= len(spoken.stdout.split()) <= 4 and spoken.stdout.startswith("w")
    assert "tokens/s" in spoken.stderr and "CPUExecutionProvider" in spoken.stderr
    again = moeify_command("export", source, out)
    assert again.exit_code == 1 and "exists" in again.stderr and len(again.stderr.splitlines()) == 1
    nowhere = moeify_command("run", out, "--prompt", "w1", "--provider", "cuda")
    assert nowhere.exit_code == 2 and "onnxruntime-gpu" in nowhere.stderr


def test_a_tokenizer_that_does_not_load_is_told(source: Path, tmp_path: Path) -> None:
    damaged = shutil.copytree(source, tmp_path / "damaged")
    (damaged / "tokenizer.json").write_text("{")

    def warned() -> list[str]:
        result = moeify_command(
            "export", damaged, tmp_path / "x.onnx", "--experts", 3, "--top-k", 2, "--layers", "none"
        )
        assert result.exit_code == 2 and "'none'" in result.stderr  # it got to the model
        return [line for line in result.stderr.splitlines() if line.startswith("warning: ")]

    (line,) = warned()
    assert "tokenizer.json is not valid JSON" in line and line.endswith("; the output has no tokenizer")
    for file in damaged.glob("tokenizer*"):
        file.unlink()
    assert not warned()


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--target", "tpu"], 2, "expected one of cpu, cuda, portable"),
        (["--experts", "3"], 2, "--experts and --top-k are needed"),
        (["--dtype", "float16"], 2, "the target cpu computes in float32: load it with dtype float32"),
        (["--target", "cuda", "--quantize", "int4", "--dtype", "float32"], 2, "load the model with dtype float16"),
    ],
)
def test_wrong_usage_is_one_line(source: Path, tmp_path: Path, options: list[str], code: int, message: str) -> None:
    result = moeify_command("export", source, tmp_path / "x.onnx", *options)
    assert result.exit_code == code and message in " ".join(result.stderr.split())
    assert not list(tmp_path.iterdir())


def test_a_source_that_is_not_there(tmp_path: Path) -> None:
    result = moeify_command("export", tmp_path / "none", tmp_path / "x.onnx")
    assert result.exit_code == 1 and "does not exist" in result.stderr
