"""What the routers of a model did in the last forward pass."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from moeify.contract.found import FoundLayer
from moeify.errors import MoeifyError
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
        losses: The layer's losses by name, without coefficients.
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
def routing_stats(model: nn.Module) -> dict[str, LayerStats]:
    """Return what each MoE layer did in the last forward pass, by the layer's path; waits for the device.

    transformers' own layers are seen from the first call on, or from `moeify.track_routing(model)` on.

    Raises:
        MoeifyError: No layer has run, or a layer's router logits hold a NaN; the layer is named.
    """
    layers = ran_layers(model, "routing_stats")
    return {path: _stats(layer, layer.record) for path, layer in layers.items() if layer.record is not None}


def _stats(layer: FoundLayer, record: ForwardRecord) -> LayerStats:
    scores_TE, ids_TK, mask_T = record.routing.scores_TE, record.routing.expert_ids_TK, record.mask_T
    counts = expert_counts(ids_TK, scores_TE.shape[-1], mask_T=mask_T).tolist()
    entropy = _mean_entropy(scores_TE if mask_T is None else scores_TE[mask_T])
    if entropy != entropy:
        raise MoeifyError(f"{layer.path}: its router logits hold a NaN; look for what made its input or its weight NaN")
    return LayerStats(
        tokens=scores_TE.shape[0] if mask_T is None else int(mask_T.sum()),
        choices=sum(counts),
        load=tuple(count / max(sum(counts), 1) for count in counts),
        entropy=entropy,
        dropped=0 if record.dropped is None else int(record.dropped),
        losses={name: float(loss) for name, loss in layer.losses().items()},
    )


def _mean_entropy(scores_TE: Tensor) -> float:
    entropy_T = -torch.xlogy(scores_TE, scores_TE).sum(-1)
    return float(entropy_T.sum() / max(len(entropy_T), 1))
