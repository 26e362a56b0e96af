"""What `inspect` tells of a checkpoint: FFNs, refusals, and what a conversion would cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moeify.config import MoEConfig
from moeify.conversion.cost import Cost, dense_cost, moe_cost
from moeify.conversion.dense import DenseCheckpoint
from moeify.errors import RefusedError
from moeify.families.table import choose_target
from moeify.passes.ffn import Inspection
from moeify.plan import Plan
from moeify.planning.make_plan import make_plan


@dataclass(frozen=True)
class Summary:
    """What was seen.

    Attributes:
        model_type: The architecture.
        inspection: FFNs and refusals.
        counts: Parameters of each FFN.
        dense: The cost of the model as it is.
        plan: How it would be converted; None when it cannot be.
        moe: The cost after that.
        obstacle: Why it cannot be converted.
    """

    model_type: str
    inspection: Inspection
    counts: tuple[int, ...]
    dense: Cost
    plan: Plan | None = None
    moe: Cost | None = None
    obstacle: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, the form of `inspect --json`."""
        ffns = [
            {
                "name": ffn.name,
                "kind": ffn.kind,
                "activation": ffn.activation,
                "hidden": ffn.hidden,
                "intermediate": ffn.intermediate,
                "parameters": list(ffn.parameters),
                "count_params": count,
            }
            for ffn, count in zip(self.inspection.ffns, self.counts, strict=True)
        ]
        return {
            "model_type": self.model_type,
            "ffns": ffns,
            "refused": [{"name": refusal.name, "reason": refusal.reason} for refusal in self.inspection.refused],
            "cost": {"dense": self.dense._asdict(), "moe": None if self.moe is None else self.moe._asdict()},
            "target": None if self.plan is None else self.plan.target,
            "obstacle": self.obstacle,
        }


def summarize(dense: DenseCheckpoint, config: MoEConfig, layers: str = "all", target: str = "auto") -> Summary:
    """Look at a checkpoint without reading a weight.

    Args:
        dense: The checkpoint.
        config: The conversion to count the cost of.
        layers: Which FFNs.
        target: Which format.
    """
    model, found, cost = dense.model, dense.inspection, dense_cost(dense)
    counts = tuple(sum(model.get_parameter(name).numel() for name in ffn.parameters) for ffn in found.ffns)
    seen = (dense.source.model_type, found, counts, cost)
    try:
        plan = make_plan(model, dense.graph_module, found, config, layers)
    except RefusedError as error:
        return Summary(*seen, obstacle=str(error))
    plan = plan.with_target(choose_target(plan, dense.config, target))
    return Summary(*seen, plan, moe_cost(dense, plan))
