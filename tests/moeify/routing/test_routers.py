"""The token-by-token routers, against the papers' formulas written as loops over Python floats."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moeify.errors import ConfigError
from moeify.measure import TOLERANCE
from moeify.routing.routers import (
    gshard,
    hash_table,
    hash_tokens,
    jitter_inputs,
    noisy_topk,
    router_init,
    router_logits,
    sigmoid_grouped,
    softmax_topk,
    switch,
    updated_bias,
)
from tests.moeify.routing.draw import randn, seeded


def close(actual: Tensor, expected: object, dtype: str = "float32") -> None:
    expected = torch.as_tensor(expected, dtype=torch.float64)
    assert actual.shape == expected.shape
    assert (actual.double() - expected).abs().max() <= TOLERANCE[dtype] * expected.abs().max()


def softmax(row: list[float]) -> list[float]:
    exps = [math.exp(value - max(row)) for value in row]
    return [value / sum(exps) for value in exps]


def best(row: list[float], k: int) -> list[int]:
    return sorted(range(len(row)), key=lambda i: -row[i])[:k]


# --- weights of the router ---------------------------------------------------------------------------------------


def test_router_init_is_a_function_of_seed_and_name() -> None:
    first = router_init((7, 33), 3, "layers.0.router")
    torch.randn(10)
    router_init((7, 33), 3, "layers.1.router")
    with torch.device("meta"):
        again = router_init((7, 33), 3, "layers.0.router")
    assert first.dtype == torch.float32
    assert torch.equal(first, again)
    assert not torch.equal(first, router_init((7, 33), 4, "layers.0.router"))
    assert not torch.equal(first, router_init((7, 33), 3, "layers.1.router"))


def test_router_init_never_changes() -> None:
    # Conversions are resumed and compared by these values.
    expected = [[0.2849939, -0.01470575, -1.0194409], [-0.36348554, 0.25344881, 1.291885]]
    close(router_init((2, 3), 0, "router"), expected)


@pytest.mark.parametrize("width", [48, 1031])
def test_router_init_gives_logits_of_standard_deviation_one(width: int) -> None:
    weight = router_init((64, width), 0, "a")
    assert abs(float(weight.std()) * math.sqrt(width) - 1) < 0.05
    x = randn(500, width)
    x = x / x.square().mean(-1, keepdim=True).sqrt()
    assert abs(float(router_logits(x, weight).std()) - 1) < 0.05


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_logits_are_float32_also_under_autocast(dtype: torch.dtype) -> None:
    x, weight, bias = randn(11, 37, dtype=dtype), randn(5, 37, seed=1, dtype=dtype), randn(5, seed=2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = router_logits(x, weight, bias)
    assert logits.dtype == torch.float32
    close(logits, x.double() @ weight.double().t() + bias.double())


# --- top-k softmax -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("top_k", [1, 3, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_softmax_topk(top_k: int, renormalize: bool, dtype: torch.dtype) -> None:
    # A permutation of distinct numbers per row: no ties, also in bfloat16.
    logits = torch.stack([torch.randperm(7, generator=seeded(i)) for i in range(13)]).to(dtype) / 2
    routing = softmax_topk(logits, top_k, renormalize=renormalize)
    for t, row in enumerate(logits.tolist()):
        probabilities, ids = softmax(row), best(row, top_k)
        total = sum(probabilities[i] for i in ids) if renormalize else 1.0
        assert routing.expert_ids_TK[t].tolist() == ids
        close(routing.weights_TK[t], [probabilities[i] / total for i in ids])
        close(routing.scores_TE[t], probabilities)
    wanted = torch.float64 if dtype == torch.float64 else torch.float32
    assert {routing.weights_TK.dtype, routing.logits_TE.dtype, routing.scores_TE.dtype} == {wanted}
    assert routing.expert_ids_TK.dtype == torch.int64


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 20), st.integers(1, 19), st.data())
def test_softmax_topk_chooses_k_different_best_experts(tokens: int, experts: int, data: st.DataObject) -> None:
    top_k = data.draw(st.integers(1, experts))
    # Few distinct values, as bfloat16 gives: ties everywhere.
    logits = torch.randint(0, 3, (tokens, experts), generator=seeded(data.draw(st.integers(0, 99)))).bfloat16()
    routing = softmax_topk(logits, top_k)
    assert routing.expert_ids_TK.shape == routing.weights_TK.shape == (tokens, top_k)
    for row, ids in zip(logits.tolist(), routing.expert_ids_TK.tolist(), strict=True):
        assert len(set(ids)) == top_k
        assert min(row[i] for i in ids) >= max([row[i] for i in range(experts) if i not in ids], default=-math.inf)
    assert bool(((routing.weights_TK.sum(-1) - 1).abs() <= TOLERANCE["float32"]).all())


@pytest.mark.parametrize("top_k", [0, 6])
def test_top_k_out_of_range_is_named(top_k: int) -> None:
    with pytest.raises(ConfigError, match=f"top_k is {top_k}.*5 experts"):
        softmax_topk(torch.zeros(3, 5), top_k)


def test_nan_logits_give_nan_weights_and_valid_ids() -> None:
    logits = randn(4, 5)
    logits[2, 3] = math.nan
    routing = softmax_topk(logits, 2)
    assert routing.weights_TK.isnan().any(-1).tolist() == [False, False, True, False]
    assert int(routing.expert_ids_TK.max()) < 5


# --- switch, GShard, noisy top-k ---------------------------------------------------------------------------------


def test_switch_without_jitter_is_the_best_expert_with_its_probability() -> None:
    x, weight = randn(9, 21), randn(5, 21, seed=1)
    routing = switch(x, weight)
    for t, row in enumerate((x.double() @ weight.double().t()).tolist()):
        assert routing.expert_ids_TK[t].tolist() == best(row, 1)
        close(routing.weights_TK[t], [max(softmax(row))])


def test_jitter_multiplies_the_input_uniformly() -> None:
    x = torch.full((100, 101), 3.0, dtype=torch.bfloat16)
    factors = jitter_inputs(x, 0.01, generator=seeded(0)) / 3
    assert factors.dtype == torch.float32
    assert 0.99 - 1e-6 <= float(factors.min()) < 0.9901
    assert 1.0099 < float(factors.max()) <= 1.01 + 1e-6
    assert abs(float(factors.mean()) - 1) < 3e-4
    weight = randn(5, 101)
    jittered = switch(x, weight, jitter=0.01, generator=seeded(0))
    assert torch.equal(jittered.logits_TE, router_logits(factors * 3, weight))


@pytest.mark.parametrize("second", [0.05, 0.3, 0.45])
def test_gshard_keeps_the_second_expert_with_twice_its_probability(second: float) -> None:
    logits = torch.tensor([-9.0, math.log(second), -9.0, math.log(1 - second), -9.0]).repeat(20_000, 1)
    routing = gshard(logits, generator=seeded(1))
    assert (routing.expert_ids_TK[:, 0] == 3).all()
    dropped = routing.expert_ids_TK[:, 1] == 5
    assert (routing.expert_ids_TK[~dropped, 1] == 1).all()
    assert abs(float((~dropped).double().mean()) - min(1, 2 * second)) < 0.015
    close(routing.weights_TK[~dropped], torch.tensor([1 - second, second]).expand(int((~dropped).sum()), 2))
    # The first expert's weight stays what it was, and does not become 1.
    close(routing.weights_TK[dropped], torch.tensor([1 - second, 0.0]).expand(int(dropped.sum()), 2))


def test_gshard_always_keeps_an_equal_second_expert() -> None:
    assert (gshard(torch.zeros(1000, 3), generator=seeded(0)).expert_ids_TK < 3).all()


def test_noisy_topk_is_the_softmax_of_the_best_noisy_logits() -> None:
    clean, raw = randn(4001, 6), randn(1, 6, seed=1).expand(4001, 6)
    routing = noisy_topk(clean, raw, 2, generator=seeded(2))
    assert routing.clean_logits_TE is not None and routing.noise_std_TE is not None
    close(routing.noise_std_TE[0], [math.log1p(math.exp(value)) for value in raw[0].tolist()])
    draws = (routing.logits_TE - routing.clean_logits_TE) / routing.noise_std_TE
    assert draws.mean(0).abs().max() < 0.05
    assert (draws.std(0) - 1).abs().max() < 0.05
    for t in range(50):
        noisy = routing.logits_TE[t].tolist()
        ids = best(noisy, 2)
        gates = softmax([noisy[i] for i in ids])
        assert routing.expert_ids_TK[t].tolist() == ids
        close(routing.weights_TK[t], gates)
        close(routing.scores_TE[t], [gates[ids.index(e)] if e in ids else 0.0 for e in range(6)])


def test_noisy_topk_in_evaluation_is_top_k() -> None:
    clean = randn(9, 6)
    routing = noisy_topk(clean, None, 2)
    plain = softmax_topk(clean, 2)
    assert routing.noise_std_TE is None
    assert torch.equal(routing.expert_ids_TK, plain.expert_ids_TK)
    assert torch.equal(routing.weights_TK, plain.weights_TK)


# --- DeepSeek-V3 -------------------------------------------------------------------------------------------------


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
    routing = sigmoid_grouped(logits, top_k, bias_E=bias, groups=groups, groups_kept=kept, scale=2.5)
    for t, row in enumerate(logits.tolist()):
        ids, weights = deepseek_v3(row, bias.tolist(), top_k, groups, kept)
        assert routing.expert_ids_TK[t].tolist() == ids
        close(routing.weights_TK[t], [2.5 * weight for weight in weights])
    close(routing.scores_TE.sum(-1), torch.ones(23))


def test_sigmoid_grouped_weights_without_renormalisation_are_the_sigmoids() -> None:
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
        sigmoid_grouped(torch.zeros(2, 6), top_k, groups=groups, groups_kept=kept)


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


# --- hash --------------------------------------------------------------------------------------------------------


def test_hash_routes_every_occurrence_of_a_token_alike() -> None:
    table = hash_table(101, 7, 0, "hash")
    assert sorted(torch.bincount(table, minlength=7).tolist()) == [14] * 4 + [15] * 3
    assert torch.equal(table, hash_table(101, 7, 0, "hash"))
    assert not torch.equal(table, hash_table(101, 7, 1, "hash"))
    tokens = torch.tensor([100, 3, 3, 0])
    routing = hash_tokens(tokens, table, 7)
    assert routing.expert_ids_TK.tolist() == [[int(table[i])] for i in tokens]
    assert routing.weights_TK.tolist() == [[1.0]] * 4
    assert routing.scores_TE.argmax(-1).tolist() == routing.expert_ids_TK[:, 0].tolist()
