from __future__ import annotations

from pathlib import Path

import pytest

from tests.moeify.command import moeify_command


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--prompt", "w1", "--provider", "tpu"], 2, "provider is 'tpu': expected one of"),
        (["--prompt", "w1", "--provider", "cuda"], 2, "onnxruntime-gpu"),
        (["--prompt", "w1", "--max-new-tokens", "0"], 2, "--max-new-tokens"),
        (["--prompt", "w1"], 1, "does not load"),
        ([], 2, "--prompt"),
    ],
)
def test_wrong_usage_is_one_line(tmp_path: Path, options: list[str], code: int, message: str) -> None:
    path = tmp_path / "x.onnx"
    path.write_bytes(b"no model")
    result = moeify_command("run", path, *options)
    assert result.exit_code == code and message in " ".join(result.stderr.split()) and not result.stdout


def test_a_folder_without_a_model_is_one_line(tmp_path: Path) -> None:
    result = moeify_command("run", tmp_path, "--prompt", "w1")
    assert result.exit_code == 1 and f"{tmp_path}/model.onnx" in result.stderr and len(result.stderr.splitlines()) == 1


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    result = moeify_command("run", tmp_path / "none.onnx", "--prompt", "w1")
    assert result.exit_code == 2 and "does not exist" in result.stderr
