from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from moeify import routers
from moeify.config import MoEConfig
from moeify.layers import SoftMoE, SparseMoE
from moeify.layers.build import build_layer, layer_in
from moeify.plan import Plan, Rows, Site

GLU = Site(
    "mlp",
    (),
    "glu",
    "silu",
    hidden=5,
    intermediate=6,
    ups=(
        Rows("gate.weight", "gate.bias", 0, 6, 1, 6, transposed=False),
        Rows("up.weight", "up.bias", 0, 6, 1, 6, transposed=False),
    ),
    down=Rows("down.weight", None, 0, 5, 1, 5, transposed=False),
    dropout=0.25,
    expert_dropout=0.5,
)
MLP = replace(GLU, kind="mlp", activation="gelu", ups=(Rows("up.weight", None, 0, 6, 1, 6, transposed=False),))


def shapes(layer: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in layer.named_parameters()}


def test_a_gated_ffn_with_biases_before_and_none_after() -> None:
    layer = build_layer(GLU, MoEConfig(4, 2, shared_experts=1), None, torch.zeros(1))
    stack = {"gate_up_proj": (12, 5), "gate_up_proj_bias": (12,), "down_proj": (5, 6)}
    assert shapes(layer) == {
        "router.weight": (4, 5),
        **{f"experts.{name}": (4, *shape) for name, shape in stack.items()},
        **{f"shared_expert.{name}": (1, *shape) for name, shape in stack.items()},
    }
    assert not any(parameter.any() for parameter in layer.parameters())


def test_shards_are_narrower_than_the_ffn() -> None:
    layer = build_layer(MLP, MoEConfig(6, 3, granularity=3), None, torch.zeros(1))
    assert shapes(layer) == {"router.weight": (6, 5), "experts.up_proj": (6, 2, 5), "experts.down_proj": (6, 5, 2)}


def test_it_lies_where_the_dense_weights_lie() -> None:
    like = torch.zeros(1, dtype=torch.bfloat16, device="meta")
    layer = build_layer(GLU, MoEConfig(4, 2), None, like)
    assert {(p.dtype, p.device.type) for p in layer.experts.parameters()} == {(torch.bfloat16, "meta")}
    assert {(p.dtype, p.device.type) for p in layer.router.parameters()} == {(torch.float32, "meta")}


@pytest.mark.parametrize(("config", "inside"), [(MoEConfig(4, 2), 0.5), (MoEConfig(4, 2, expert_dropout=0.1), 0.1)])
def test_dropout_is_the_ffn_s_unless_the_settings_say_otherwise(config: MoEConfig, inside: float) -> None:
    layer = build_layer(GLU, config, None, torch.zeros(1))
    experts: Any = layer.experts
    assert (layer.dropout, experts.dropout, layer.path) == (0.25, inside, "mlp")


def test_slots_need_a_layer_of_their_own() -> None:
    soft = build_layer(GLU, MoEConfig(4, 2, router=routers.Soft(slots=3)), None, torch.zeros(1))
    assert type(soft) is SoftMoE and type(build_layer(GLU, MoEConfig(4, 2), None, torch.zeros(1))) is SparseMoE


@pytest.mark.parametrize(("trained", "expected"), [((), False), (("down",), True), (("gate", "up", "down"), True)])
def test_experts_of_a_frozen_ffn_are_frozen_and_the_router_is_not(trained: tuple[str, ...], expected: bool) -> None:
    root = nn.ModuleDict({"gate": nn.Linear(5, 6), "up": nn.Linear(5, 6), "down": nn.Linear(6, 5, bias=False)})
    root.requires_grad_(False)
    for name in trained:
        root[name].requires_grad_(True)
    layer = layer_in(root, GLU, Plan("", MoEConfig(4, 2, shared_experts=2), (GLU,)), None)
    experts = [*layer.get_submodule("experts").parameters(), *layer.get_submodule("shared_expert").parameters()]
    assert {parameter.requires_grad for parameter in experts} == {expected}
    assert layer.get_parameter("router.weight").requires_grad
