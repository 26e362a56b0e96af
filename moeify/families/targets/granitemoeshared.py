"""Granite MoE with shared experts."""

from moeify.families.attention import scaled_as_usual
from moeify.families.base import (
    LLAMA_CPP,
    SGLANG,
    TRANSFORMERS,
    VLLM,
    Family,
    Pair,
    expert_size,
)
from moeify.families.conditions import NO_MLP_BIAS, PLAIN_HEAD_DIM, WHOLE_ROTARY
from moeify.families.granite import BIASES, GRANITE_GGUF, granite_fields, granite_shared, granite_tensors

FAMILY = Family(
    model_type="granitemoeshared",
    architecture="GraniteMoeSharedForCausalLM",
    sources={
        "granite": Pair((NO_MLP_BIAS,)),
        "llama": Pair((NO_MLP_BIAS, PLAIN_HEAD_DIM, WHOLE_ROTARY), scaled_as_usual),
    },
    tensors={
        **granite_tensors("model.layers.{layer}.block_sparse_moe"),
        **granite_shared(None),
    },
    fields=lambda plan, config: {
        **granite_fields(plan),
        "shared_intermediate_size": plan.config.shared_experts * expert_size(plan),
    },
    engines=(TRANSFORMERS, VLLM, SGLANG, LLAMA_CPP),
    shared=True,
    notes=(BIASES,),
    gguf=GRANITE_GGUF,
)
