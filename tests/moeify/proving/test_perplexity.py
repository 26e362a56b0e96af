from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from moeify.proving.perplexity import perplexity
from tests.moeify import tiny


def by_hand(model: Any, ids: list[int], window: int) -> float:
    """One token at a time, in float64."""
    losses = []
    for start in range(0, len(ids), window):
        piece = ids[start : start + window]
        for end in range(1, len(piece)):
            logits = model(input_ids=torch.tensor([piece[:end]])).logits[0, -1].double()
            losses.append(-logits.log_softmax(-1)[piece[end]].item())
    return math.exp(sum(losses) / len(losses))


@pytest.mark.parametrize("length", [3, 6, 7, 11])
@torch.no_grad()
def test_each_window_is_predicted_from_its_own_beginning(length: int) -> None:
    model = tiny.build("llama")
    ids = torch.randint(0, tiny.VOCABULARY, (length,), generator=torch.Generator().manual_seed(length))
    assert perplexity(model, ids, window=5) == pytest.approx(by_hand(model, ids.tolist(), 5), rel=1e-5)


def test_one_token_predicts_nothing() -> None:
    assert math.isnan(perplexity(tiny.build("llama"), torch.tensor([3])))
