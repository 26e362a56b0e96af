from __future__ import annotations

import math

import pytest
import torch

from moeify.config import MoEConfig
from moeify.errors import ConfigError
from moeify.routers.expert_choice import ExpertChoice, expert_choice
from moeify.routing.capacity import exact_factor
from moeify.routing.record import RoutingContext
from tests.moeify.routers.by_hand import close
from tests.moeify.routing.draw import randn


@pytest.mark.parametrize("capacity", [0, 1, 4, 13, 40])
def test_each_expert_takes_its_best_tokens(capacity: int) -> None:
    logits = randn(13, 5)
    routing = expert_choice(logits, capacity)
    p = logits.double().softmax(-1)
    for e in range(5):
        takers = sorted(range(13), key=p[:, e].tolist().__getitem__, reverse=True)[:capacity]
        for t in range(13):
            assert int(routing.expert_ids_TK[t, e]) == (e if t in takers else 5)
            assert float(routing.weights_TK[t, e]) == pytest.approx(float(p[t, e]) if t in takers else 0.0, rel=1e-5)
    close(routing.scores_TE, p)


def test_no_expert_takes_padding() -> None:
    logits, real = randn(13, 5), torch.arange(13) % 3 != 1
    logits[~real] = math.nan
    logits[1] = 50.0
    routing = expert_choice(logits, 6, mask_T=real)
    without = expert_choice(logits[real], 6)
    assert torch.equal(routing.expert_ids_TK[real], without.expert_ids_TK)
    assert torch.equal(routing.weights_TK[real], without.weights_TK)
    assert (routing.expert_ids_TK[~real] == 5).all()
    assert (routing.weights_TK[~real] == 0).all()


def test_fewer_real_tokens_than_capacity() -> None:
    routing = expert_choice(randn(4, 3), 3, mask_T=torch.tensor([False, True, False, False]))
    assert routing.expert_ids_TK.tolist() == [[3, 3, 3], [0, 1, 2], [3, 3, 3], [3, 3, 3]]


@pytest.mark.parametrize("training", [True, False])
def test_the_module_takes_the_capacity_and_the_mask_of_the_context(training: bool) -> None:
    config = MoEConfig.expert_choice(5, 2)
    router, x, real = config.router.module(13, config).train(training), randn(20, 13), torch.arange(20) < 15
    with torch.no_grad():
        router.get_parameter("weight").copy_(randn(5, 13, seed=1))
        logits = x @ randn(5, 13, seed=1).T
        for factor, capacity in ((None, 8), (exact_factor(0.5), 4)):  # 20 tokens * 2 / 5 experts * factor
            found = router(x, RoutingContext(mask_T=real, capacity_factor=factor))
            assert torch.equal(found.weights_TK, expert_choice(logits, capacity, mask_T=real).weights_TK)


def test_facts_and_what_it_needs() -> None:
    assert (ExpertChoice.joint, ExpertChoice.keeps_capacity) == (True, True)
    assert not MoEConfig.expert_choice(8).exact
    with pytest.raises(ConfigError, match="capacity_factor is None: expert choice needs one"):
        MoEConfig(8, 2, router="expert_choice")


def test_weights_that_sum_to_one_are_asked_for() -> None:
    config = MoEConfig.expert_choice(5, 2, renormalize=True, capacity_factor=0.5)
    router, x = config.router.module(13, config).eval(), randn(20, 13)
    with torch.no_grad():
        router.get_parameter("weight").copy_(randn(5, 13, seed=1))
        found, plain = router(x), expert_choice(x @ randn(5, 13, seed=1).T, 4)
    taken = (plain.expert_ids_TK < 5).any(-1)
    assert 0 < taken.sum() < 20
    close(found.weights_TK.sum(-1), taken.double())
    for t in range(20):
        total = plain.weights_TK[t].double().sum().clamp(min=1e-20)
        close(found.weights_TK[t], plain.weights_TK[t].double() / total)
