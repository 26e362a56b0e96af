from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import moeify
from moeify.checkpoint.source import open_source
from moeify.config import MoEConfig
from moeify.errors import CheckpointError
from moeify.hub.loading import FirstLayers, load, load_first_layers, load_sparingly
from moeify.measure import TOLERANCE
from tests.moeify import tiny
from tests.moeify.checkpoint.make_gguf import write_gpt2

tf: Any = transformers


@pytest.mark.parametrize("target", ["mixtral", "moeify", "dense"])
def test_every_format_loads_in_evaluation_mode(tmp_path: Path, target: str) -> None:
    dense = tiny.build("llama")
    folder = tiny.save(dense, tmp_path / "src")
    if target != "dense":
        tiny.convert_files(folder, tmp_path / "moe", MoEConfig(3, 2), target=target)
        folder = tmp_path / "moe"
    model = moeify.load(str(folder), dtype=torch.float32, experts_implementation="eager")
    assert not model.training
    assert tiny.relative(tiny.logits(model, "llama"), tiny.logits(dense, "llama")) < TOLERANCE["float32"]


def test_a_hub_id_is_found_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    dense = tiny.build("llama")
    kept = tmp_path / "hub/models--org--name"
    tiny.save(dense, kept / "snapshots/0123")
    (kept / "refs").mkdir()
    (kept / "refs/main").write_text("0123")
    model = moeify.load("org/name", dtype=torch.float32)
    assert torch.equal(tiny.logits(model, "llama"), tiny.logits(dense, "llama"))
    for name, revision in (("org/other", None), ("org/name", "v2")):
        with pytest.raises(CheckpointError, match=f"{name} is not a folder here, not in the hub's cache {tmp_path}"):
            moeify.load(name, revision=revision)
    with pytest.raises(CheckpointError, match="no/such/folder does not exist: give a model folder"):
        moeify.load("no/such/folder")


def drop(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.layers.0.mlp.up_proj.weight"], tensors["model.layers.1.mlp.up_proj.weight"]


def add(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.stray.weight"] = torch.zeros(2)


def widen(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.weight"] = torch.ones(tiny.HIDDEN + 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop, r"missing tensor model.layers.0.mlp.up_proj.weight and 1 more for LlamaForCausalLM"),
        (add, r"unexpected tensor model.stray.weight for LlamaForCausalLM"),
    ],
)
def test_a_tensor_without_a_place_is_an_error(tmp_path: Path, change: Any, message: str) -> None:
    file = tiny.save(tiny.build("llama"), tmp_path / "src") / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=message):
        moeify.load(tmp_path / "src")


def test_a_tensor_of_another_shape_is_an_error(tmp_path: Path) -> None:
    file = tiny.save(tiny.build("llama"), tmp_path / "src") / "model.safetensors"
    tensors = load_file(file)
    widen(tensors)
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"mismatched tensor .*norm.weight"):
        moeify.load(tmp_path / "src", ignore_mismatched_sizes=True)


def test_other_numbered_lists_are_not_cut() -> None:
    layers = FirstLayers("encoder.layers.", 2)
    assert layers.keeps("encoder.layers.1.mlp.weight") and not layers.keeps("encoder.layers.2.mlp.weight")
    assert layers.keeps("features.conv_layers.6.weight") and layers.keeps("encoder.norm.weight")


def test_the_first_layers_compute_what_they_compute_in_the_whole_model(tmp_path: Path) -> None:
    model: Any = tiny.build("llama")
    with open_source(tiny.save(model, tmp_path / "src")) as source:
        first = load_first_layers(source, FirstLayers("model.layers.", 2))
        whole = load_first_layers(source, None)
    model.model.layers = model.model.layers[:2]
    model.config.num_hidden_layers = 2
    assert torch.equal(tiny.logits(first, "llama"), tiny.logits(model, "llama"))
    assert len(whole.get_submodule("model.layers")._modules) == 3


