"""Layers with zero weights stand where the FFNs stood, and nothing else has changed."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import moeify
from moeify.config import MoEConfig
from moeify.conversion.dense import Dense
from moeify.conversion.restructure import read, restructure
from moeify.layers import SparseMoE
from moeify.measure import TOLERANCE
from moeify.planning.make_plan import make_plan
from tests.moeify import tiny

CONFIG = MoEConfig(experts=3, top_k=2)


def restructured(model: nn.Module, layers: str = "all") -> nn.Module:
    dense = Dense(model)
    plan = make_plan(model, dense.graph_module, dense.inspection, CONFIG, layers)
    return restructure(model, plan, dense.regions)


def test_new_layers_hold_zeros_and_the_rest_is_as_it_was() -> None:
    model = tiny.build("bert")
    before = OrderedDict(model.named_parameters())
    assert restructured(model) is model
    after = dict(model.named_parameters())
    assert all(after[name] is before[name] for name in after.keys() & before.keys())
    new = {name: value for name, value in after.items() if name not in before}
    assert len(new) == 5 * tiny.LAYERS and all(value.eq(0).all() for value in new.values())
    gone = before.keys() - after.keys()
    assert len(gone) == 4 * tiny.LAYERS and all(".intermediate." in n or ".output.dense." in n for n in gone)
    assert isinstance(model.get_submodule("bert.encoder.layer.1.intermediate"), nn.Identity)


def test_layers_keep_device_dtype_and_mode() -> None:
    model = tiny.build("llama").to("meta", torch.bfloat16)
    model.get_submodule("model.layers.0").train()
    restructured(model, "0,1")
    first, second = (model.get_submodule(f"model.layers.{i}.mlp") for i in (0, 1))
    assert isinstance(first, SparseMoE) and first.training and not second.training
    assert {(p.device.type, p.dtype) for p in first.experts.parameters()} == {("meta", torch.bfloat16)}
    assert {(p.device.type, p.dtype) for p in first.router.parameters()} == {("meta", torch.float32)}
    assert not isinstance(model.get_submodule("model.layers.2.mlp"), SparseMoE)


def test_parameters_and_buffers_are_read_by_their_names() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    assert read(model, "0.weight") is model[0].weight
    assert read(model, "1.running_mean") is model[1].running_mean


# FFNs that their block computes itself: with a dropout that is used twice, with factors beside a gate, as convolutions.
IN_BLOCKS: dict[str, Any] = {
    "xlnet": lambda: tiny.tf.XLNetModel(
        tiny.tf.XLNetConfig(vocab_size=50, d_model=24, n_layer=2, n_head=2, d_inner=37)
    ),
    "falcon_h1": lambda: tiny.tf.FalconH1Model(
        tiny.tf.FalconH1Config(vocab_size=50, hidden_size=24, intermediate_size=37, num_hidden_layers=2,
                               num_attention_heads=2, num_key_value_heads=2, mamba_d_ssm=32, mamba_n_heads=4,
                               mamba_d_head=8, mamba_d_state=8, mamba_chunk_size=4, mlp_multipliers=[0.7, 1.3])
    ),
    "poolformer": lambda: tiny.tf.PoolFormerModel(
        tiny.tf.PoolFormerConfig(depths=[1, 1], hidden_sizes=[12, 24], patch_sizes=[7, 3], strides=[4, 2],
                                 padding=[2, 1], num_encoder_blocks=2, layer_scale_init_value=0.5)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", IN_BLOCKS)
@torch.no_grad()
def test_ffns_in_blocks_are_converted_alike_everywhere(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    dense = IN_BLOCKS[name]().eval()
    ids = torch.arange(18).reshape(2, 9)
    inputs: dict[str, Any] = {"input_ids": ids, **({"use_cache": False} if name == "falcon_h1" else {})}
    if name == "poolformer":
        inputs = {"pixel_values": torch.randn(2, 3, 33, 41)}
    expected = dense(**inputs).last_hidden_state
    tiny.save(dense, tmp_path / "dense")
    graph = moeify.convert_graph(torch.export.export(dense, (), {**inputs}, strict=False), CONFIG)
    moe = moeify.convert(dense, CONFIG)
    tiny.convert_files(tmp_path / "dense", tmp_path / "streamed", CONFIG)
    tiny.save(moe, tmp_path / "stored")
    state = moe.state_dict()
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills memory that nobody sets with NaN
    try:
        loaded = moeify.load(tmp_path / "streamed"), moeify.load(tmp_path / "stored")
    finally:
        torch.use_deterministic_algorithms(False)
    for model in (*loaded, moe):
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
        assert model.state_dict().keys() == state.keys()
        assert tiny.relative(model(**inputs).last_hidden_state, expected) < TOLERANCE["float32"]
    new = {key for key in state if ".experts." in key or ".router." in key}
    assert new and all(torch.equal(graph.state_dict()[key], state[key]) for key in new)
