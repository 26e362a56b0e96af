"""Qwen3.5 MoE: linear and full attention in turns, in every layer one gated shared expert."""

from moeify.families.base import (
    EXLLAMA,
    LLAMA_CPP,
    SGLANG,
    TRANSFORMERS,
    TRT,
    VLLM,
    Family,
    Pair,
    experts,
    qwen_fields,
    router,
)
from moeify.families.gated import gated_shared_expert, shared_size

_MOE = "model.layers.{layer}.mlp"

FAMILY = Family(
    model_type="qwen3_5_moe_text",
    architecture="Qwen3_5MoeForCausalLM",
    sources={"qwen3_5_text": Pair()},
    tensors={f"{_MOE}.gate.weight": router, **experts(_MOE), **gated_shared_expert(_MOE)},
    fields=lambda plan, config: {
        **qwen_fields(plan),
        "shared_expert_intermediate_size": shared_size(plan),
    },
    engines=(TRANSFORMERS, VLLM, SGLANG, LLAMA_CPP, EXLLAMA, TRT),
    shared=True,
)
