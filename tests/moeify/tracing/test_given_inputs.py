from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from moeify.errors import ConfigError
from moeify.tracing.given_inputs import check_token_ids, read_inputs
from tests.moeify import tiny


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
        ('{"x": {"shape": [2], "dtype": "quint8"}}', "dtype is not one of torch's that safetensors can hold"),
        ('{"x": {"shape": [1, 300000000]}}', r"x has 3e\+08 values, expected at most 100,000,000"),
        ('{"x": {"shape": [%s1]}}' % ("1, " * 64), "its shape is not a list of at most 64 numbers"),
        ('{"x": {"shape": "2"}}', "its shape is not a list"),
        ('{"x": {"shape": [%s]}}' % ("9" * 300), r"x has 1e\+300 values"),
        ('{"x": [%s]}' % ("9" * 300), "x is not a tensor"),
        ('{"x": [%s]}' % ("9" * 5000), "more than 300 digits"),
        ('{"x": %s' % ("[" * 9999), "nested more than 64 deep"),
        ('{"x": [1], "x": [2]}', "x is there twice"),
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


def test_safetensors_have_the_same_limits(tmp_path: Path) -> None:
    header = b'{"x":{"dtype":"U8","shape":[300000000],"data_offsets":[0,300000000]}}'
    with (tmp_path / "inputs.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 300_000_000)  # sparse
    with pytest.raises(ConfigError, match=r"x has 3e\+08 values"):
        read_inputs(tmp_path / "inputs.safetensors")


@pytest.mark.parametrize(("ids", "wrong"), [([[0, 101]], 101), ([[-1, 3]], -1), ([[0, 100]], None), ([[]], None)])
def test_token_ids_must_be_those_of_the_model(ids: list[list[int]], wrong: int | None) -> None:
    model: Any = tiny.build("llama")
    if wrong is None:
        check_token_ids(model, {"input_ids": torch.tensor(ids)})
        return
    with pytest.raises(ConfigError, match=f"input_ids hold {wrong}: the model has the token ids 0 to 100"):
        check_token_ids(model, {"input_ids": torch.tensor(ids)})


def test_what_holds_no_token_ids_is_not_looked_at() -> None:
    model: Any = tiny.build("llama")
    check_token_ids(model, {"input_ids": torch.empty(2, 3, dtype=torch.int64, device="meta"), "mask": torch.ones(2)})
    check_token_ids(model, {"inputs_embeds": torch.full((2, 3), 999.0)})
    vision: Any = tiny.build("vit")
    check_token_ids(vision, {"input_ids": torch.tensor([999])})
