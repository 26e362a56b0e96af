"""How well a causal language model predicts a text."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@torch.no_grad()
def perplexity(model: nn.Module, ids_L: Tensor, *, window: int = 512) -> float:
    """Return exp of the mean negative log-likelihood per token.

    Args:
        model: A causal language model of transformers.
        ids_L: Token ids of the text, (L,), int64.
        window: The text is cut into windows of this many tokens; each is predicted from its own beginning.
    """
    total, count = 0.0, 0
    for ids in torch.split(ids_L, window):
        if len(ids) < 2:
            continue
        logits_LV = model(input_ids=ids[None], use_cache=False).logits[0]
        total += F.cross_entropy(logits_LV[:-1].float(), ids[1:], reduction="sum").item()
        count += len(ids) - 1
    return math.exp(total / count) if count else math.nan
