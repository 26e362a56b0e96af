"""What `inspect` tells of a checkpoint: FFNs, refusals, and what a conversion would cost."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from moeify.config import MoEConfig
from moeify.conversion.cost import Cost, dense_cost, moe_cost
from moeify.conversion.dense import DenseCheckpoint
from moeify.errors import RefusedError
from moeify.families.table import choose_target
from moeify.plan import Plan
from moeify.planning.make_plan import make_plan


@dataclass(frozen=True)
class Summary:
    """What was seen.

    Attributes:
        checkpoint: The checkpoint, with its FFNs and refusals.
        dense: The cost of the model as it is.
        plan: How it would be converted; None when it cannot be.
        moe: The cost after that.
        obstacle: Why it cannot be converted.
    """

    checkpoint: DenseCheckpoint
    dense: Cost
    plan: Plan | None = None
    moe: Cost | None = None
    obstacle: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, the form of `inspect --json`."""
        found, model = self.checkpoint.inspection, self.checkpoint.model
        ffns = []
        for ffn in found.ffns:
            facts = {name: getattr(ffn, name) for name in ("name", "kind", "activation", "hidden", "intermediate")}
            count = sum(model.get_parameter(name).numel() for name in ffn.parameters)
            ffns.append({**facts, "parameters": list(ffn.parameters), "count_params": count})
        return {
            "model_type": self.checkpoint.source.model_type,
            "ffns": ffns,
            "refused": [{"name": refusal.name, "reason": refusal.reason} for refusal in found.refused],
            "cost": {"dense": self.dense._asdict(), "moe": None if self.moe is None else self.moe._asdict()},
            "target": None if self.plan is None else self.plan.target,
            "obstacle": self.obstacle,
        }


def summarize(dense: DenseCheckpoint, config: MoEConfig, layers: str = "all", target: str = "auto") -> Summary:
    """Look at a checkpoint, and count what this conversion of it would cost; no weight is read."""
    cost = dense_cost(dense)
    try:
        plan = make_plan(dense.model, dense.graph_module, dense.inspection, config, layers)
    except RefusedError as error:
        return Summary(dense, cost, obstacle=str(error))
    plan = replace(plan, target=choose_target(plan, dense.config, target))
    return Summary(dense, cost, plan, moe_cost(dense, plan))
