"""Expert choice: each expert takes its most probable tokens.

What it does with a token depends on the other tokens, later ones too. It fits encoders and vision models; in a causal
decoder it leaks the future in training and cannot be repeated one token at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moeify.config import MoEConfig
from moeify.errors import ConfigError
from moeify.routers.base import LinearRouter, Router, Zeros
from moeify.routing.capacity import exact_factor, expert_capacity
from moeify.routing.logits import at_least_fp32
from moeify.routing.record import Routing, RoutingContext


def expert_choice(
    logits_TE: Tensor, capacity: int, *, mask_T: Tensor | None = None, renormalize: bool = False
) -> Routing:
    """Let each expert take the `capacity` tokens that give it the highest probability (Zhou et al. 2022).

    A token may be taken by any number of experts. Balanced by construction, so it needs no balancing loss.

    Args:
        logits_TE: (T, E), any float dtype.
        capacity: Tokens per expert; the paper's is round(capacity_factor * T / E). More than T counts as T.
        mask_T: (T,) bool, False for padding, which no expert takes.
        renormalize: Divide the weights of a token by their sum, as upcycling does for vision (Komatsuzaki et al. 2022):
            copies then compute what the FFN did for every token that an expert takes.

    Returns:
        Routing with K = E: choice e of a token has id e if expert e took it, else E with weight 0. Weights are the
        softmax over the experts.
    """
    logits_TE = at_least_fp32(logits_TE)
    tokens, experts = logits_TE.shape
    scores_TE = torch.softmax(logits_TE, dim=-1)
    chooser_TE = scores_TE if mask_T is None else scores_TE.masked_fill(~mask_T.unsqueeze(-1), -1)
    taken_CE = chooser_TE.topk(min(capacity, tokens), dim=0).indices
    chosen_TE = torch.zeros_like(scores_TE, dtype=torch.bool).scatter(0, taken_CE, True)
    if mask_T is not None:
        chosen_TE = chosen_TE & mask_T.unsqueeze(-1)
    ids_TE = torch.arange(experts, device=logits_TE.device).expand(tokens, experts).masked_fill(~chosen_TE, experts)
    weights_TE = scores_TE.masked_fill(~chosen_TE, 0)
    if renormalize:
        weights_TE = weights_TE / (weights_TE.sum(-1, keepdim=True) + 1e-20)  # of a token that nobody took: 0
    return Routing(ids_TE, weights_TE, logits_TE, scores_TE)


class ExpertChoiceRouter(LinearRouter):
    """Module of `ExpertChoice`."""

    def __init__(self, options: ExpertChoice, hidden: int, config: MoEConfig, zeros: Zeros) -> None:
        super().__init__(options, hidden, config, zeros)
        self.factor = exact_factor(config.capacity_factor or 1.0)

    def route(self, x_TH: Tensor, context: RoutingContext) -> Routing:
        """Choose experts for tokens to which jitter was applied."""
        factor = self.factor if context.capacity_factor is None else context.capacity_factor
        capacity = expert_capacity(x_TH.shape[0], self.config.experts, self.config.top_k, factor)
        return expert_choice(self.logits(x_TH), capacity, mask_T=context.mask_T, renormalize=self.config.renormalize)


@dataclass(frozen=True)
class ExpertChoice(Router):
    """Each expert takes its most probable tokens."""

    builds = ExpertChoiceRouter
    renormalize = False
    aux_loss = 0.0
    sums_to_one = False
    joint = True
    keeps_capacity = True

    def check(self, config: MoEConfig) -> None:
        """Check that there is a capacity."""
        if config.capacity_factor is None:
            raise ConfigError("capacity_factor is None: expert choice needs one, the paper's is 1 per visited expert")
