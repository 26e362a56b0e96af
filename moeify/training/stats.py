"""What the routers of a model did: in the last forward pass, or in all of them since somebody looked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from weakref import ReferenceType, ref

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moeify.contract.found import FoundLayer
from moeify.errors import MoeifyError
from moeify.layers.forward_record import ForwardRecord
from moeify.ranks import told_by_ranks
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
        losses: The layer's losses by name, without coefficients; the mean over ranks and passes.
        logit_size: Root of the mean square of the router logits.
    """

    tokens: int
    choices: int
    load: tuple[float, ...]
    entropy: float
    dropped: int
    losses: dict[str, float]
    logit_size: float = 0.0

    def to_dict(self) -> dict[str, object]:
        """Return the fields as plain data."""
        return asdict(self)


@dataclass(frozen=True)
class _Sums:
    """What adds up over passes and ranks.

    Attributes:
        losses: Names of the losses.
        values: Passes, tokens, dropped choices, entropies, squares of logits, losses, and choices of each expert.
    """

    losses: tuple[str, ...]
    values: Tensor

    def stats(self, path: str, group: dist.ProcessGroup | None) -> LayerStats:
        """Return the numbers over all ranks; waits for the device."""
        if group is not None:
            what = f"{path}: rank {dist.get_rank()} could not sum its statistics with the other ranks"
            with told_by_ranks(what, group):
                dist.all_reduce(self.values, group=group)
        passes, tokens, dropped, entropy, squares, *rest = self.values.tolist()
        if entropy != entropy:
            raise MoeifyError(f"{path}: its router logits hold a NaN; look for what made its input or its weight NaN")
        losses, counts = rest[: len(self.losses)], rest[len(self.losses) :]
        return LayerStats(
            tokens=int(tokens),
            choices=int(sum(counts)),
            load=tuple(count / max(sum(counts), 1) for count in counts),
            entropy=entropy / max(tokens, 1),
            dropped=int(dropped),
            losses={name: value / passes for name, value in zip(self.losses, losses, strict=True)},
            logit_size=(squares / max(tokens * len(counts), 1)) ** 0.5,
        )


class RoutingWindow:
    """What the layers did in several forward passes; nothing waits for the device before `stats`."""

    def __init__(self) -> None:
        self._sums: dict[str, _Sums] = {}
        self._last: dict[str, ReferenceType[Tensor]] = {}

    @torch.no_grad()
    def add(self, model: nn.Module) -> None:
        """Add the last forward pass of each layer, unless it has been added.

        Raises:
            MoeifyError: No layer has run.
        """
        for path, layer in ran_layers(model, "RoutingCallback").items():
            record, last = layer.record, self._last.get(path)
            assert record is not None  # it ran
            if last is not None and last() is record.routing.logits_TE:
                continue
            self._last[path] = ref(record.routing.logits_TE)
            sums, before = _sums(layer, record), self._sums.get(path)
            if before is not None:
                sums.values.add_(before.values)
            self._sums[path] = sums

    def stats(self, group: dist.ProcessGroup | None = None) -> dict[str, LayerStats]:
        """Return the numbers of all passes, and begin anew.

        Args:
            group: As for `routing_stats`.

        Raises:
            MoeifyError: As for `routing_stats`.
        """
        sums, self._sums = self._sums, {}
        return _stats(sums, group)


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
    return _stats({path: _sums(layer, layer.record) for path, layer in layers.items() if layer.record}, group)


def _stats(sums: Mapping[str, _Sums], group: dist.ProcessGroup | None) -> dict[str, LayerStats]:
    return {path: layer.stats(path, group) for path, layer in sums.items()}


def _sums(layer: FoundLayer, record: ForwardRecord) -> _Sums:
    scores_TE, logits_TE, mask_T = record.routing.scores_TE, record.routing.logits_TE, record.mask_T
    device, exact = scores_TE.device, torch.float32 if scores_TE.device.type == "mps" else torch.float64
    counts_E = expert_counts(record.routing.expert_ids_TK, scores_TE.shape[-1], mask_T=mask_T)
    real_T = torch.ones(len(scores_TE), dtype=torch.bool, device=device) if mask_T is None else mask_T.to(device)
    entropy_T, squares_T = -torch.xlogy(scores_TE, scores_TE).sum(-1), logits_TE.to(device).float().square().sum(-1)
    dropped = torch.zeros((), device=device) if record.dropped is None else record.dropped
    losses = layer.losses()
    known = [torch.ones(()), real_T.sum(), dropped, *(of.where(real_T, 0).sum() for of in (entropy_T, squares_T))]
    sums = torch.stack([value.detach().to(device, exact) for value in (*known, *losses.values())])
    return _Sums(tuple(losses), torch.cat([sums, counts_E.to(device, exact)]))
