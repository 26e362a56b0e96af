"""What the formats of Granite share: experts stacked in two tensors, and the names of config fields."""

from __future__ import annotations

from moeify.families.base import DOWN, GATE_UP, Fields, Held, SharedWeight, expert_size, router
from moeify.plan import Plan


def granite_tensors(moe: str) -> dict[str, Held]:
    """Return the tensors of a layer at `moe`."""
    return {
        f"{moe}.router.layer.weight": router,
        f"{moe}.input_linear.weight": GATE_UP,
        f"{moe}.output_linear.weight": DOWN,
    }


def granite_shared(idle: int | None) -> dict[str, Held]:
    """Return the tensors of the shared experts beside them; see `SharedWeight` for `idle`."""
    path = "model.layers.{layer}.shared_mlp"
    return {
        f"{path}.input_linear.weight": SharedWeight(GATE_UP, idle),
        f"{path}.output_linear.weight": SharedWeight(DOWN, idle),
    }


def granite_fields(plan: Plan) -> Fields:
    """Return the config fields."""
    return {
        "num_local_experts": plan.config.experts,
        "num_experts_per_tok": plan.config.top_k,
        "intermediate_size": expert_size(plan),
        "router_aux_loss_coef": plan.config.aux_loss,
        "output_router_logits": False,
    }
