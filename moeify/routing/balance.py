"""The losses of a layer, from what its router computed and what its settings ask for.

Shape legend: T tokens, E experts, K choices per token.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from moeify.config import MoEConfig
from moeify.ranks import told_by_ranks
from moeify.routing.losses import (
    deepseek_sequence_loss,
    expert_counts,
    importance_cv2,
    load_balancing_loss,
    load_cv2,
    z_loss,
)
from moeify.routing.record import Routing


@dataclass(frozen=True)
class StepCounts:
    """What the level "global" knows of all ranks.

    Attributes:
        counts_E: Choices of each expert, int64.
        weight: The tokens of this rank by those of a rank on average, in this forward pass, () float: so much does this
            rank count in the mean over ranks, that each token counts as in one process. None on one rank.
    """

    counts_E: Tensor
    weight: Tensor | None = None


def layer_losses(
    routing: Routing, config: MoEConfig, *, mask_T: Tensor | None, sequences: int, step: StepCounts | None = None
) -> dict[str, Tensor]:
    """Return the losses that the settings ask for, by name, without their coefficients.

    Args:
        routing: What the router chose, before capacity: an expert that overflows must count as busy.
        config: The settings.
        mask_T: (T,) bool, False for padding.
        sequences: B, which divides T.
        step: What `step_counts` gave, for the level "global".

    Returns:
        "balance", "z", or both, or none; each () in the dtype of the scores.
    """
    losses = {}
    if config.aux_loss:
        losses["balance"] = _balance(routing, config, mask_T, sequences, step)
    if config.z_loss:
        clean_TE = routing.logits_TE if routing.clean_logits_TE is None else routing.clean_logits_TE
        losses["z"] = _weighed(z_loss(clean_TE, mask_T=mask_T), step)
    return losses


def weighted_sum(losses: dict[str, Tensor], config: MoEConfig, share: float = 1.0) -> Tensor | None:
    """Return the sum of the losses, each multiplied by its coefficient and by `share`; None if there are none."""
    coefficients = {"balance": config.aux_loss * share, "z": config.z_loss * share}
    terms = [coefficients[name] * loss for name, loss in losses.items()]
    return sum(terms[1:], terms[0]) if terms else None


def step_counts(routing: Routing, config: MoEConfig, *, mask_T: Tensor | None, path: str = "") -> StepCounts | None:
    """Return how often the level "global" sees each expert chosen on all ranks, or None at other levels.

    All ranks must call it.

    Raises:
        MoeifyError: A rank has ended or hangs; the layer is named by its path.
    """
    if config.balance_level != "global" or config.balance not in {"topk", "first_choice"}:
        return None
    counts_E = expert_counts(_counted(routing, config), config.experts, mask_T=mask_T)
    if not dist.is_initialized():
        return StepCounts(counts_E)
    tokens = counts_E.new_tensor([routing.scores_TE.shape[0]]) if mask_T is None else mask_T.sum().view(1)
    together = torch.cat([counts_E, tokens])
    with _told(path):
        dist.all_reduce(together)
    return StepCounts(together[:-1], tokens[0].double() * dist.get_world_size() / together[-1].clamp(min=1))


def _told(path: str) -> AbstractContextManager[object]:
    if torch.compiler.is_compiling():
        return nullcontext()
    return told_by_ranks(
        f"{path or 'an MoE layer'}: rank {dist.get_rank()} could not count choices with the other ranks"
    )


def _counted(routing: Routing, config: MoEConfig) -> Tensor:
    """Return the choices that a balanced routing spreads evenly."""
    if config.balance == "first_choice":
        return routing.expert_ids_TK[:, :1]
    if config.router.selects_by_more:
        return routing.scores_TE.topk(config.top_k, dim=-1).indices
    return routing.expert_ids_TK


def _balance(
    routing: Routing, config: MoEConfig, mask_T: Tensor | None, sequences: int, step: StepCounts | None
) -> Tensor:
    match config.balance:
        case "deepseek":
            return deepseek_sequence_loss(routing.scores_TE, config.top_k, mask_T=mask_T, sequences=sequences)
        case "cv2":
            return _variation(routing, config, mask_T)
    loss = load_balancing_loss(
        routing.scores_TE,
        _counted(routing, config),
        divide_by_top_k=config.divide_loss_by_top_k,
        mask_T=mask_T,
        sequences=sequences if config.balance_level == "sequence" else 1,
        counts_E=None if step is None else step.counts_E,
    )
    return _weighed(loss, step)


def _weighed(loss: Tensor, step: StepCounts | None) -> Tensor:
    """Let ranks count by their tokens, where the mean over ranks is to be one process's loss."""
    return loss if step is None or step.weight is None else loss * step.weight.to(loss.dtype)


def _variation(routing: Routing, config: MoEConfig, mask_T: Tensor | None) -> Tensor:
    importance = importance_cv2(routing.scores_TE, mask_T=mask_T)
    if routing.clean_logits_TE is None or routing.noise_std_TE is None:
        return importance
    return importance + load_cv2(
        routing.clean_logits_TE, routing.logits_TE, routing.noise_std_TE, config.top_k, mask_T=mask_T
    )
