from __future__ import annotations

import math

import pytest
import torch

from moeify.config import MoEConfig
from moeify.errors import ConfigError
from moeify.routers.gshard import gshard
from moeify.routers.softmax import softmax_topk
from tests.moeify.routers.by_hand import close
from tests.moeify.routing.draw import randn


@pytest.mark.parametrize("second", [0.05, 0.3, 0.45])
def test_gshard_keeps_the_second_expert_with_twice_its_probability(second: float) -> None:
    logits = torch.tensor([-9.0, math.log(second), -9.0, math.log(1 - second), -9.0]).repeat(20_000, 1)
    torch.manual_seed(1)
    routing = gshard(logits)
    assert (routing.expert_ids_TK[:, 0] == 3).all()
    dropped = routing.expert_ids_TK[:, 1] == 5
    assert (routing.expert_ids_TK[~dropped, 1] == 1).all()
    assert abs(float((~dropped).double().mean()) - min(1, 2 * second)) < 0.015
    close(routing.weights_TK[~dropped], torch.tensor([1 - second, second]).expand(int((~dropped).sum()), 2))
    # The first expert's weight stays what it was, and does not become 1.
    close(routing.weights_TK[dropped], torch.tensor([1 - second, 0.0]).expand(int(dropped.sum()), 2))


def test_gshard_always_keeps_an_equal_second_expert() -> None:
    torch.manual_seed(0)
    assert (gshard(torch.zeros(1000, 3)).expert_ids_TK < 3).all()


def test_evaluation_is_top_2_and_training_draws() -> None:
    config = MoEConfig.gshard(5)
    router, x = config.router.module(13, config), randn(50, 13)
    with torch.no_grad():
        router.get_parameter("weight").copy_(randn(5, 13, seed=1))
        plain = softmax_topk(x @ randn(5, 13, seed=1).T, 2)
        assert torch.equal(router.eval()(x).expert_ids_TK, plain.expert_ids_TK)
        torch.manual_seed(0)
        assert router.train()(x).expert_ids_TK.eq(5).any()


def test_another_number_of_experts_per_token_is_refused() -> None:
    with pytest.raises(ConfigError, match="top_k is 3: the router 'gshard' takes 2"):
        MoEConfig(8, 3, router="gshard")


def test_the_threshold_of_st_moe_keeps_more_second_experts() -> None:
    logits = torch.tensor([-9.0, math.log(0.1), math.log(0.9)]).repeat(20_000, 1)
    torch.manual_seed(1)
    kept = gshard(logits, threshold=0.2).expert_ids_TK[:, 1] == 1
    assert abs(float(kept.double().mean()) - 0.5) < 0.015
    config = MoEConfig.st_moe(3)
    router = config.router.module(3, config).train()
    with torch.no_grad():
        router.get_parameter("weight").copy_(torch.eye(3))
        kept = router(logits).expert_ids_TK[:, 1] == 1
    assert abs(float(kept.double().mean()) - 0.5) < 0.015
