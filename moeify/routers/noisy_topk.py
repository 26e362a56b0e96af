"""Noisy top-k: logits with learned noise in training (Shazeer et al. 2017)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moeify.config import MoEConfig
from moeify.routers.base import LinearRouter, Router, StartValue, Zeros
from moeify.routers.softmax import softmax_topk
from moeify.routing.logits import at_least_fp32, router_logits
from moeify.routing.record import Routing, RoutingContext

_LEAST_NOISE = 1e-2


def noisy_topk(clean_logits_TE: Tensor, raw_noise_TE: Tensor | None, top_k: int, *, granularity: int = 1) -> Routing:
    """Choose the top k of logits with learned noise, softmax after the selection (Shazeer et al. 2017, eq. 3-5).

    The paper starts both projections at zero, so that the noise (standard deviation log 2) balances the first steps.

    Args:
        clean_logits_TE: (T, E), x @ W_g, any float dtype.
        raw_noise_TE: (T, E), x @ W_noise; the noise has standard deviation softplus of it, plus 1e-2 as in the
            authors' code (tensor2tensor): without it training reaches deviations near 0, where the gradient of the
            load loss is not finite. None: no noise (evaluation).
        top_k: Experts per token, 1 to E.
        granularity: So many experts in a row share a draw, so that the shards of an FFN are chosen together.

    Returns:
        Routing; scores are the gates G(x), zero outside the chosen experts, as the importance loss takes them.

    Raises:
        ConfigError: top_k is not in 1..E.
    """
    clean_logits_TE = noisy_TE = at_least_fp32(clean_logits_TE)
    noise_std_TE = None
    if raw_noise_TE is not None:
        noise_std_TE = F.softplus(at_least_fp32(raw_noise_TE)) + _LEAST_NOISE
        drawn = torch.empty_like(noisy_TE[:, ::granularity]).normal_()
        noisy_TE = clean_logits_TE + drawn.repeat_interleave(granularity, dim=-1) * noise_std_TE
    routing = softmax_topk(noisy_TE, top_k)
    gates_TE = torch.zeros_like(noisy_TE).scatter(-1, routing.expert_ids_TK, routing.weights_TK)
    return replace(routing, scores_TE=gates_TE, clean_logits_TE=clean_logits_TE, noise_std_TE=noise_std_TE)


class NoisyTopkRouter(LinearRouter):
    """Module of `NoisyTopk`."""

    def __init__(self, options: NoisyTopk, hidden: int, config: MoEConfig, zeros: Zeros) -> None:
        super().__init__(options, hidden, config, zeros)
        self.noise_weight = nn.Parameter(zeros(config.experts, hidden))

    def route(self, x_TH: Tensor, context: RoutingContext) -> Routing:
        """Choose experts for tokens to which jitter was applied."""
        raw_noise_TE = router_logits(x_TH, self.noise_weight) if self.training else None
        return noisy_topk(self.logits(x_TH), raw_noise_TE, self.config.top_k, granularity=self.config.granularity)


@dataclass(frozen=True)
class NoisyTopk(Router):
    """Top-k of logits with learned noise in training."""

    builds = NoisyTopkRouter

    def start(self, config: MoEConfig, hidden: int, path: str) -> dict[str, StartValue]:
        """Return the start values: the paper starts the noise at zero weight, its standard deviation is log 2 there."""
        shape = (config.experts, hidden)
        return {
            **super().start(config, hidden, path),
            "noise_weight": StartValue(shape, None, lambda: torch.zeros(shape)),
        }
