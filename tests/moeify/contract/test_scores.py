from __future__ import annotations

import pytest
import torch

from moeify.contract.scores import SCORES, scores_of, scoring_of

LOGITS = torch.randn(9, 5, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("factor", [1.0, 2.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SCORES)
def test_the_weights_tell_the_scores(name: str, top_k: int, factor: float, dtype: torch.dtype) -> None:
    logits = LOGITS.softmax(-1) if name == "as they are" else LOGITS
    ids = logits.topk(top_k, dim=-1).indices
    weights = (SCORES[name](logits) * factor).gather(-1, ids).to(dtype)
    assert scoring_of(logits, ids, weights) == name
    if top_k > 1:  # divided by their sum they tell it still
        assert scoring_of(logits, ids, weights / weights.sum(-1, keepdim=True)) == name


def test_where_nothing_tells_it_is_a_softmax() -> None:
    ids = LOGITS.topk(1, dim=-1).indices
    assert scoring_of(LOGITS, ids, torch.ones(9, 1)) == "softmax"
    assert scoring_of(LOGITS, ids, torch.zeros(9, 1)) == "softmax"


@pytest.mark.parametrize("name", SCORES)
def test_scores_sum_to_one(name: str) -> None:
    scores = scores_of(LOGITS.abs().to(torch.bfloat16), name)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores.sum(-1), torch.ones(9))
    assert torch.equal(scores.argsort(-1), LOGITS.abs().to(torch.bfloat16).argsort(-1))
