"""LFM2 MoE: short convolutions and attention in turns; a sigmoid router with a selection bias."""

from moeify.families.base import (
    EXLLAMA,
    LLAMA_CPP,
    MLX,
    SGLANG,
    TRANSFORMERS,
    VLLM,
    Family,
    Pair,
    expert_size,
    experts,
    first_converted,
    router,
    selection_bias,
)

_MOE = "model.layers.{layer}.feed_forward"

FAMILY = Family(
    model_type="lfm2_moe",
    architecture="Lfm2MoeForCausalLM",
    sources={"lfm2": Pair()},
    tensors={
        f"{_MOE}.gate.weight": router,
        f"{_MOE}.expert_bias": selection_bias,
        **experts(_MOE, "w1", "w3", "w2"),
    },
    fields=lambda plan, config: {
        "num_experts": plan.config.experts,
        "num_experts_per_tok": plan.config.top_k,
        "intermediate_size": plan.sites[0].intermediate,
        "moe_intermediate_size": expert_size(plan),
        "num_dense_layers": first_converted(plan),
        "norm_topk_prob": plan.config.renormalize,
        "routed_scaling_factor": getattr(plan.config.router, "routed_scaling_factor", 1.0),
        "use_expert_bias": True,
        "output_router_logits": False,
    },
    engines=(TRANSFORMERS, VLLM, SGLANG, LLAMA_CPP, MLX, EXLLAMA),
    dense="first",
    router="sigmoid",
    options=frozenset({"routed_scaling_factor"}),
    renormalizes=False,
)
