from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch

import moeify
from moeify.config import MoEConfig
from moeify.errors import MoeifyError
from tests.moeify.layers import make


def ran(config: MoEConfig, mask: torch.Tensor | None = None) -> Any:
    model = torch.nn.ModuleDict({"mlp": make.layer(config)})
    make.tell(model["mlp"], mask=mask)
    model["mlp"](make.inputs(3, 7))
    return model


def test_load_entropy_and_drops_of_a_known_routing() -> None:
    model = ran(MoEConfig(5, 2, z_loss=0.1, capacity_factor=0.5))
    stats = moeify.routing_stats(model)["mlp"]
    record = model["mlp"].record
    counts = torch.bincount(record.routing.expert_ids_TK.flatten(), minlength=5)
    assert stats.tokens == 21
    assert stats.load == pytest.approx((counts / 42).tolist())
    assert stats.dropped == (counts - 5).clamp(min=0).sum()
    scores = record.routing.scores_TE.detach()
    entropy = -(scores * scores.log()).sum(-1).mean()
    assert stats.entropy == pytest.approx(float(entropy), rel=1e-5)
    assert stats.losses == {name: pytest.approx(loss.item()) for name, loss in model["mlp"].losses().items()}
    assert json.loads(json.dumps(stats.to_dict()))["tokens"] == 21


def test_padding_does_not_count() -> None:
    mask = torch.ones(3, 7)
    mask[1:] = 0
    stats = moeify.routing_stats(ran(MoEConfig(5, 2), mask))["mlp"]
    first = make.layer(MoEConfig(5, 2))
    first(make.inputs(3, 7)[:1])
    alone = moeify.routing_stats(torch.nn.ModuleDict({"mlp": first}))["mlp"]
    assert stats.tokens == 7
    assert stats.load == pytest.approx(alone.load)
    assert stats.entropy == pytest.approx(alone.entropy)
    nobody = moeify.routing_stats(ran(MoEConfig(5, 2), torch.zeros(3, 7)))["mlp"]
    assert (nobody.tokens, nobody.entropy, sum(nobody.load)) == (0, 0, 0)


def test_a_router_that_knows_nothing_has_the_entropy_of_all_experts() -> None:
    model = ran(MoEConfig(5, 2))
    with torch.no_grad():
        model["mlp"].router.weight.zero_()
    model["mlp"](make.inputs(3, 7))
    assert moeify.routing_stats(model)["mlp"].entropy == pytest.approx(math.log(5))


def test_without_a_forward_pass_there_is_nothing_to_tell() -> None:
    with pytest.raises(MoeifyError, match="no MoE layer has run"):
        moeify.routing_stats(make.layer(MoEConfig(5, 2)))
