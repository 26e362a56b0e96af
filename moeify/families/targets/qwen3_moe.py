"""Qwen3-MoE: norms of q and k, and any layer can stay dense."""

from moeify.families.base import (
    EXLLAMA,
    LLAMA_CPP,
    MLX,
    SGLANG,
    TRANSFORMERS,
    TRT,
    VLLM,
    Family,
    Gguf,
    Pair,
    dense_layers,
    experts,
    qwen_fields,
    router,
)
from moeify.families.conditions import FULL_ATTENTION, MLX_SCALES

_MOE = "model.layers.{layer}.mlp"

FAMILY = Family(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    sources={"qwen3": Pair((FULL_ATTENTION,))},
    tensors={f"{_MOE}.gate.weight": router, **experts(_MOE)},
    fields=lambda plan, config: {
        **qwen_fields(plan),
        "num_local_experts": plan.config.experts,  # transformers writes this, other engines read num_experts
        "norm_topk_prob": plan.config.renormalize,
        "decoder_sparse_step": 1,
        "mlp_only_layers": dense_layers(plan, config),
    },
    engines=(TRANSFORMERS, VLLM, SGLANG, LLAMA_CPP, MLX, EXLLAMA, TRT),
    dense="any",
    renormalizes=False,
    untied=True,
    notes=(MLX_SCALES,),
    gguf=Gguf("qwen3moe", lambda config: {"expert_feed_forward_length": config["moe_intermediate_size"]}),
)
