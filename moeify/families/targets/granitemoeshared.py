"""Granite MoE with shared experts."""

from moeify.families.attention import scaled_as_usual
from moeify.families.base import (
    DOWN,
    GATE_UP,
    LLAMA_CPP,
    SGLANG,
    TRANSFORMERS,
    VLLM,
    Family,
    Pair,
    SharedWeight,
    expert_size,
)
from moeify.families.conditions import NO_MLP_BIAS, PLAIN_HEAD_DIM, WHOLE_ROTARY
from moeify.families.granite import granite_fields, granite_tensors

_LAYER = "model.layers.{layer}"

FAMILY = Family(
    model_type="granitemoeshared",
    architecture="GraniteMoeSharedForCausalLM",
    sources={
        "granite": Pair((NO_MLP_BIAS,)),
        "llama": Pair((NO_MLP_BIAS, PLAIN_HEAD_DIM, WHOLE_ROTARY), scaled_as_usual),
    },
    tensors={
        **granite_tensors(f"{_LAYER}.block_sparse_moe"),
        f"{_LAYER}.shared_mlp.input_linear.weight": SharedWeight(GATE_UP, None),
        f"{_LAYER}.shared_mlp.output_linear.weight": SharedWeight(DOWN, None),
    },
    fields=lambda plan, config: {
        **granite_fields(plan),
        "shared_intermediate_size": plan.config.shared_experts * expert_size(plan),
    },
    engines=(TRANSFORMERS, VLLM, SGLANG, LLAMA_CPP),
    shared=True,
)
