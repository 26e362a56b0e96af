"""What the formats share that DeepSeek-V3 began: a sigmoid router with groups, and shared experts that are one FFN."""

from __future__ import annotations

from moeify.families.base import (
    Fields,
    Held,
    expert_size,
    experts,
    first_converted,
    router,
    selection_bias,
    shared_expert,
)
from moeify.plan import Plan

OPTIONS = frozenset({"n_group", "topk_group", "routed_scaling_factor"})


def sigmoid_tensors(moe: str) -> dict[str, Held]:
    """Return the tensors of a layer at `moe`."""
    return {
        f"{moe}.gate.weight": router,
        f"{moe}.gate.e_score_correction_bias": selection_bias,
        **experts(moe),
        **shared_expert(f"{moe}.shared_experts"),
    }


def sigmoid_fields(plan: Plan) -> Fields:
    """Return the config fields."""
    chosen = {name: getattr(plan.config.router, name) for name in sorted(OPTIONS)}
    return {
        "n_routed_experts": plan.config.experts,
        "n_shared_experts": plan.config.shared_experts or 1,
        "num_experts_per_tok": plan.config.top_k,
        "moe_intermediate_size": expert_size(plan),
        "first_k_dense_replace": first_converted(plan),
        "norm_topk_prob": plan.config.renormalize,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "output_router_logits": False,
        **chosen,
    }
