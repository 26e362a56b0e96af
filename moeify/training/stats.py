"""What the routers of a model did in the last forward pass."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
import torch.distributed as dist
from torch import nn

from moeify.contract.found import FoundLayer
from moeify.errors import MoeifyError, told_as
from moeify.layers.forward_record import ForwardRecord
from moeify.routing.losses import expert_counts
from moeify.training.layers_of import ran_layers


@dataclass(frozen=True)
class LayerStats:
    """One layer's routing.

    Attributes:
        tokens: Tokens without padding.
        choices: Pairs of a token and an expert that the router chose, before capacity.
        load: Each expert's share of all choices, before capacity; they sum to 1. Balanced is 1 / experts.
        entropy: Mean entropy of a token's probabilities over the experts, in nats; log(experts) is undecided.
        dropped: Choices above an expert's capacity.
        losses: The layer's losses by name, without coefficients; the mean over ranks.
    """

    tokens: int
    choices: int
    load: tuple[float, ...]
    entropy: float
    dropped: int
    losses: dict[str, float]

    def to_dict(self) -> dict[str, object]:
        """Return the fields as plain data."""
        return asdict(self)


@torch.no_grad()
def routing_stats(model: nn.Module, group: dist.ProcessGroup | None = None) -> dict[str, LayerStats]:
    """Return what each MoE layer did in the last forward pass, by the layer's path; waits for the device.

    transformers' own layers are seen from the first call on, or from `moeify.track_routing(model)` on.

    Args:
        model: Any model with MoE layers, wrapped or not.
        group: Ranks to sum over, which must all call; `torch.distributed.group.WORLD` for all, None for this rank.

    Raises:
        MoeifyError: No layer has run, or a layer's router logits hold a NaN; the layer is named.
    """
    layers = ran_layers(model, "routing_stats")
    return {path: _stats(layer, layer.record, group) for path, layer in layers.items() if layer.record is not None}


def _stats(layer: FoundLayer, record: ForwardRecord, group: dist.ProcessGroup | None) -> LayerStats:
    scores_TE, mask_T, losses = record.routing.scores_TE, record.mask_T, layer.losses()
    counts_E = expert_counts(record.routing.expert_ids_TK, scores_TE.shape[-1], mask_T=mask_T)
    scores_TE = scores_TE if mask_T is None else scores_TE[mask_T]
    entropy = -torch.xlogy(scores_TE, scores_TE).sum()
    dropped = 0 if record.dropped is None else int(record.dropped)
    numbers = [len(scores_TE), dropped, float(entropy), *map(float, losses.values()), *counts_E.tolist()]
    ranks = 1
    if group is not None:
        together = torch.tensor(numbers, dtype=torch.float64, device=scores_TE.device)
        with told_as(f"{layer.path}: rank {dist.get_rank()} could not sum its statistics with the other ranks"):
            dist.all_reduce(together, group=group)
        numbers, ranks = together.tolist(), dist.get_world_size(group)
    tokens, dropped, total, *values = numbers
    if total != total:
        raise MoeifyError(f"{layer.path}: its router logits hold a NaN; look for what made its input or its weight NaN")
    counts = values[len(losses) :]
    return LayerStats(
        tokens=int(tokens),
        choices=int(sum(counts)),
        load=tuple(count / max(sum(counts), 1) for count in counts),
        entropy=total / max(tokens, 1),
        dropped=int(dropped),
        losses={name: value / ranks for name, value in zip(losses, values, strict=False)},
    )
