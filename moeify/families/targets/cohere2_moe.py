"""Command A MoE: attention and FFN side by side; layers with a sliding window rotate, the others do not."""

from __future__ import annotations

from moeify.families.base import (
    LLAMA_CPP,
    SGLANG,
    TRANSFORMERS,
    Condition,
    Config,
    Family,
    Fields,
    Pair,
    expert_size,
    experts,
    head_dim,
    router,
    shared_expert,
)
from moeify.families.conditions import WHOLE_ROTARY, equal
from moeify.plan import Plan

_MOE = "model.layers.{layer}.mlp"


def _fields(plan: Plan, config: Config) -> Fields:
    return {
        "num_experts": plan.config.experts,
        "num_experts_per_tok": plan.config.top_k,
        "intermediate_size": expert_size(plan),
        "num_shared_experts": plan.config.shared_experts,
        "shared_expert_combination_strategy": "sum",
        "expert_selection_fn": "softmax",
        "norm_topk_prob": True,
        "output_router_logits": False,
    }


def _cohere(config: Config) -> Fields:
    """Every layer of Cohere rotates: each gets a window that no context fills."""
    return {
        "layer_types": ["sliding_attention"] * config["num_hidden_layers"],
        "sliding_window": 2 * config["max_position_embeddings"],
        "head_dim": head_dim(config),
    }


FAMILY = Family(
    model_type="cohere2_moe",
    architecture="Cohere2MoeForCausalLM",
    sources={
        "cohere2": Pair((WHOLE_ROTARY,)),
        "cohere": Pair((equal("use_qk_norm", False, "the format has no norms of q and k"), WHOLE_ROTARY), _cohere),
    },
    tensors={f"{_MOE}.gate.weight": router, **experts(_MOE), **shared_expert(f"{_MOE}.shared_experts", None)},
    fields=_fields,
    engines=(TRANSFORMERS, SGLANG, LLAMA_CPP),
    shared=True,
    notes=(
        Condition(
            lambda config: "sliding_attention" not in (config.get("layer_types") or ()),
            "vLLM has windows that are one token wider than transformers', as for dense Cohere 2",
        ),
    ),
)
