"""What a stock router takes for the probability of each expert, told from the weights that it gave.

transformers' routers return logits and the weights of the chosen experts, and do not say what lies between. Their
ratios do: they are those of the scores, whatever the router multiplied them by.

Shape suffixes: T tokens, E experts, K choices per token.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from moeify.routing.logits import at_least_fp32

# Of float32 logits (T, E). "as they are" is for routers whose logits are probabilities already.
SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda logits_TE: torch.softmax(logits_TE, dim=-1),
    "sigmoid": torch.sigmoid,
    "sqrtsoftplus": lambda logits_TE: F.softplus(logits_TE).sqrt(),
    "as they are": lambda logits_TE: logits_TE,
}

_ROUNDING = 0.02  # of bfloat16, with room


def scores_of(logits_TE: Tensor, scoring: str) -> Tensor:
    """Return the probability of each expert: scores that do not sum to 1 are divided by their sum, as DeepSeek-V3 does.

    Args:
        logits_TE: (T, E), any float dtype.
        scoring: A name of `SCORES`.
    """
    scores_TE = SCORES[scoring](at_least_fp32(logits_TE))
    return scores_TE if scoring == "softmax" else scores_TE / scores_TE.sum(-1, keepdim=True)


@torch.no_grad()
def scoring_of(logits_TE: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor) -> str:
    """Return the name of the scores whose ratios the weights have; waits for the device.

    Where none has them (PhiMoE's), or nothing tells them apart (one choice with weight 1), it is "softmax".

    Args:
        logits_TE: (T, E).
        expert_ids_TK: (T, K) in [0, E).
        weights_TK: (T, K), positive where they tell something.
    """
    given_TK, logits_TE = at_least_fp32(weights_TK), at_least_fp32(logits_TE)
    if (logits_TE >= 0).all() and ((logits_TE.sum(-1) - 1).abs() < _ROUNDING).all():
        return "as they are"  # probabilities already
    across = (-1,) if given_TK.shape[-1] > 1 else (0, 1)  # one choice has its ratio to those of other tokens
    wrong = {}
    for name, scores in SCORES.items():
        found_TK = (given_TK / scores(logits_TE).gather(-1, expert_ids_TK)).log()
        off = (found_TK - found_TK.mean(across, keepdim=True)).abs().mean()
        wrong[name] = float(off.nan_to_num(torch.inf))
    says_nothing = torch.allclose(given_TK, given_TK.mean(across, keepdim=True), rtol=1e-4)
    best = min(wrong, key=lambda name: wrong[name])
    return "softmax" if says_nothing or wrong[best] > _ROUNDING else best
