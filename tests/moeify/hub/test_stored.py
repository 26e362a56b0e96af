from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from moeify.checkpoint.source import open_source
from moeify.checkpoint.tensor_info import TensorInfo
from moeify.errors import CheckpointError
from moeify.hub.stored import Absent, _list_of, present


def test_what_is_absent_has_a_shape_and_the_dtype_that_is_asked_for() -> None:
    tensor = Absent(TensorInfo("w", "BF16", (3, 5)))[...].to(device="cpu", dtype=torch.float32)
    assert tensor.is_meta and tensor.shape == (3, 5) and tensor.dtype == torch.float32


@pytest.mark.parametrize(("stored", "held"), [("I64", torch.float32), ("F32", torch.int64), ("BOOL", torch.float16)])
def test_numbers_of_another_kind_are_an_error(stored: str, held: torch.dtype) -> None:
    with pytest.raises(CheckpointError, match=f"tensor w is {stored}, and the model holds"):
        Absent(TensorInfo("w", stored, (3,))).to(device="cpu", dtype=held)


def test_what_is_present_is_read_when_it_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    values = {"a": torch.randn(3, 5), "b": torch.arange(4)}
    save_file(values, tmp_path / "model.safetensors")
    with open_source(tmp_path) as source:
        tensors = present(source, ["a", "b"])
    assert {name: tensor.get_dtype() for name, tensor in tensors.items()} == {"a": "F32", "b": "I64"}
    assert all(tensors[name][...].equal(value) for name, value in values.items())
    (tmp_path / "model.safetensors").unlink()
    assert tensors["a"][1:].equal(values["a"][1:]), "the file is opened once"


def test_each_list_of_experts_has_a_mapping_of_its_own() -> None:
    names = [
        "layers.3.mlp.experts.12.w1.weight",
        "layers.3.attn.k_proj.weight",
        "layers.4.norm.weight",
        "lm_head.weight",
    ]
    assert list(map(_list_of, names)) == ["layers.3.mlp.experts", "layers", "layers", ""]
