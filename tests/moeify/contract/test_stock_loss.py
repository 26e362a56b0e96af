"""Micro-batches of transformers' own MoE models, against the batch that they are parts of."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

from moeify.contract.stock_loss import StockLoss, adds_loss
from moeify.measure import TOLERANCE, relative_difference
from tests.moeify import tiny

IDS = torch.arange(44).reshape(4, 11) % tiny.VOCABULARY


def mixtral() -> Any:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=tiny.VOCABULARY, hidden_size=24, intermediate_size=20, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=5, router_aux_loss_coef=0.5,
    )  # fmt: skip
    return MixtralForCausalLM(config).train()


def gradient(model: Any, ids: torch.Tensor, **given: Any) -> torch.Tensor:
    model.zero_grad()
    model(input_ids=ids, labels=ids, **given).loss.backward()
    found: torch.Tensor = model.model.layers[0].mlp.gate.weight.grad
    return found


def test_it_is_asked_for_and_counts_by_its_share_of_the_tokens() -> None:
    model = mixtral()
    alone = gradient(model, IDS)
    expected = [gradient(model, rows, output_router_logits=True) for rows in (IDS[:1], IDS[1:])]
    (hooks,) = StockLoss.on(nn.Sequential(model))
    assert not torch.equal(gradient(model, IDS), alone)
    items = torch.tensor(40)
    found = [gradient(model, rows, num_items_in_batch=items) for rows in (IDS[:1], IDS[1:])]
    for part, whole, share in zip(found, expected, (0.25, 0.75), strict=True):
        assert relative_difference(part, share * whole) <= TOLERANCE["float32"]
    assert model.router_aux_loss_coef == 0.5
    assert torch.equal(gradient(model, IDS, output_router_logits=False), alone)
    hooks.remove()
    assert torch.equal(gradient(model, IDS), alone)


def test_evaluation_and_failures_leave_it_as_it_was() -> None:
    model = mixtral()
    StockLoss.on(model)
    expected = mixtral().eval()(input_ids=IDS, labels=IDS)
    found = model.eval()(input_ids=IDS, labels=IDS)
    assert found.loss.equal(expected.loss) and found.router_logits is None
    with pytest.raises(ValueError, match="batch_size"):
        model.train()(input_ids=IDS, labels=IDS[:, :3], num_items_in_batch=torch.tensor(40))
    assert model.router_aux_loss_coef == 0.5


def test_models_that_add_no_loss_are_passed_by() -> None:
    assert not adds_loss(nn.Linear(1, 1)) and not adds_loss(tiny.build("llama")) and not StockLoss.on(mixtral().model)
