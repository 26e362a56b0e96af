"""Micro-batches of transformers' own MoE models, against the batch that they are parts of."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
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
    tf: Any = transformers
    small = {**mixtral().config.to_dict(), "num_hidden_layers": 1}
    head = tf.MixtralForSequenceClassification(MixtralConfig(**small))  # its base has routers, its code no such loss
    assert not any(map(adds_loss, (nn.Linear(1, 1), tiny.build("llama"), head))) and adds_loss(mixtral())
    assert not StockLoss.on(mixtral().model) and not StockLoss.on(head)


def test_a_coefficient_that_is_read_from_the_config_of_the_text() -> None:
    tf: Any = transformers
    sizes = {"hidden_size": 24, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 12}
    text = {**sizes, "num_hidden_layers": 1, "num_experts": 4, "moe_intermediate_size": 8, "vocab_size": 50,
            "mlp_only_layers": [], "rope_parameters": {"rope_type": "default", "mrope_section": [2, 2, 2]}}  # fmt: skip
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 8, "num_heads": 2, "out_hidden_size": 24}
    config = tf.Qwen3VLMoeConfig(text_config=text, vision_config=vision, image_token_id=49, vision_start_token_id=48)
    config.text_config.router_aux_loss_coef = 0.5
    model, ids = tf.Qwen3VLMoeForConditionalGeneration(config).train(), IDS[:2] % 40
    alone, whole = (model(input_ids=ids, labels=ids, output_router_logits=asked).loss for asked in (False, True))
    StockLoss.on(model)
    half = model(input_ids=ids, labels=ids, num_items_in_batch=torch.tensor(40))
    expected = alone * 20 / 40 + (whole - alone) / 2
    assert whole > alone and relative_difference(half.loss, expected) <= TOLERANCE["float32"]
    assert config.text_config.router_aux_loss_coef == 0.5
