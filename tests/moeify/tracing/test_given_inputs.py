from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from moeify.errors import ConfigError
from moeify.tracing.given_inputs import read_inputs


def written(folder: Path, text: str) -> Path:
    path = folder / "inputs.json"
    path.write_text(text)
    return path


def test_json_holds_values_shapes_and_settings(tmp_path: Path) -> None:
    text = """{"input_ids": [[1, 2, 3]], "mask": [[true, false]], "scale": [0.5], "use_cache": false, "mode": null,
               "pixel_values": {"shape": [1, 3, 4, 4]}, "positions": {"shape": [2, 0], "dtype": "int64"}}"""
    given: dict[str, Any] = read_inputs(written(tmp_path, text))
    assert torch.equal(given["input_ids"], torch.tensor([[1, 2, 3]]))
    assert given["mask"].dtype is torch.bool and given["scale"].dtype is torch.float32
    assert given["use_cache"] is False and given["mode"] is None
    assert given["pixel_values"].is_meta and given["pixel_values"].shape == (1, 3, 4, 4)
    assert given["positions"].dtype is torch.int64


def test_safetensors_hold_tensors(tmp_path: Path) -> None:
    save_file({"input_ids": torch.arange(6).view(2, 3)}, tmp_path / "inputs.safetensors")
    given: dict[str, Any] = read_inputs(tmp_path / "inputs.safetensors")
    assert torch.equal(given["input_ids"], torch.arange(6).view(2, 3))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[1, 2]", "expected the arguments of forward by name"),
        ("{}", "expected the arguments of forward by name"),
        ("{", "is not a json file"),
        ('{"x": [[1], [2, 3]]}', "x is not a tensor"),
        ('{"x": ["one"]}', "x is not a tensor"),
        ('{"x": {"shape": [2], "dtype": "load"}}', "dtype is not one of torch's"),
        ('{"x": {"shape": [-2]}}', "x is not a tensor"),
        ('{"x": {"shape": [2], "device": "cuda"}}', "device beside shape and dtype"),
    ],
)
def test_what_is_no_input_is_refused_in_one_line(text: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=reason) as raised:
        read_inputs(written(tmp_path, text))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["missing.json", "broken.safetensors", "inputs.pt"])
def test_files_of_other_kinds_are_refused(name: str, tmp_path: Path) -> None:
    if name.startswith("broken"):
        (tmp_path / name).write_bytes(b"not safetensors at all")
    with pytest.raises(ConfigError, match=name):
        read_inputs(tmp_path / name)
