"""Softmax: the k most probable experts (Mixtral, Switch, ST-MoE, MegaBlocks)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moeify.routers.base import LinearRouter, Router
from moeify.routing.logits import at_least_fp32, check_top_k
from moeify.routing.record import Routing, RoutingContext


def softmax_topk(logits_TE: Tensor, top_k: int, *, renormalize: bool = True) -> Routing:
    """Choose the k most probable experts (Shazeer et al. 2017 without noise; Mixtral; Qwen-MoE; OLMoE).

    Softmax before the selection and renormalization after it is the same function as softmax over the selected logits
    (Mixtral, Megatron's post-softmax), so one switch covers both orders.

    Args:
        logits_TE: (T, E), any float dtype.
        top_k: Experts per token, 1 to E.
        renormalize: Weights are the softmax over the chosen logits and sum to 1. If False, they are the probabilities
            among all E and sum to less. With top_k=1 renormalized weights are all 1 and give the router no gradient.

    Returns:
        Routing; scores are the softmax over all E.

    Raises:
        ConfigError: top_k is not in 1..E.
    """
    check_top_k(top_k, logits_TE.shape[-1])
    logits_TE = at_least_fp32(logits_TE)
    scores_TE = torch.softmax(logits_TE, dim=-1)
    chosen_TK, ids_TK = logits_TE.topk(top_k, dim=-1)
    weights_TK = torch.softmax(chosen_TK, dim=-1) if renormalize else scores_TE.gather(-1, ids_TK)
    return Routing(ids_TK, weights_TK, logits_TE, scores_TE)


class SoftmaxRouter(LinearRouter):
    """Module of `Softmax`."""

    def route(self, x_TH: Tensor, context: RoutingContext) -> Routing:
        """Choose experts for tokens to which jitter was applied."""
        return softmax_topk(self.logits(x_TH), self.config.top_k, renormalize=self.config.renormalize)

    def extra_repr(self) -> str:
        """Describe the router in `repr`."""
        order = "softmax over the chosen" if self.config.renormalize else "softmax over all"
        return f"{super().extra_repr()}, {order}"


@dataclass(frozen=True)
class Softmax(Router):
    """The k most probable experts."""

    builds = SoftmaxRouter
