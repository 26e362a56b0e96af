from __future__ import annotations

from typing import Any

import torch

from moeify.config import MoEConfig
from moeify.training.recipes import INSTRUCTION_FIRST, FineTuning
from tests.moeify.layers import make


def test_recipes_set_what_belongs_to_the_model() -> None:
    model: Any = torch.nn.ModuleDict({"mlp": make.layer(MoEConfig(5, 2)), "head": torch.nn.Linear(2, 2)})
    FineTuning.st_moe().prepare(model)
    assert model["mlp"].experts.dropout == 0 and all(p.requires_grad for p in model.parameters())
    FineTuning.switch().prepare(model)
    assert model["mlp"].experts.dropout == 0.4
    FineTuning.frozen_experts().prepare(model)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {"head.weight", "head.bias"}


def test_the_order_of_stages() -> None:
    assert [stage.tasks for stage in INSTRUCTION_FIRST] == ["many", "one"]
