from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moeify.config import MoEConfig
from moeify.errors import ConfigError
from moeify.routers.sinkhorn import sinkhorn
from moeify.routers.softmax import softmax_topk
from moeify.routing.record import RoutingContext
from tests.moeify.routers.by_hand import close
from tests.moeify.routing.draw import randn


def balanced_plan(logits: Tensor, iterations: int) -> Tensor:
    """The alternating scaling, multiplicative and in float64."""
    cost = logits.double().exp()
    tokens, experts = cost.shape
    column = torch.ones(experts, dtype=torch.float64)
    for _ in range(iterations):
        row = torch.stack([1 / (tokens * (cost[t] * column).sum()) for t in range(tokens)])
        column = torch.stack([1 / (experts * (cost[:, e] * row).sum()) for e in range(experts)])
    return cost * row[:, None] * column


@pytest.mark.parametrize("top_k", [1, 2])
def test_sinkhorn_selects_by_the_balanced_plan(top_k: int) -> None:
    logits = randn(61, 7) + 2 * randn(7, seed=1)
    routing = sinkhorn(logits, top_k)
    plan = balanced_plan(logits, 200)
    assert routing.expert_ids_TK.tolist() == plan.topk(top_k).indices.tolist()
    close(plan.sum(1), torch.full((61,), 1 / 61))  # what the reference promises
    gates = logits.double().sigmoid() if top_k == 1 else logits.double().softmax(-1)
    close(routing.weights_TK, gates.gather(1, routing.expert_ids_TK))


def test_sinkhorn_balances() -> None:
    logits = randn(2048, 8) + torch.linspace(-2, 2, 8)
    plain, balanced = (
        torch.bincount(sinkhorn(logits, 1, iterations=n).expert_ids_TK.flatten(), minlength=8).max() for n in (0, 16)
    )
    assert plain > 4 * 256
    assert balanced < 1.15 * 256


def test_sinkhorn_in_evaluation_is_top_k() -> None:
    logits = randn(9, 5)
    assert torch.equal(sinkhorn(logits, 2, iterations=0).expert_ids_TK, softmax_topk(logits, 2).expert_ids_TK)


def test_sinkhorn_survives_huge_logits() -> None:
    routing = sinkhorn(1e4 * randn(33, 5), 2)
    assert routing.weights_TK.isfinite().all()
    assert (routing.expert_ids_TK[:, 0] != routing.expert_ids_TK[:, 1]).all()


def test_sinkhorn_ignores_padding() -> None:
    logits, real = randn(40, 5), torch.arange(40) % 4 != 1
    logits[~real] += 30 * torch.eye(5)[0]
    routing = sinkhorn(logits, 1, mask_T=real)
    assert torch.equal(routing.expert_ids_TK[real], sinkhorn(logits[real], 1).expert_ids_TK)
    nothing = sinkhorn(logits, 1, mask_T=torch.zeros(40, dtype=torch.bool))
    assert nothing.weights_TK.isfinite().all()


def test_sinkhorn_names_a_wrong_top_k() -> None:
    with pytest.raises(ConfigError, match="top_k is 4"):
        sinkhorn(torch.zeros(2, 3), 4)


def test_the_module_balances_in_training_and_is_top_k_in_evaluation() -> None:
    config = MoEConfig(5, 2, router="sinkhorn", aux_loss=0.0)
    router, x, real = config.router.module(13, config), randn(60, 13), torch.arange(60) < 50
    weight = randn(5, 13, seed=1) + 2 * randn(5, 1, seed=2)
    with torch.no_grad():
        router.get_parameter("weight").copy_(weight)
        logits, context = x @ weight.T, RoutingContext(mask_T=real)
        plain, plan = softmax_topk(logits, 2), sinkhorn(logits, 2, mask_T=real)
        assert not torch.equal(plan.expert_ids_TK, plain.expert_ids_TK)
        assert torch.equal(router.train()(x, context).expert_ids_TK, plan.expert_ids_TK)
        assert torch.equal(router.eval()(x, context).expert_ids_TK, plain.expert_ids_TK)
        # In evaluation a token's experts do not depend on the other tokens.
        assert torch.equal(router.eval()(x[:1]).expert_ids_TK, plain.expert_ids_TK[:1])


def test_training_takes_sixteen_rounds_as_documented() -> None:
    config = MoEConfig(5, 2, router="sinkhorn", aux_loss=0.0)
    router, x, weight = config.router.module(13, config).train(), randn(60, 13), 5 * randn(5, 13, seed=1)
    router.get_parameter("weight").detach().copy_(weight)
    fewer, asked, more = (balanced_plan(x @ weight.T, rounds).topk(2).indices.tolist() for rounds in (15, 16, 17))
    assert router(x).expert_ids_TK.tolist() == asked
    assert fewer != asked != more, "any number of rounds would pass"


def test_it_is_not_exact() -> None:
    assert not MoEConfig(5, 2, router="sinkhorn").exact


def test_weights_that_sum_to_one_are_asked_for() -> None:
    config = MoEConfig(5, 2, router="sinkhorn", renormalize=True)
    router, x = config.router.module(13, config).eval(), randn(60, 13)
    with torch.no_grad():
        router.get_parameter("weight").copy_(randn(5, 13, seed=1))
        found, plain = router(x), softmax_topk(x @ randn(5, 13, seed=1).T, 2)
    close(found.weights_TK, plain.weights_TK)
    assert config.exact
