"""Layers with zero weights stand where the FFNs stood, and nothing else has changed."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import nn

from moeify.config import MoEConfig
from moeify.conversion.dense import Dense
from moeify.conversion.restructure import read, restructure
from moeify.layers import SparseMoE
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
    assert {(p.device.type, p.dtype) for p in first.parameters()} == {("meta", torch.bfloat16)}
    assert not isinstance(model.get_submodule("model.layers.2.mlp"), SparseMoE)


def test_parameters_and_buffers_are_read_by_their_names() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    assert read(model, "0.weight") is model[0].weight
    assert read(model, "1.running_mean") is model[1].running_mean
