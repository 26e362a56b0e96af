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
    expert_size,
    experts,
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
        "num_experts": plan.config.experts,
        "num_experts_per_tok": plan.config.top_k,
        "moe_intermediate_size": expert_size(plan),
        "shared_expert_intermediate_size": shared_size(plan),
        "router_aux_loss_coef": plan.config.aux_loss,
        "output_router_logits": False,
    },
    engines=(TRANSFORMERS, VLLM, SGLANG, LLAMA_CPP, EXLLAMA, TRT),
    shared=True,
)
