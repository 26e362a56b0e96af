"""What the formats of Granite share: experts stacked in two tensors, and the names of config fields."""

from __future__ import annotations

from moeify.families.attention import HALVES_TO_PAIRS
from moeify.families.base import (
    DOWN,
    GATE_UP,
    ROPES_WITH_FACTORS,
    Condition,
    Config,
    Fields,
    Gguf,
    Held,
    Rewrite,
    SharedWeight,
    expert_size,
    head_dim,
    router,
)
from moeify.families.conditions import NO_ATTENTION_BIAS, SILU
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


def granite_keys(config: Config) -> Fields:
    """Return the keys of a GGUF file."""
    return {
        "vocab_size": config["vocab_size"],
        "rope_dimension_count": head_dim(config),
        "attention_scale": config["attention_multiplier"],  # what llama.cpp calls scales
        "embedding_scale": config["embedding_multiplier"],
        "residual_scale": config["residual_multiplier"],
        "logit_scale": config["logits_scaling"],
        "expert_shared_feed_forward_length": config.get("shared_intermediate_size") or None,
    }


_SHARED = Rewrite(
    r"model\.layers\.(\d+)\.shared_mlp\.input_linear\.weight",
    {
        r"blk.\1.ffn_gate_shexp.weight": lambda tensor, config: tensor.chunk(2)[0],
        r"blk.\1.ffn_up_shexp.weight": lambda tensor, config: tensor.chunk(2)[1],
    },
)
BIASES = Condition(NO_ATTENTION_BIAS.holds, "vLLM and SGLang drop the attention biases in this format")
GRANITE_GGUF = Gguf("granitemoe", granite_keys, (*HALVES_TO_PAIRS, _SHARED), (SILU,), ropes=ROPES_WITH_FACTORS)
