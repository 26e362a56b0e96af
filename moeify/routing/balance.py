"""The losses of a layer, from what its router computed and what its settings ask for.

Shape legend: T tokens, E experts, K choices per token.
"""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from moeify.config import MoEConfig
from moeify.routing.losses import (
    deepseek_sequence_loss,
    expert_counts,
    importance_cv2,
    load_balancing_loss,
    load_cv2,
    z_loss,
)
from moeify.routing.record import Routing


def layer_losses(routing: Routing, config: MoEConfig, *, mask_T: Tensor | None, sequences: int) -> dict[str, Tensor]:
    """Return the losses that the settings ask for, by name, without their coefficients.

    Args:
        routing: What the router chose, before capacity: an expert that overflows must count as busy.
        config: The settings.
        mask_T: (T,) bool, False for padding.
        sequences: B, which divides T.

    Returns:
        "balance", "z", or both, or none; each () in the dtype of the scores.
    """
    losses = {}
    if config.aux_loss:
        losses["balance"] = _balance(routing, config, mask_T, sequences)
    if config.z_loss:
        losses["z"] = z_loss(routing.logits_TE, mask_T=mask_T)
    return losses


def weighted_sum(losses: dict[str, Tensor], config: MoEConfig) -> Tensor | None:
    """Return the sum of the losses, each multiplied by its coefficient; None if there are none."""
    coefficients = {"balance": config.aux_loss, "z": config.z_loss}
    terms = [coefficients[name] * loss for name, loss in losses.items()]
    return sum(terms[1:], terms[0]) if terms else None


def _balance(routing: Routing, config: MoEConfig, mask_T: Tensor | None, sequences: int) -> Tensor:
    scores_TE, ids_TK = routing.scores_TE, routing.expert_ids_TK
    match config.balance:
        case "deepseek":
            return deepseek_sequence_loss(scores_TE, config.top_k, mask_T=mask_T, sequences=sequences)
        case "cv2":
            return _variation(routing, config, mask_T)
        case "first_choice":
            ids_TK = ids_TK[:, :1]
    group = dist.group.WORLD if config.balance_level == "global" and dist.is_initialized() else None
    return load_balancing_loss(
        scores_TE,
        ids_TK,
        divide_by_top_k=config.divide_loss_by_top_k,
        mask_T=mask_T,
        sequences=sequences if config.balance_level == "sequence" else 1,
        counts_E=None if group is None else expert_counts(ids_TK, config.experts, mask_T=mask_T, group=group),
    )


def _variation(routing: Routing, config: MoEConfig, mask_T: Tensor | None) -> Tensor:
    importance = importance_cv2(routing.scores_TE, mask_T=mask_T)
    if routing.clean_logits_TE is None or routing.noise_std_TE is None:
        return importance
    return importance + load_cv2(
        routing.clean_logits_TE, routing.logits_TE, routing.noise_std_TE, config.top_k, mask_T=mask_T
    )
