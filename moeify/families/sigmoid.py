"""What the formats share that DeepSeek-V3 began: a sigmoid router with groups, and shared experts that are one FFN."""

from __future__ import annotations

from moeify.families.base import (
    Config,
    Fields,
    Gguf,
    Held,
    expert_size,
    experts,
    first_converted,
    head_dim,
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


def sigmoid_keys(config: Config) -> Fields:
    """Return the keys of a GGUF file."""
    from gguf import ExpertGatingFuncType

    return {
        "expert_gating_func": ExpertGatingFuncType.SIGMOID,
        "expert_feed_forward_length": config["moe_intermediate_size"],
        "expert_shared_count": config["n_shared_experts"],
        "expert_weights_scale": config["routed_scaling_factor"],
        "expert_weights_norm": config["norm_topk_prob"],
        "expert_group_count": config["n_group"],
        "expert_group_used_count": config["topk_group"],
        "leading_dense_block_count": config.get("first_k_dense_replace", 0),
    }


def _glm4_keys(config: Config) -> Fields:
    share = (config.get("rope_parameters") or {}).get("partial_rotary_factor", 0.5)
    return {**sigmoid_keys(config), "rope_dimension_count": int(head_dim(config) * share)}


GLM4_GGUF = Gguf("glm4moe", _glm4_keys)  # Solar Open is one to llama.cpp
