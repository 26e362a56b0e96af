"""Sigmoid scores, a limit on groups, and a selection bias that balances without a loss (DeepSeek-V3).

Shape suffixes: T tokens, E experts, G groups of E/G experts each, K choices per token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moeify.config import MoEConfig
from moeify.config.checks import Count, NotNegative
from moeify.errors import ConfigError
from moeify.routers.base import LinearRouter, Router, StartValue, Zeros
from moeify.routing.logits import at_least_fp32
from moeify.routing.record import Routing, RoutingContext


def sigmoid_grouped(
    logits_TE: Tensor,
    top_k: int,
    *,
    bias_E: Tensor | None = None,
    n_group: int = 1,
    topk_group: int = 1,
    renormalize: bool = True,
    scale: float = 1.0,
) -> Routing:
    """Choose by sigmoid scores, limited to the best groups and shifted by a bias (DeepSeek-V3, 2412.19437, eq. 12-16).

    The bias moves the selection only: weights are the plain scores of the chosen experts, divided by their sum + 1e-20
    (if `renormalize`), times `scale`. DeepSeek-V3 itself: 256 experts, top 8, 4 of 8 groups, scale 2.5.

    Args:
        logits_TE: (T, E), any float dtype.
        top_k: Experts per token, at most those in the groups kept.
        bias_E: (E,) float32 or None.
        n_group: Number of groups of experts in a row.
        topk_group: Groups that a token may use.
        renormalize: Weights sum to `scale`.
        scale: The paper's routed scaling factor.

    Returns:
        Routing; scores are the plain sigmoids divided by their sum over all E, as the sequence loss takes them.

    Raises:
        ConfigError: E does not divide into the groups, or top_k experts do not fit into the groups kept.
    """
    check_groups(logits_TE.shape[-1], top_k, n_group, topk_group)
    logits_TE = at_least_fp32(logits_TE)
    sigmoids_TE = torch.sigmoid(logits_TE)
    biased_TE = sigmoids_TE if bias_E is None else sigmoids_TE + bias_E
    ids_TK = _within_best_groups(biased_TE, n_group, topk_group).topk(top_k, dim=-1).indices
    weights_TK = sigmoids_TE.gather(-1, ids_TK)
    if renormalize:
        weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + 1e-20)
    scores_TE = sigmoids_TE / (sigmoids_TE.sum(-1, keepdim=True) + 1e-20)
    return Routing(ids_TK, weights_TK * scale, logits_TE, scores_TE)


def _within_best_groups(biased_TE: Tensor, n_group: int, topk_group: int) -> Tensor:
    """Set scores outside each token's best groups to -inf; a group counts as the sum of its two highest scores."""
    if topk_group == n_group:
        return biased_TE
    tokens, experts = biased_TE.shape
    grouped = biased_TE.reshape(tokens, n_group, experts // n_group)
    strength_TG = grouped.topk(min(2, experts // n_group), dim=-1).values.sum(-1)
    best = strength_TG.topk(topk_group, dim=-1).indices
    outside_TG = torch.ones_like(strength_TG, dtype=torch.bool).scatter(-1, best, False)
    return grouped.masked_fill(outside_TG.unsqueeze(-1), -torch.inf).flatten(-2)


def check_groups(experts: int, top_k: int, n_group: int, topk_group: int) -> None:
    """Check that the experts divide into groups, and that the groups kept hold top_k experts.

    Raises:
        ConfigError: They do not.
    """
    if n_group < 1 or experts % n_group or not 1 <= topk_group <= n_group:
        raise ConfigError(
            f"router.n_group is {n_group} and router.topk_group {topk_group}: expected a divisor of {experts} experts, "
            "and no more groups kept than there are"
        )
    if not 1 <= top_k <= topk_group * (experts // n_group):
        raise ConfigError(f"top_k is {top_k}: more than the experts in {topk_group} groups, or less than 1")


def updated_bias(bias_E: Tensor, counts_E: Tensor, rate: float = 1e-3) -> Tensor:
    """Return the next selection bias, which balances without a loss: up for idle experts, down for busy ones.

    Call it once per optimizer step, with the counts of every micro-batch and data-parallel rank in that step summed
    (`moeify.routing.losses.expert_counts`).

    Args:
        bias_E: (E,) float32.
        counts_E: (E,) tokens that chose each expert.
        rate: The paper uses 1e-3 for 14.3T tokens, then 0.

    Returns:
        bias + rate * sign(mean(counts) - counts), outside autograd.
    """
    counts_E = counts_E.to(bias_E.dtype)
    return bias_E.detach() + rate * torch.sign(counts_E.mean() - counts_E)


class SigmoidRouter(LinearRouter):
    """Module of `Sigmoid`.

    The selection bias is a float32 buffer that no gradient moves. The layer counts the choices of its training
    forwards, and `moeify.attach_bias_update` makes an optimizer move the bias by them after each step.
    """

    def __init__(self, options: Sigmoid, hidden: int, config: MoEConfig, zeros: Zeros) -> None:
        super().__init__(options, hidden, config, zeros)
        self.options = options
        self.selection_bias: Tensor
        self.register_buffer("selection_bias", zeros(config.experts, dtype=torch.float32))

    def route(self, x_TH: Tensor, context: RoutingContext) -> Routing:
        """Choose experts for tokens to which jitter was applied."""
        return sigmoid_grouped(
            self.logits(x_TH),
            self.config.top_k,
            bias_E=self.selection_bias,
            n_group=self.options.n_group,
            topk_group=self.options.topk_group,
            renormalize=self.config.renormalize,
            scale=self.options.routed_scaling_factor,
        )

    @torch.no_grad()
    def update_bias(self, counts_E: Tensor) -> None:
        """Move the bias by how many tokens chose each expert, (E,)."""
        counts_E = counts_E.to(self.selection_bias.device)
        self.selection_bias.copy_(updated_bias(self.selection_bias, counts_E, self.options.bias_rate))


@dataclass(frozen=True)
class Sigmoid(Router):
    """Sigmoid scores, a limit on groups, and a selection bias.

    Attributes:
        n_group: Groups of experts that the choice is limited to `topk_group` of.
        topk_group: Groups that a token may use.
        routed_scaling_factor: The weights are multiplied by it.
        bias_rate: Step of the selection bias per optimizer step; 0 leaves the bias as it is.
    """

    builds = SigmoidRouter
    selects_by_more = True

    n_group: Count = 1
    topk_group: Count = 1
    routed_scaling_factor: NotNegative = 1.0
    bias_rate: NotNegative = 0.0

    @property
    def updates_bias(self) -> bool:
        """Whether a selection bias is to be moved after each optimizer step."""
        return self.bias_rate > 0

    def check(self, config: MoEConfig) -> None:
        """Check that groups hold whole FFNs, and that the groups kept hold enough experts."""
        check_groups(config.experts, config.top_k, self.n_group, self.topk_group)
        if config.experts % (config.granularity * self.n_group):
            raise ConfigError(
                f"granularity is {config.granularity}: {config.experts} experts do not make up {self.n_group} groups "
                "of whole FFNs"
            )

    def exact(self, config: MoEConfig) -> bool:
        """Return whether the weights of a token sum to 1, in evaluation."""
        return super().exact(config) and self.routed_scaling_factor == 1

    def start(self, config: MoEConfig, hidden: int, path: str) -> dict[str, StartValue]:
        """Return the start values; the bias is zero."""
        bias = StartValue((config.experts,), "F32", lambda: torch.zeros(config.experts))
        return {**super().start(config, hidden, path), "selection_bias": bias}
