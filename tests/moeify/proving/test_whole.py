from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from moeify.config import MoEConfig
from moeify.errors import CheckpointError, ConfigError
from moeify.hub import streaming
from moeify.pretrained import load_tensors
from moeify.proving import whole
from moeify.proving.proof import run
from moeify.proving.whole import verify_checkpoints
from tests.moeify import tiny

CONFIG = MoEConfig(experts=3, top_k=2)
tf: Any = transformers


def test_a_difference_in_a_late_layer_is_seen_by_the_whole_proof(tmp_path: Path) -> None:
    model = tiny.build("llama")
    src = tiny.save(model, tmp_path / "src")
    tiny.convert_files(src, tmp_path / "moe", CONFIG)
    assert verify_checkpoints(src, tmp_path / "moe").passed
    model.get_parameter("model.layers.2.mlp.down_proj.weight").data.mul_(1.01)
    other = tiny.save(model, tmp_path / "other")
    assert not verify_checkpoints(other, tmp_path / "moe").passed


def test_the_rounding_that_was_asked_for_is_not_held_against_the_conversion(tmp_path: Path) -> None:
    src = tiny.save(tiny.build("llama"), tmp_path / "src")
    tiny.convert_files(src, tmp_path / "moe", CONFIG, dtype="BF16")
    assert verify_checkpoints(src, tmp_path / "moe").passed
    record = tmp_path / "moe" / "moeify.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "cast_to": None}))
    assert not verify_checkpoints(src, tmp_path / "moe").passed


def test_a_method_without_a_promise_is_known_from_the_record_beside_the_model(tmp_path: Path) -> None:
    src = tiny.save(tiny.build("llama"), tmp_path / "src")
    tiny.convert_files(src, tmp_path / "moe", MoEConfig(3, 2, method="noise"))
    assert verify_checkpoints(src, tmp_path / "moe").tolerance is None
    (tmp_path / "moe" / "moeify.json").unlink()
    assert not verify_checkpoints(src, tmp_path / "moe").passed


def with_tokenizer(folder: Path) -> Path:
    """A folder whose tokenizer knows the words w0, w1, …"""
    tiny.tokenizer().save_pretrained(folder)
    return folder


def inputs_of_runs(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the models are run on, the dense one first."""
    given: list[dict[str, Any]] = []

    def spy(model: nn.Module, arguments: dict[str, Any]) -> torch.Tensor:
        given.append(arguments)
        return run(model, arguments)

    monkeypatch.setattr(whole, "run", spy)
    return given


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_a_text_goes_through_the_tokenizer_beside_the_model(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    src = with_tokenizer(tiny.save(tiny.build(name), tmp_path / "src"))
    tiny.convert_files(src, tmp_path / "moe", CONFIG)
    given = inputs_of_runs(monkeypatch)
    assert verify_checkpoints(src, tmp_path / "moe", text="w5 w9 " * 300).passed
    for arguments in given:
        assert arguments.keys() == {"input_ids", *(("decoder_input_ids",) if name == "t5" else ())}
        for ids in arguments.values():
            assert ids.shape == (1, 512) and ids[0, :4].tolist() == [5, 9, 5, 9]
    assert len(given) == 2  # and the MoE once more, around its layers


def test_a_text_without_tokens_is_an_error(tmp_path: Path) -> None:
    src = with_tokenizer(tiny.save(tiny.build("llama"), tmp_path / "src"))
    tiny.convert_files(src, tmp_path / "moe", CONFIG)
    with pytest.raises(ConfigError, match="gives no tokens"):
        verify_checkpoints(src, tmp_path / "moe", text=" \n")


def test_a_text_for_a_model_of_images_is_an_error(tmp_path: Path) -> None:
    src = with_tokenizer(tiny.save(tiny.build("vit"), tmp_path / "src"))
    tiny.convert_files(src, tmp_path / "moe", CONFIG)
    for file in src.glob("tokenizer*"):
        (tmp_path / "moe" / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ConfigError, match="takes pixel_values"):
        verify_checkpoints(src, tmp_path / "moe", text="w1")


def with_stray(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"stray.weight": torch.zeros(2)}, folder / "model.safetensors", {"format": "pt"})


def test_a_tensor_without_a_place_is_noted_of_the_dense_model_and_an_error_of_the_moe(tmp_path: Path) -> None:
    src = tiny.save(tiny.build("llama"), tmp_path / "src")
    with_stray(src)
    tiny.convert_files(src, tmp_path / "moe", CONFIG)
    report = verify_checkpoints(src, tmp_path / "moe")
    assert report.passed and report.unused == ("stray.weight",)
    with_stray(tmp_path / "moe")
    with pytest.raises(CheckpointError, match=r"unexpected tensor stray\.weight"):
        verify_checkpoints(src, tmp_path / "moe")


def test_few_layers_are_in_memory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    src = tiny.save(tiny.build("llama"), tmp_path / "src")
    tiny.convert_files(src, tmp_path / "moe", CONFIG)
    present: list[int] = []

    def spy(model: Any, tensors: Any, path: Path) -> None:
        load_tensors(model, tensors, path)
        present.append(sum(any(not p.is_meta for p in layer.parameters()) for layer in model.model.layers))

    monkeypatch.setattr(streaming, "load_tensors", spy)
    assert verify_checkpoints(src, tmp_path / "moe").passed
    assert present == [1] * 9  # the MoE runs again, around its experts


def test_a_model_that_reads_a_weight_outside_of_its_layer_is_loaded_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    src = tiny.save(tiny.build("llama"), tmp_path / "src")
    tiny.convert_files(src, tmp_path / "moe", CONFIG)
    run_model: list[bool] = []

    def reaching(model: Any, arguments: dict[str, Any]) -> torch.Tensor:
        run_model.append(any(parameter.is_meta for parameter in model.parameters()))
        first: torch.Tensor = model.model.layers[0].input_layernorm.weight
        return run(model, arguments) + 0 * first.sum()

    monkeypatch.setattr(whole, "run", reaching)
    assert verify_checkpoints(src, tmp_path / "moe").passed
    assert run_model == [True, False, True, False]
