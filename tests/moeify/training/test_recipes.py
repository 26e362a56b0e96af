from __future__ import annotations

from typing import Any

import torch

import moeify
from moeify.config import MoEConfig
from moeify.training.recipes import INSTRUCTION_FIRST, FineTuning
from tests.moeify import tiny
from tests.moeify.layers import make


def test_recipes_set_what_belongs_to_the_model() -> None:
    model: Any = torch.nn.ModuleDict({"mlp": make.layer(MoEConfig(5, 2)), "head": torch.nn.Linear(2, 2)})
    FineTuning.st_moe().prepare(model)
    assert model["mlp"].experts.dropout == 0 and all(p.requires_grad for p in model.parameters())
    FineTuning.switch().prepare(model)
    assert model["mlp"].experts.dropout == 0.4
    FineTuning.frozen_experts().prepare(model)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {"head.weight", "head.bias"}


def test_the_stages_can_follow_each_other_on_one_model() -> None:
    model: Any = moeify.convert(tiny.build("llama"), MoEConfig(5, 2, shared_experts=1))
    mlp, dropouts = model.model.layers[1].mlp, []
    for stage in INSTRUCTION_FIRST:
        stage.how.prepare(model)
        dropouts.append((stage.tasks, mlp.experts.dropout, mlp.shared_expert.dropout))
        assert all(p.requires_grad for p in model.parameters())
    assert dropouts == [("many", 0, 0), ("one", 0.4, 0.4)]
