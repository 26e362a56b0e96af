"""ERNIE 4.5 MoE: rotary positions of neighbors, no biases; softmax with a selection bias, shared experts."""

from __future__ import annotations

from dataclasses import replace

from moeify.config import MoEConfig
from moeify.config.contracts import StartValue
from moeify.families.attention import HALVES_TO_PAIRS
from moeify.families.base import (
    EXLLAMA,
    LLAMA_CPP,
    MLX,
    SGLANG,
    TRANSFORMERS,
    VLLM,
    Condition,
    Config,
    Family,
    Fields,
    Gguf,
    Pair,
    expert_size,
    experts,
    first_converted,
    layer_number,
    router,
    selection_bias,
    shared_expert,
)
from moeify.families.conditions import LLAMA_CPP_SCALES, MLX_SCALES, NO_ATTENTION_BIAS, NO_MLP_BIAS, WHOLE_ROTARY, equal
from moeify.plan import Plan, Site

_MOE = "model.layers.{layer}.mlp"


def _bias(name: str, site: Site, config: MoEConfig) -> StartValue:
    start = selection_bias(name, site, config)
    return replace(start, shape=(1, *start.shape), build=lambda: start.build().unsqueeze(0))


def _fields(plan: Plan, config: Config) -> Fields:
    return {
        "moe_num_experts": plan.config.experts,
        "moe_k": plan.config.top_k,
        "moe_intermediate_size": expert_size(plan),
        "moe_num_shared_experts": plan.config.shared_experts,
        "moe_layer_start_index": first_converted(plan),
        "moe_layer_end_index": max(map(layer_number, plan.sites)),
        "moe_layer_interval": 1,
        "moe_use_aux_free": True,
        "router_aux_loss_coef": plan.config.aux_loss,
        "output_router_logits": False,
    }


def _keys(config: Config) -> Fields:
    size, shared = config["moe_intermediate_size"], config["moe_num_shared_experts"]
    return {
        "expert_feed_forward_length": size,
        "expert_shared_count": shared,
        "interleave_moe_layer_step": config["moe_layer_interval"],
        "leading_dense_block_count": config["moe_layer_start_index"],
        "expert_shared_feed_forward_length": size * shared or None,
    }


_OWN_TOKENIZER = Condition(
    lambda config: config["model_type"].startswith("ernie4_5"),
    "llama.cpp's converter takes ERNIE's own tokenizer only: write a .gguf file instead",
)
_TO_THE_END = Condition(
    lambda config: config["moe_layer_end_index"] + 1 == config["num_hidden_layers"],
    "only the first layers can stay dense there",
)


FAMILY = Family(
    model_type="ernie4_5_moe",
    architecture="Ernie4_5_MoeForCausalLM",
    sources={
        "ernie4_5": Pair((equal("use_bias", False, "the experts have no biases"),)),
        "llama": Pair(
            (NO_ATTENTION_BIAS, NO_MLP_BIAS, WHOLE_ROTARY), lambda config: {"use_bias": False}, HALVES_TO_PAIRS
        ),
    },
    tensors={
        f"{_MOE}.gate.weight": router,
        f"{_MOE}.moe_statics.e_score_correction_bias": _bias,
        **experts(_MOE),
        **shared_expert(f"{_MOE}.shared_experts", None),
    },
    fields=_fields,
    engines=(TRANSFORMERS, VLLM, SGLANG, LLAMA_CPP, MLX, EXLLAMA),
    dense="outer",
    shared=True,
    notes=(_OWN_TOKENIZER, LLAMA_CPP_SCALES, MLX_SCALES),
    gguf=Gguf("ernie4_5-moe", _keys, conditions=(_TO_THE_END,)),
)
