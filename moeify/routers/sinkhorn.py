"""Sinkhorn: experts chosen by a balanced plan in training, by the logits in evaluation (S-BASE).

In training, what it does with a token depends on the other tokens, later ones too: it fits encoders and vision models;
in a causal decoder it leaks the future.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moeify.routers.base import LinearRouter, Router
from moeify.routing.logits import at_least_fp32, check_top_k
from moeify.routing.record import Routing, RoutingContext


def sinkhorn(
    logits_TE: Tensor, top_k: int, *, iterations: int = 16, mask_T: Tensor | None = None, renormalize: bool = False
) -> Routing:
    """Select by a balanced transport plan, weigh by the plain router (S-BASE, Clark et al. 2022; Megatron).

    The plan is exp(logits) with rows and columns scaled to sums 1/T and 1/E. Weights are the sigmoid of the chosen
    logit if top_k is 1, else the softmax among all E. Evaluation uses `iterations=0`, the plain top-k. Use no
    balancing loss with it.

    The number of iterations is fixed because stopping on a tolerance waits for the device: with one popular expert the
    usual 1e-4 took over 100 000. 16 reach the same choices for logits of standard deviation 3 with a bias of 6.

    Args:
        logits_TE: (T, E), any float dtype.
        top_k: Experts per token, 1 to E.
        iterations: Row and column scalings.
        mask_T: (T,) bool, False for padding, which then takes no share of the plan.
        renormalize: Divide the weights of a token by their sum, which neither source does.

    Returns:
        Routing; scores are the softmax over all E.

    Raises:
        ConfigError: top_k is not in 1..E.
    """
    check_top_k(top_k, logits_TE.shape[-1])
    logits_TE = at_least_fp32(logits_TE)
    with torch.no_grad():
        column_E = logits_TE.new_zeros(logits_TE.shape[-1])
        for _ in range(iterations):
            plan_TE = logits_TE - torch.logsumexp(logits_TE + column_E, dim=-1, keepdim=True)
            if mask_T is not None:
                plan_TE = plan_TE.masked_fill(~mask_T.unsqueeze(-1), torch.finfo(plan_TE.dtype).min)
            column_E = -torch.logsumexp(plan_TE, dim=0)
        ids_TK = (logits_TE + column_E).topk(top_k, dim=-1).indices
    scores_TE = torch.softmax(logits_TE, dim=-1)
    gates_TE = torch.sigmoid(logits_TE) if top_k == 1 else scores_TE
    weights_TK = gates_TE.gather(-1, ids_TK)
    total_T1 = weights_TK.sum(-1, keepdim=True) if renormalize else 1
    return Routing(ids_TK, weights_TK / total_T1, logits_TE, scores_TE)


class SinkhornRouter(LinearRouter):
    """Module of `Sinkhorn`."""

    def route(self, x_TH: Tensor, context: RoutingContext) -> Routing:
        """Choose experts for tokens to which jitter was applied."""
        iterations = 16 if self.training else 0
        return sinkhorn(
            self.logits(x_TH),
            self.config.top_k,
            iterations=iterations,
            mask_T=context.mask_T,
            renormalize=self.config.renormalize,
        )


@dataclass(frozen=True)
class Sinkhorn(Router):
    """Experts chosen by a balanced plan in training, by the logits in evaluation."""

    builds = SinkhornRouter
    renormalize = False
    aux_loss = 0.0