def test_of_equal_tensors_of_two_models_there_is_one(tmp_path: Path) -> None:
    """Whose numbers are all equal, and no others: one that differs in a single place is read."""
    model: Any = tiny.build("llama")
    src = tiny.save(model, tmp_path / "src")
    with torch.no_grad():
        model.model.embed_tokens.weight[3, 2] += 1e-6
    other = tiny.save(model, tmp_path / "other")
    with open_source(src) as source, open_source(other) as changed:
        first: Any = load_first_layers(source, None)
        second: Any = load_first_layers(changed, None, beside=first)
    shared = {
        name for name, held in second.state_dict().items() if held.data_ptr() == first.state_dict()[name].data_ptr()
    }
    assert second.state_dict().keys() - shared == {"model.embed_tokens.weight", "lm_head.weight"}  # tied
    assert all(torch.equal(held, second.state_dict()[name]) for name, held in model.state_dict().items())


def test_settings_of_each_layer_are_cut_too(tmp_path: Path) -> None:
    with open_source(tiny.save(tiny.build("qwen2"), tmp_path)) as source:
        assert len(source.config["layer_types"]) == 3
        model: Any = load_first_layers(source, FirstLayers("model.layers.", 2))
    assert model.config.num_hidden_layers == len(model.config.layer_types) == 2


def test_numbers_of_layers_are_cut_too(tmp_path: Path) -> None:
    sizes = {"hidden_size": 12, "intermediate_size": 20, "moe_intermediate_size": 8, "num_hidden_layers": 4,
             "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 11, "num_experts": 2,
             "num_experts_per_tok": 1, "mlp_only_layers": [0, 3]}  # fmt: skip
    tf.Qwen3MoeForCausalLM(tf.Qwen3MoeConfig(**sizes)).save_pretrained(tmp_path)
    with open_source(tmp_path) as source:
        model: Any = load_first_layers(source, FirstLayers("model.layers.", 2), experts_implementation="eager")
    assert model.config.mlp_only_layers == [0]
    assert [type(layer.mlp).__name__ for layer in model.model.layers] == ["Qwen3MoeMLP", "Qwen3MoeSparseMoeBlock"]


@pytest.mark.parametrize("target", ["mixtral", "moeify"])
def test_a_model_that_is_loaded_sparingly_is_the_same(tmp_path: Path, target: str) -> None:
    src = tiny.save(tiny.build("llama"), tmp_path / "src")
    (src / "generation_config.json").write_text('{"eos_token_id": [7, 8]}')
    tiny.convert_files(src, tmp_path / "moe", MoEConfig(3, 2, method="noise"), target=target)
    model, expected = load_sparingly(tmp_path / "moe", torch.bfloat16), load(tmp_path / "moe", dtype=torch.bfloat16)
    assert model.generation_config.eos_token_id == expected.generation_config.eos_token_id == [7, 8]
    found, held = model.state_dict(), expected.state_dict()
    assert found.keys() == held.keys()
    assert all(found[name].equal(tensor) and found[name].dtype == tensor.dtype for name, tensor in held.items())


def test_what_is_no_path_is_one_line() -> None:
    with pytest.raises(CheckpointError, match="NoneType is not a path"):
        load(None)  # type: ignore[arg-type]


def test_a_model_of_a_gguf_file_is_converted_in_place_and_saved(tmp_path: Path) -> None:
    model: Any = moeify.convert(load(write_gpt2(tmp_path / "m.gguf")), MoEConfig(3, 2))
    model.save_pretrained(tmp_path / "moe")
    again = load(tmp_path / "moe").state_dict()
    assert all(again[name].equal(tensor) for name, tensor in model.state_dict().items())


def test_a_gguf_file_is_loaded_sparingly_too(tmp_path: Path) -> None:
    file = write_gpt2(tmp_path / "m.gguf")
    model = load_sparingly(file, torch.float32)
    assert model.state_dict().keys() == load(file, dtype=torch.float32).state_dict().keys()
