from __future__ import annotations

import math

import pytest
import torch

import moeify
from moeify.config import MoEConfig
from moeify.errors import ConfigError
from moeify.routers.sigmoid import Sigmoid, SigmoidRouter, sigmoid_grouped, updated_bias
from tests.moeify.routers.by_hand import best, close
from tests.moeify.routing.draw import randn


def deepseek_v3(row: list[float], bias: list[float], k: int, groups: int, kept: int) -> tuple[list[int], list[float]]:
    scores = [1 / (1 + math.exp(-value)) for value in row]
    biased = [score + shift for score, shift in zip(scores, bias, strict=True)]
    size = len(row) // groups
    members = [range(g * size, (g + 1) * size) for g in range(groups)]
    strength = [sum(sorted((biased[e] for e in group), reverse=True)[:2]) for group in members]
    allowed = [e for g in best(strength, kept) for e in members[g]]
    ids = sorted(allowed, key=lambda e: -biased[e])[:k]
    return ids, [scores[e] / sum(scores[i] for i in ids) for e in ids]


@pytest.mark.parametrize(
    ("experts", "groups", "kept", "top_k"), [(6, 1, 1, 2), (24, 8, 4, 8), (15, 3, 2, 1), (5, 5, 3, 3)]
)
def test_sigmoid_grouped(experts: int, groups: int, kept: int, top_k: int) -> None:
    logits, bias = randn(23, experts), 0.3 * randn(experts, seed=1)
    routing = sigmoid_grouped(logits, top_k, bias_E=bias, n_group=groups, topk_group=kept, scale=2.5)
    for t, row in enumerate(logits.tolist()):
        ids, weights = deepseek_v3(row, bias.tolist(), top_k, groups, kept)
        assert routing.expert_ids_TK[t].tolist() == ids
        close(routing.weights_TK[t], [2.5 * weight for weight in weights])
    close(routing.scores_TE.sum(-1), torch.ones(23))


def test_sigmoid_grouped_weights_without_renormalization_are_the_sigmoids() -> None:
    routing = sigmoid_grouped(torch.tensor([[0.0, 2.0, -1.0]]), 2, renormalize=False)
    close(routing.weights_TK, [[1 / (1 + math.exp(-2)), 0.5]])


def test_selection_bias_moves_the_selection_alone() -> None:
    logits = torch.tensor([[1.0, 0.0, -1.0]], requires_grad=True)
    bias = torch.tensor([-9.0, 0.0, 9.0], requires_grad=True)
    routing = sigmoid_grouped(logits, 1, bias_E=bias, renormalize=False)
    assert routing.expert_ids_TK.tolist() == [[2]]
    close(routing.weights_TK.detach(), [[1 / (1 + math.e)]])
    torch.autograd.backward(routing.weights_TK.sum())
    assert bias.grad is None


@pytest.mark.parametrize(("groups", "kept", "top_k"), [(4, 1, 1), (0, 1, 1), (3, 0, 1), (3, 4, 1), (3, 1, 3)])
def test_impossible_groups_are_refused(groups: int, kept: int, top_k: int) -> None:
    with pytest.raises(ConfigError):
        sigmoid_grouped(torch.zeros(2, 6), top_k, n_group=groups, topk_group=kept)


def test_updated_bias_lifts_idle_experts_and_lowers_busy_ones() -> None:
    bias = updated_bias(torch.tensor([0.5, 0.0, 0.0, -0.1]), torch.tensor([10, 0, 5, 5]), rate=0.01)
    close(bias, [0.49, 0.01, 0.0, -0.1])


def test_updated_bias_balances_a_skewed_router() -> None:
    logits, bias = randn(512, 8) + torch.linspace(-2, 2, 8), torch.zeros(8)
    busiest = []
    for _ in range(200):
        ids = sigmoid_grouped(logits, 2, bias_E=bias).expert_ids_TK
        counts = torch.bincount(ids.flatten(), minlength=8)
        busiest.append(int(counts.max()) / 128)
        bias = updated_bias(bias, counts, rate=1e-2)
    assert busiest[0] > 2
    assert busiest[-1] < 1.2


@pytest.mark.parametrize("training", [True, False])
def test_the_module_uses_the_bias_and_every_option(training: bool) -> None:
    options = Sigmoid(n_group=3, topk_group=2, routed_scaling_factor=2.5)
    config = MoEConfig(6, 2, router=options, renormalize=False)
    router, x, bias = SigmoidRouter(options, 13, config, torch.zeros).train(training), randn(9, 13), randn(6, seed=2)
    with torch.no_grad():
        router.weight.copy_(randn(6, 13, seed=1))
        router.selection_bias.copy_(bias)
        found, logits = router(x), x @ randn(6, 13, seed=1).T
    expected = sigmoid_grouped(logits, 2, bias_E=bias, n_group=3, topk_group=2, renormalize=False, scale=2.5)
    assert torch.equal(found.expert_ids_TK, expected.expert_ids_TK)
    assert torch.equal(found.weights_TK, expected.weights_TK)


def test_the_bias_moves_by_its_rate_and_stays_in_float32() -> None:
    options = Sigmoid(bias_rate=0.5)
    router = SigmoidRouter(options, 13, MoEConfig(4, 2, router=options), torch.zeros).to(torch.bfloat16)
    router.update_bias(torch.tensor([10, 0, 5, 5]))
    assert (router.weight.dtype, router.selection_bias.dtype) == (torch.float32, torch.float32)
    assert router.selection_bias.tolist() == [-0.5, 0.5, 0.0, 0.0]
    assert options.updates_bias and not Sigmoid().updates_bias


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"router": {"n_group": 3}}, "router.n_group is 3 and router.topk_group 1: expected a divisor of 8 experts"),
        ({"router": {"n_group": 4, "topk_group": 5}}, "router.n_group is 4 and router.topk_group 5: expected"),
        ({"router": {"n_group": 8, "topk_group": 1}}, "top_k is 2: more than the experts in 1 groups"),
        ({"router": {"n_group": 0}}, "router.n_group is 0: expected a whole number of at least 1"),
        ({"router": {"bias_rate": -1.0}}, "router.bias_rate is -1.0: expected a number that is not negative"),
        ({"router": {"n_group": 4, "topk_group": 4}, "granularity": 4, "top_k": 4},
         "granularity is 4: 8 experts do not make up 4 groups of whole FFNs"),
    ],
)  # fmt: skip
def test_groups_that_do_not_fit_are_refused(settings: dict[str, object], message: str) -> None:
    router = {"name": "sigmoid", **settings.pop("router")}  # type: ignore[dict-item]
    with pytest.raises(ConfigError) as caught:
        MoEConfig.from_dict({"experts": 8, "top_k": 2, "router": router, **settings})
    assert message in str(caught.value)


def test_what_is_exact() -> None:
    assert MoEConfig.deepseek_v3(router={"routed_scaling_factor": 1.0}).exact
    assert not MoEConfig.deepseek_v3().exact
    assert not MoEConfig(8, 2, router=moeify.routers.Sigmoid(), renormalize=False).exact
