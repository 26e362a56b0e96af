from __future__ import annotations

from typing import Any

import pytest
import torch

import moeify
from moeify.config import MoEConfig
from moeify.contract.found import find_layers
from moeify.errors import MoeifyError
from moeify.training.layers_of import layers_of, own_layers, ran_layers
from tests.moeify import native
from tests.moeify.layers import make


def test_layers_are_found_by_their_paths_in_the_order_of_the_model() -> None:
    first, second = make.layer(MoEConfig(5, 2)), make.layer(make.CONFIGS["soft"])
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), second, torch.nn.ModuleDict({"mlp": first}))
    assert list(own_layers(model).items()) == [("1", second), ("2.mlp", first)]
    assert list(layers_of(model)) == ["1", "2.mlp"] and list(layers_of(first)) == [""]


def test_layers_of_transformers_are_not_moeifys_own() -> None:
    model = native.build("mixtral")
    assert len(layers_of(model)) == 3 and own_layers(model) == {}


def test_a_dense_model_is_named() -> None:
    for ask in (layers_of, own_layers, moeify.track_routing):
        with pytest.raises(MoeifyError, match="Linear has no MoE layer: convert it first"):
            ask(torch.nn.Linear(2, 2))


def test_only_layers_that_ran_are_asked() -> None:
    first, second = make.layer(MoEConfig(5, 2)), make.layer(MoEConfig(5, 2))
    model = torch.nn.Sequential(first, second)
    with pytest.raises(MoeifyError, match="no MoE layer has run yet: call the model before a test"):
        ran_layers(model, "a test")
    second(make.inputs(3, 7))
    assert list(ran_layers(model, "a test")) == ["1"]


def test_soft_layers_have_nothing_to_tell() -> None:
    model: Any = torch.nn.Sequential(make.layer(make.CONFIGS["soft"]))
    model(make.inputs(3, 7))
    with pytest.raises(MoeifyError, match=r"the tokens of 0 choose no experts \(soft routing\): leave out a test"):
        ran_layers(model, "a test")
    assert moeify.aux_loss(model) == 0


def test_tracking_ends_with_its_handle() -> None:
    model = native.build("mixtral")
    moeify.track_routing(model).remove()
    assert all(layer.state is None for layer in find_layers(model).values())
