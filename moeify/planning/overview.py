"""What `inspect` tells about a checkpoint: FFNs, refusals, and the cost of a conversion."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from moeify.checkpoint.source import Source
from moeify.config import MoEConfig
from moeify.errors import RefusedError
from moeify.families.table import choose_target
from moeify.passes.ffn import Inspection
from moeify.plan import Plan
from moeify.planning.cost import Cost, dense_cost, moe_cost
from moeify.planning.make import make_plan, survey
from moeify.tracing.skeleton import build_on_meta, full_config
from moeify.tracing.trace import Inputs, trace


@dataclass(frozen=True)
class Overview:
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
    plan: Plan | None
    moe: Cost | None
    obstacle: str | None

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
        refused = [{"name": refusal.name, "reason": refusal.reason} for refusal in self.inspection.refused]
        cost = {"dense": asdict(self.dense), "moe": None if self.moe is None else asdict(self.moe)}
        return {
            "model_type": self.model_type,
            "ffns": ffns,
            "refused": refused,
            "cost": cost,
            "target": None if self.plan is None else self.plan.target,
            "obstacle": self.obstacle,
        }


def dense_side(source: Source, example_inputs: Inputs | None = None) -> tuple[Cost, float]:
    """Return the cost of a dense checkpoint and its bytes per parameter; no weight is read."""
    model = build_on_meta(source.config)
    nbytes = sum(info.nbytes for info in source.tensors.values())
    cost = dense_cost(model, trace(model, example_inputs), nbytes)
    return cost, nbytes / max(cost.parameters, 1)


def overview(
    source: Source,
    config: MoEConfig,
    layers: str = "all",
    target: str = "auto",
    *,
    example_inputs: Inputs | None = None,
) -> Overview:
    """Look at a checkpoint without reading a weight.

    Args:
        source: The opened checkpoint.
        config: The conversion to count the cost of.
        layers: Which FFNs.
        target: Which format.
        example_inputs: Inputs that the forward accepts; None guesses them.
    """
    model = build_on_meta(source.config)
    graph = trace(model, example_inputs)
    found = survey(graph)
    nbytes = sum(info.nbytes for info in source.tensors.values())
    dense = dense_cost(model, graph, nbytes)
    counts = tuple(sum(model.get_parameter(name).numel() for name in ffn.parameters) for ffn in found.inspection.ffns)
    try:
        plan = make_plan(model, found, config, layers)
    except RefusedError as error:
        return Overview(source.model_type, found.inspection, counts, dense, None, None, str(error))
    plan = plan.with_target(choose_target(plan, full_config(source.config), target))
    moe = moe_cost(dense, plan, nbytes / max(dense.parameters, 1))
    return Overview(source.model_type, found.inspection, counts, dense, plan, moe, None)
