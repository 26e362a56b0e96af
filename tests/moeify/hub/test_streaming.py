from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from moeify.checkpoint.source import open_source
from moeify.config import MoEConfig
from moeify.hub import streaming
from moeify.hub.loading import load
from moeify.hub.streaming import _layers, load_streamed
from moeify.pretrained import load_tensors
from tests.moeify import tiny
from tests.moeify.checkpoint.make_gguf import write_gpt2

tf: Any = transformers
NOISE = MoEConfig(3, 2, method="noise")  # no two experts are equal
EAGER: dict[str, Any] = {"experts_implementation": "eager"}
STACKS = {"llama": 3, "gpt2": 3, "bert": 3, "t5": 3, "qwen2": 3, "phi3": 3, "opt": 3, "gpt_neox": 3, "vit": 3}


def leave(_: nn.Module) -> None: ...


def empty_layers(model: nn.Module) -> set[str]:
    """Paths of the layers of which a weight is not in memory."""
    empty = [re.match(r".*?\.\d+(?=\.)", name) for name, weight in model.named_parameters() if weight.is_meta]
    return {found[0] for found in empty if found}


def streamed(folder: Path, name: str, **kwargs: Any) -> tuple[nn.Module, torch.Tensor]:
    with open_source(folder) as source:
        model, _ = load_streamed(source, leave, **kwargs)
        return model, tiny.logits(model, name)


@pytest.mark.parametrize("name", STACKS)
def test_a_dense_model_computes_the_same_bits_as_when_it_is_in_memory(name: str, tmp_path: Path) -> None:
    src = tiny.save(tiny.build(name), tmp_path / "src")
    model, logits = streamed(src, name)
    assert logits.equal(tiny.logits(load(src, dtype=torch.float32), name))
    assert len(empty_layers(model)) == STACKS[name]


@pytest.mark.parametrize(
    ("name", "target"),
    [("llama", "mixtral"), ("qwen2", "qwen2_moe"), ("qwen3", "qwen3_moe"), *((name, "moeify") for name in STACKS)],
)
def test_a_converted_model_does_too(name: str, target: str, tmp_path: Path) -> None:
    src = tiny.save(tiny.build(name), tmp_path / "src")
    tiny.convert_files(src, tmp_path / "moe", NOISE, target=target)
    model, logits = streamed(tmp_path / "moe", name, **EAGER)
    assert logits.equal(tiny.logits(load(tmp_path / "moe", dtype=torch.float32, **EAGER), name))
    assert len(empty_layers(model)) == STACKS.get(name, tiny.LAYERS)


def test_a_gguf_file_is_loaded_whole_by_transformers(tmp_path: Path) -> None:
    with open_source(write_gpt2(tmp_path / "m.gguf")) as source:
        changed: list[nn.Module] = []
        model, unused = load_streamed(source, changed.append)
    assert not empty_layers(model) and unused == () and changed == [model]


def test_what_is_done_to_the_weights_is_done_to_every_layer_when_it_is_loaded(tmp_path: Path) -> None:
    src = tiny.save(tiny.build("llama"), tmp_path / "src")

    @torch.no_grad()
    def double(module: nn.Module) -> None:
        for parameter in module.parameters():
            parameter.copy_(2 * parameter)

    with open_source(src) as source:
        model, _ = load_streamed(source, double)
        logits = tiny.logits(model, "llama")
        assert tiny.logits(model, "llama").equal(logits), "a second run loads the layers again"
    whole = load(src, dtype=torch.float32)
    double(whole)
    assert logits.equal(tiny.logits(whole, "llama"))


def test_a_layer_that_shares_a_weight_stays_in_memory() -> None:
    model: Any = tiny.build("llama")
    assert _layers(model) == ("model.layers.0", "model.layers.1", "model.layers.2")
    model.model.layers[1].input_layernorm.weight = model.model.norm.weight
    assert _layers(model) == ("model.layers.0", "model.layers.2")


def test_layers_are_loaded_at_once_where_that_is_asked_for(tmp_path: Path) -> None:
    with open_source(tiny.save(tiny.build("llama"), tmp_path / "src")) as source:
        model, _ = load_streamed(source, leave, whole=True)
    assert not empty_layers(model)


def test_what_does_not_run_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    src = tiny.save(tiny.build("llama"), tmp_path / "src")
    idle: set[str] = set()
    read: list[str] = []

    def spy(model: Any, tensors: Any, path: Path) -> None:
        read.extend(tensors)
        load_tensors(model, tensors, path)

    monkeypatch.setattr(streaming, "load_tensors", spy)
    with open_source(src) as source:
        model: Any = load_streamed(source, leave, without=idle)[0]
        tiny.logits(model, "llama")
        everything = {*read}
        read.clear()
        idle.add("model.layers.1.mlp")
        model.model.layers[1].mlp.forward = lambda x: x
        tiny.logits(model, "llama")
    assert everything - {*read} == {f"model.layers.1.mlp.{name}_proj.weight" for name in ("gate", "up", "down")}
