"""Granite MoE with sliding windows per layer, attention sinks, and layers without rotary positions."""

from __future__ import annotations

from dataclasses import replace

from moeify.families.attention import no_sinks, scaled_as_usual
from moeify.families.base import (
    DOWN,
    GATE_UP,
    LLAMA_CPP,
    SGLANG,
    TRANSFORMERS,
    VLLM,
    Config,
    Family,
    Fields,
    Pair,
    expert_size,
    router,
)
from moeify.families.conditions import NO_MLP_BIAS, PLAIN_HEAD_DIM, PLAIN_ROPE, WHOLE_ROTARY
from moeify.families.granite import BIASES, granite_fields, granite_shared

_LAYER = "model.layers.{layer}"
_SINKS = {f"{_LAYER}.self_attn.sinks": no_sinks}


def _attention(config: Config) -> Fields:
    """Say the attention of a model without sinks; llama.cpp has no such model without a window, so one spans all."""
    count, theta = config["num_hidden_layers"], config["rope_parameters"]["rope_theta"]
    rotates = config.get("no_rope_layers") or [1] * count
    kinds, longest = config.get("layer_types") or [], config["max_position_embeddings"]
    slides = "sliding_attention" in kinds
    return {
        **scaled_as_usual(config),
        "layer_types": kinds if slides else ["sliding_attention"] * count,
        "sliding_window": config["sliding_window"] if slides else longest,
        "layer_rope_theta": [theta if turned else 0 for turned in rotates],
        "no_rope_layers": rotates,  # llama.cpp's word
    }


FAMILY = Family(
    model_type="granitemoe_swa",
    architecture="GraniteMoeSWAForCausalLM",
    sources={
        "granite_swa": Pair(
            (NO_MLP_BIAS,),
            lambda config: {"no_rope_layers": [int(theta != 0) for theta in config["layer_rope_theta"]]},
        ),
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
    engines=(TRANSFORMERS, VLLM, SGLANG, LLAMA_CPP),
    shared=True,
    notes=(
        replace(BIASES, otherwise="vLLM drops the attention biases in this format"),
        replace(
            PLAIN_HEAD_DIM,
            otherwise="vLLM and llama.cpp's converter have no head_dim but hidden_size / num_attention_heads here",
        ),
    ),
)
