from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moeify.config import MoEConfig
from moeify.errors import ConfigError
from moeify.measure import TOLERANCE
from moeify.routers.softmax import softmax_topk
from tests.moeify.routers.by_hand import best, close, softmax
from tests.moeify.routing.draw import randn, seeded


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


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_the_module_is_the_function_of_its_projection(renormalize: bool, training: bool) -> None:
    config = MoEConfig(5, 2, renormalize=renormalize)
    router, x = config.router.module(13, config).train(training), randn(7, 13)
    with torch.no_grad():
        router.get_parameter("weight").copy_(randn(5, 13, seed=1))
        expected = softmax_topk(x @ randn(5, 13, seed=1).T, 2, renormalize=renormalize)
        assert torch.equal(router(x).weights_TK, expected.weights_TK)
    assert repr(router) == f"SoftmaxRouter(13 → 5, top-2, softmax over {'the chosen' if renormalize else 'all'})"


def test_what_is_exact() -> None:
    assert MoEConfig(8, 2).exact
    assert MoEConfig(8, 2, capacity_factor=1.0).exact  # in evaluation nothing is dropped
    assert not MoEConfig(8, 2, eval_capacity_factor=1.0).exact
    assert not MoEConfig(8, 2, renormalize=False).exact
