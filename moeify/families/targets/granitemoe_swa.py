"""Granite MoE with sliding windows per layer, attention sinks, and layers without rotary positions."""

from __future__ import annotations

from moeify.families.attention import no_sinks, scaled_as_usual
from moeify.families.base import (
    DOWN,
    GATE_UP,
    TRANSFORMERS,
    Config,
    Family,
    Fields,
    Pair,
    expert_size,
    router,
)
from moeify.families.conditions import NO_MLP_BIAS, PLAIN_ROPE, WHOLE_ROTARY
from moeify.families.granite import granite_fields, granite_shared

_LAYER = "model.layers.{layer}"
_SINKS = {f"{_LAYER}.self_attn.sinks": no_sinks}


def _attention(config: Config) -> Fields:
    count, theta = config["num_hidden_layers"], config["rope_parameters"]["rope_theta"]
    rotates = config.get("no_rope_layers") or [1] * count
    return {
        **scaled_as_usual(config),
        "layer_types": config.get("layer_types") or ["full_attention"] * count,
        "sliding_window": config.get("sliding_window") or config["max_position_embeddings"],
        "layer_rope_theta": [theta if turned else 0 for turned in rotates],
    }


FAMILY = Family(
    model_type="granitemoe_swa",
    architecture="GraniteMoeSWAForCausalLM",
    sources={
        "granite_swa": Pair((NO_MLP_BIAS,)),
        "llama": Pair((NO_MLP_BIAS, PLAIN_ROPE, WHOLE_ROTARY), _attention, added=_SINKS),
        "ministral": Pair((PLAIN_ROPE,), _attention, added=_SINKS),
        "smollm3": Pair((NO_MLP_BIAS, PLAIN_ROPE), _attention, added=_SINKS),
    },
    tensors={
        f"{_LAYER}.block_sparse_moe.router.weight": router,
        f"{_LAYER}.block_sparse_moe.experts.gate_up_proj": GATE_UP,
        f"{_LAYER}.block_sparse_moe.experts.down_proj": DOWN,
        **granite_shared(None),
    },
    fields=lambda plan, config: {
        **granite_fields(plan),
        "shared_intermediate_size": plan.config.shared_experts * expert_size(plan),
    },
    engines=(TRANSFORMERS,),
    shared=True,
)
