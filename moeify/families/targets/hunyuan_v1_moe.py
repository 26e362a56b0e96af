"""HunYuan MoE: norms of q and k after the rotation, and one shared FFN."""

from moeify.families.base import (
    SGLANG,
    TRANSFORMERS,
    TRT,
    VLLM,
    Family,
    Gguf,
    Pair,
    expert_size,
    experts,
    router,
    shared_expert,
)
from moeify.families.conditions import always

_MOE = "model.layers.{layer}.mlp"

FAMILY = Family(
    model_type="hunyuan_v1_moe",
    architecture="HunYuanMoEV1ForCausalLM",
    sources={"hunyuan_v1_dense": Pair()},
    tensors={f"{_MOE}.gate.wg.weight": router, **experts(_MOE), **shared_expert(f"{_MOE}.shared_mlp")},
    fields=lambda plan, config: {
        "num_experts": plan.config.experts,
        "moe_topk": plan.config.top_k,
        "num_shared_expert": 1,
        "use_mixed_mlp_moe": True,
        "use_qk_norm": True,  # SGLang has none otherwise
        "intermediate_size": expert_size(plan),
        "moe_intermediate_size": expert_size(plan),
        "output_router_logits": False,
    },
    engines=(TRANSFORMERS, VLLM, SGLANG, TRT),
    notes=(always("llama.cpp's converter takes HunYuan's own tokenizer and lists only: write a .gguf file instead"),),
    gguf=Gguf(
        "hunyuan-moe",
        lambda config: {
            "expert_feed_forward_length": config["moe_intermediate_size"],
            "expert_shared_count": config["num_shared_expert"],
            "expert_shared_feed_forward_length": config["intermediate_size"],
        },
    ),
)
