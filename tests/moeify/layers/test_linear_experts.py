"""The module that holds experts as linears, without a model around."""

from __future__ import annotations

import io

import pytest
import torch
from torch import Tensor, nn

from moeify.errors import RefusedError
from moeify.layers import Experts
from moeify.layers.linear_experts import DOWN, GATE, UP, LinearExperts, projections
from tests.moeify.layers.test_implementations import FORMS, experts

OWN = {GATE: GATE, UP: UP, DOWN: DOWN}
IDS, WEIGHTS = torch.tensor([[0, 4], [2, 5], [-1, 2], [0, 2]]), torch.rand(4, 2)


def reference(made: Experts, x: Tensor) -> Tensor:
    """Expert after expert and choice after choice."""
    out = torch.zeros_like(x)
    for token, (ids, weights) in enumerate(zip(IDS.tolist(), WEIGHTS, strict=True)):
        for expert, weight in zip(ids, weights, strict=True):
            if 0 <= expert < made.num_experts:
                up = made.up[expert] @ x[token] + (0 if made.up_bias is None else made.up_bias[expert])
                y = made.down_proj[expert] @ made._apply_gate(up[None])[0]
                out[token] += weight * (y + (0 if made.down_proj_bias is None else made.down_proj_bias[expert]))
    return out


@pytest.mark.parametrize("form", FORMS)
def test_it_computes_what_every_expert_computes(form: str) -> None:
    made, x = experts(form), torch.randn(4, 12)
    with torch.no_grad():
        expected = reference(made, x)
        names = set(made.state_dict())
        linear = LinearExperts(made, OWN)
        torch.testing.assert_close(linear(x, IDS, WEIGHTS), expected)
    assert not any(name.endswith("_proj") for name, _ in linear.named_parameters())
    assert linear.restack() is made and set(made.state_dict()) == names
    torch.testing.assert_close(reference(made, x), expected)


def test_an_activation_with_weights_keeps_its_name_and_is_there_once() -> None:
    made = experts("custom")
    names = set(made.state_dict())
    linear = LinearExperts(made, OWN)
    assert {name for name in names if "region" in name} <= set(linear.state_dict())
    assert linear.region is made.region


def test_dropout_inside_the_experts_follows_the_mode() -> None:
    made = experts("glu")
    made.dropout = 0.5
    linear, x = LinearExperts(made, OWN), torch.randn(4, 12)
    assert torch.equal(linear.eval()(x, IDS, WEIGHTS), linear(x, IDS, WEIGHTS))
    assert not torch.equal(linear.train()(x, IDS, WEIGHTS), linear(x, IDS, WEIGHTS))


def test_in_training_every_weight_has_a_gradient() -> None:
    linear = LinearExperts(experts("glu with biases"), OWN)
    linear(torch.randn(4, 12), IDS, WEIGHTS).sum().backward()
    assert all(parameter.grad is not None for parameter in linear.parameters())


def test_it_can_be_pickled() -> None:
    linear, file, x = LinearExperts(experts("mlp"), OWN), io.BytesIO(), torch.randn(4, 12)
    torch.save(linear, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert torch.equal(again(x, IDS, WEIGHTS), linear(x, IDS, WEIGHTS))


def test_a_replaced_projection_runs_and_cannot_be_stacked() -> None:
    linear = LinearExperts(experts("glu"), OWN)
    linear.get_submodule("3")._modules.pop(GATE)  # the order of the children is nobody's business
    linear.get_submodule("3").add_module(GATE, nn.Sequential(nn.Linear(12, 20)))
    assert linear(torch.randn(4, 12), IDS, WEIGHTS).isfinite().all()
    with pytest.raises(RefusedError, match=r"mlp.experts.3.gate_proj is a Sequential and no nn.Linear any more"):
        linear.check("mlp.experts")


def test_gate_and_up_rows_that_alternate_are_told_apart() -> None:
    made = experts("glu with biases")
    made.is_concatenated, made.is_transposed = False, True
    up = torch.arange(2 * 3 * 4.0).view(2, 3, 4)
    views = projections(made, {"gate_up_proj": up, "gate_up_proj_bias": up[:, 0]})
    gate, up_bias = views[GATE][0], views[UP][1]
    assert gate is not None and up_bias is not None and DOWN not in views
    assert torch.equal(gate, up.transpose(1, 2)[:, ::2]) and torch.equal(up_bias, up[:, 0, 1::2])
