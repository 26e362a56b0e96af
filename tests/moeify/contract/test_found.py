"""MoE layers of every kind give one description."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import moeify
from moeify.config import MoEConfig
from moeify.contract.found import find_layers
from tests.moeify import native, tiny

# Paths, intermediate size, and that of shared experts.
EXPECTED: dict[str, tuple[tuple[str, ...], int, int]] = {
    "mixtral": (tuple(f"model.layers.{i}.mlp" for i in range(3)), 57, 0),
    "qwen2_moe": (tuple(f"model.layers.{i}.mlp" for i in range(3)), 23, 31),
    "qwen3_moe": (("model.layers.0.mlp", "model.layers.2.mlp"), 23, 0),
    "olmoe": (tuple(f"model.layers.{i}.mlp" for i in range(3)), 57, 0),
    "deepseek_v2": (("model.layers.1.mlp", "model.layers.2.mlp"), 23, 23),
    "deepseek_v3": (("model.layers.1.mlp", "model.layers.2.mlp"), 23, 23),
    "gpt_oss": (tuple(f"model.layers.{i}.mlp" for i in range(3)), 57, 0),
    "llama4": (tuple(f"model.layers.{i}.feed_forward" for i in range(3)), 57, 57),
    "granitemoe": (tuple(f"model.layers.{i}.block_sparse_moe" for i in range(3)), 57, 0),
    "granitemoeshared": (tuple(f"model.layers.{i}.block_sparse_moe" for i in range(3)), 57, 31),
    "ernie4_5_moe": (("model.layers.1.mlp", "model.layers.2.mlp"), 23, 46),
    "glm4_moe": (("model.layers.1.mlp", "model.layers.2.mlp"), 23, 23),
    "phimoe": (tuple(f"model.layers.{i}.mlp" for i in range(3)), 57, 0),
    "jamba": (("model.layers.1.feed_forward",), 57, 0),
    "dbrx": (tuple(f"transformer.blocks.{i}.ffn" for i in range(2)), 57, 0),
    "switch": (("encoder.block.1.layer.1.mlp", "encoder.block.3.layer.1.mlp", "decoder.block.1.layer.2.mlp"), 57, 0),
    "nllb": (("model.encoder.layers.1.ffn", "model.decoder.layers.1.ffn"), 57, 0),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_layers_of_transformers(name: str) -> None:
    paths, intermediate, shared = EXPECTED[name]
    with torch.device("meta"):  # an inspection has no values
        model = native.MODELS[name]()
    layers = find_layers(model)
    assert tuple(layers) == paths == tuple(layer.path for layer in layers.values())
    for layer in layers.values():
        told = (layer.num_experts, layer.top_k, layer.hidden, layer.intermediate, layer.shared_intermediate)
        assert told == (native.EXPERTS, 1 if name == "switch" else native.TOP_K, 36, intermediate, shared)
        assert layer.state is None and layer.record is None and layer.losses() == {}
        assert layer.kind == type(layer.router).__name__


def test_attention_of_experts_is_a_layer_too() -> None:
    layers = find_layers(native.build("jetmoe"))
    assert {"model.layers.0.self_attention.experts", "model.layers.0.mlp"} < set(layers) and len(layers) == 6
    assert layers["model.layers.0.mlp"].intermediate == 57 and len(layers["model.layers.0.mlp"].experts) == 2


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "llama4", "granitemoeshared", "jetmoe", "switch"])
def test_parts_hold_every_parameter_of_a_layer_once(name: str) -> None:
    model = native.build(name)
    names = {id(p): path for path, p in model.named_parameters()}
    for layer in find_layers(model).values():
        parts = {part: {names[id(p)] for p in layer.part(part)} for part in ("routers", "experts")}
        assert not parts["routers"] & parts["experts"]
        inside = {path for path in names.values() if path.startswith(f"{layer.path}.")}
        beside = {path for path in names.values() if "shared_mlp" in path and path[:14] == layer.path[:14]}
        rest = inside | beside - {f"{layer.path}.bias"}
        assert parts["routers"] | parts["experts"] == rest - {f"{layer.path}.bias"}
        assert all("router" in path or ".gate." in path for path in parts["routers"])


def test_layers_of_moeify() -> None:
    config = MoEConfig(6, 3, granularity=3, shared_experts=2)
    model = moeify.convert(tiny.build("llama"), config, layers="0,2")
    layers = find_layers(model)
    assert list(layers) == ["model.layers.0.mlp", "model.layers.2.mlp"]
    layer = layers["model.layers.0.mlp"]
    assert (layer.num_experts, layer.top_k, layer.hidden, layer.intermediate) == (6, 3, 36, 19)
    assert layer.shared_intermediate == 38 and layer.kind == "softmax" and layer.capacity_obstacle is None
    assert layer.state is model.get_submodule(layer.path)
    assert "Linear" not in repr(layer) and "Experts" not in repr(layer)
    assert find_layers(moeify.convert(tiny.build("bert"), MoEConfig(4, 1, router="soft")))


def test_a_dense_model_has_none() -> None:
    assert find_layers(tiny.build("llama")) == {} == find_layers(nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("name", "obstacle"),
    [
        ("mixtral", None),
        ("gpt_oss", None),
        ("dbrx", None),
        ("llama4", "feed_forward: Llama4TextExperts is not told who chose what"),
        ("switch", "its router keeps a capacity of its own"),
    ],
)
def test_whether_a_capacity_can_be_set(name: str, obstacle: str | None) -> None:
    told: Any = next(iter(find_layers(native.build(name)).values())).to_dict()
    assert told["capacity_obstacle"] is None if obstacle is None else obstacle in told["capacity_obstacle"]
    assert told["experts"] == native.EXPERTS and told["count_params"] > 0
