"""GShard: top-2, the second expert at random in training."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moeify.config import MoEConfig
from moeify.config.checks import Positive
from moeify.errors import ConfigError
from moeify.routers.base import LinearRouter, Router, Zeros
from moeify.routers.softmax import softmax_topk
from moeify.routing.record import Routing, RoutingContext


def gshard(logits_TE: Tensor, *, threshold: float = 0.5) -> Routing:
    """Choose two experts, the second at random (GShard, Lepikhin et al. 2020, Algorithm 1).

    With g1 + g2 = 1 the renormalized probabilities, the second expert is kept with probability min(1, g2 / threshold):
    min(1, 2*g2) in GShard, min(1, 5*g2) in ST-MoE. g1 stays as it is when the second is dropped. The paper's balancing
    loss counts first choices: `expert_ids_TK[:, :1]`. Without randomness (evaluation) this is
    `softmax_topk(logits_TE, 2)`.

    Takes (T, E) logits, E at least 2 (else ConfigError). Returns K = 2; a second expert not kept has id E and weight 0.
    """
    routing = softmax_topk(logits_TE, 2)
    second_T = routing.weights_TK[:, 1]
    draw_T = torch.empty_like(second_T).uniform_()
    kept_TK = torch.stack((torch.ones_like(draw_T, dtype=torch.bool), draw_T * threshold < second_T), dim=-1)
    return replace(
        routing,
        expert_ids_TK=routing.expert_ids_TK.masked_fill(~kept_TK, logits_TE.shape[-1]),
        weights_TK=routing.weights_TK.masked_fill(~kept_TK, 0),
    )


class GshardRouter(LinearRouter):
    """Module of `Gshard`."""

    def __init__(self, options: Gshard, hidden: int, config: MoEConfig, zeros: Zeros) -> None:
        super().__init__(options, hidden, config, zeros)
        self.threshold = options.threshold

    def route(self, x_TH: Tensor, context: RoutingContext) -> Routing:
        """Choose experts for tokens to which jitter was applied."""
        logits_TE = self.logits(x_TH)
        return gshard(logits_TE, threshold=self.threshold) if self.training else softmax_topk(logits_TE, 2)


@dataclass(frozen=True)
class Gshard(Router):
    """Top-2, the second expert at random in training.

    Attributes:
        threshold: The second expert is always used where its share is at least this; below, with probability
            share / threshold.
    """

    builds = GshardRouter

    threshold: Positive = 0.5

    def check(self, config: MoEConfig) -> None:
        """Check that two experts are asked for."""
        if config.top_k != 2:
            raise ConfigError(f"top_k is {config.top_k}: the router 'gshard' takes 2")
