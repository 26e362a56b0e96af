"""What a router is given besides the tokens, and what it returns.

Shape suffixes: T tokens, E experts, K choices per token.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from torch import Tensor


@dataclass(frozen=True)
class RoutingContext:
    """What a router may look at besides the tokens.

    Attributes:
        mask_T: (T,) bool, False for padding; None when all tokens are real.
        token_ids_T: (T,) integers, the tokens' ids in the vocabulary, where the model was called with them.
        capacity_factor: The layer's limit; None for none.
    """

    mask_T: Tensor | None = None
    token_ids_T: Tensor | None = None
    capacity_factor: Fraction | None = None


NO_CONTEXT = RoutingContext()


@dataclass(frozen=True)
class Routing:
    """Where each token goes.

    Attributes:
        expert_ids_TK: int64, an expert in [0, E), or E for a choice that is not used (dropped, not chosen): the expert
            computation skips it.
        weights_TK: What multiplies each expert's output.
        logits_TE: What the router's projection gave (noisy top-k: with the noise added).
        scores_TE: What balancing losses take as the probability of each expert, and capacity as its priority.
        clean_logits_TE: Noisy top-k only: the logits before the noise, which the z-loss then takes.
        noise_std_TE: Noisy top-k only: the standard deviation of the noise on each logit.
        capacity: Choices that an expert takes at most, where the layer has dropped others.
    """

    expert_ids_TK: Tensor
    weights_TK: Tensor
    logits_TE: Tensor
    scores_TE: Tensor
    clean_logits_TE: Tensor | None = None
    noise_std_TE: Tensor | None = None
    capacity: int | None = None
