"""What `inspect` tells of a checkpoint: MoE layers, FFNs, refusals, and what a conversion would cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from moeify.config import MoEConfig
from moeify.contract.found import FoundLayer, find_layers
from moeify.conversion.cost import Cost, dense_cost, moe_cost
from moeify.conversion.dense import DenseCheckpoint
from moeify.errors import MoeifyError, RefusedError
from moeify.families.table import FAMILIES, fit_target, why_not
from moeify.passes.ffn import Inspection
from moeify.plan import Plan
from moeify.planning.make_plan import make_plan

_NOTHING = Inspection((), ())


@dataclass(frozen=True)
class Summary:
    """What was seen.

    Attributes:
        model_type: As in `config.json`.
        model: Its structure, without values.
        dense: The cost of the model as it is.
        layers: The MoE layers that it has already, by their paths.
        inspection: The FFNs and refusals.
        plan: How it would be converted; None when it cannot be.
        moe: The cost after that.
        obstacle: Why it cannot be converted.
    """

    model_type: str
    model: nn.Module = field(repr=False)
    dense: Cost
    layers: Mapping[str, FoundLayer]
    inspection: Inspection = _NOTHING
    plan: Plan | None = None
    moe: Cost | None = None
    obstacle: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, the form of `inspect --json`."""
        ffns = []
        for ffn in self.inspection.ffns:
            facts = {name: getattr(ffn, name) for name in ("name", "kind", "activation", "hidden", "intermediate")}
            count = sum(self.model.get_parameter(name).numel() for name in ffn.parameters)
            ffns.append({**facts, "parameters": list(ffn.parameters), "count_params": count})
        return {
            "model_type": self.model_type,
            "moe": [layer.to_dict() for layer in self.layers.values()],
            "ffns": ffns,
            "refused": [{"name": refusal.name, "reason": refusal.reason} for refusal in self.inspection.refused],
            "cost": {"dense": self.dense._asdict(), "moe": None if self.moe is None else self.moe._asdict()},
            "target": None if self.plan is None else self.plan.target,
            "obstacle": self.obstacle,
        }


def summarize(dense: DenseCheckpoint, config: MoEConfig, layers: str = "all", target: str = "auto") -> Summary:
    """Look at a checkpoint, and count what this conversion of it would cost; no weight is read.

    Raises:
        MoeifyError: The model cannot be traced; of one that has MoE layers those are told nevertheless.
    """
    found = find_layers(dense.model)
    seen = Summary(str(dense.source.model_type), dense.model, dense_cost(dense), found)
    try:
        seen = replace(seen, inspection=dense.inspection)
        plan = make_plan(dense.model, dense.graph_module, dense.inspection, config, layers)
    except RefusedError as error:
        return replace(seen, obstacle=str(error))
    except MoeifyError as error:
        if not found:
            raise
        return replace(seen, obstacle=str(error))
    plan = fit_target(plan, dense.config, target)
    return replace(seen, plan=plan, moe=moe_cost(dense, plan))


def native_targets(dense: DenseCheckpoint, layers: str) -> dict[str, str | None]:
    """Return for every native family why a checkpoint cannot become it exactly, None where it can.

    Args:
        dense: The dense checkpoint; no weight is read.
        layers: Which FFNs (see `moeify.planning.selection`).

    Raises:
        MoeifyError: The model cannot be traced, or nothing in it can be converted.
    """
    plan = make_plan(dense.model, dense.graph_module, dense.inspection, MoEConfig(2, 2), layers)
    return {name: why_not(family, plan, dense.config) for name, family in FAMILIES.items()}
