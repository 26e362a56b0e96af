from __future__ import annotations

import pytest
import torch

from moeify.config import MoEConfig
from moeify.errors import MoeifyError
from moeify.training.layers_of import layers_of
from tests.moeify.layers import make


def test_layers_are_found_by_their_paths_in_the_order_of_the_model() -> None:
    first, second = make.layer(MoEConfig(5, 2)), make.layer(make.CONFIGS["soft"])
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), second, torch.nn.ModuleDict({"mlp": first}))
    assert list(layers_of(model).items()) == [("1", second), ("2.mlp", first)]
    assert list(layers_of(first)) == [""]


def test_a_dense_model_is_named() -> None:
    with pytest.raises(MoeifyError, match="Linear has no MoE layer of moeify: convert it first"):
        layers_of(torch.nn.Linear(2, 2))
