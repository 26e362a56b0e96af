"""LFM2 MoE: short convolutions and attention in turns; a sigmoid router with a selection bias."""

from __future__ import annotations

from moeify.families.base import (
    EXLLAMA,
    LLAMA_CPP,
    MLX,
    SGLANG,
    TRANSFORMERS,
    Config,
    Family,
    Fields,
    Gguf,
    Pair,
    Rewrite,
    as_it_is,
    expert_size,
    experts,
    first_converted,
    router,
    selection_bias,
)
from moeify.families.conditions import ROTARY_KERNEL, always, equal
from moeify.families.hybrid import attends

_MOE = "model.layers.{layer}.feed_forward"


def _keys(config: Config) -> Fields:
    from gguf import ExpertGatingFuncType

    return {
        "head_count_kv": attends(config, config["layer_types"]),
        "expert_feed_forward_length": config["moe_intermediate_size"],
        "expert_gating_func": ExpertGatingFuncType.SIGMOID,
        "leading_dense_block_count": config["num_dense_layers"],
        "vocab_size": config["vocab_size"],
        "shortconv_l_cache": config["conv_L_cache"],
    }


_REWRITES = (
    Rewrite(r"(model\.layers\.\d+\.conv\.conv\.weight)", {r"\1": lambda tensor, config: tensor.squeeze(1)}),
    Rewrite(r"(model\.layers\.\d+\.feed_forward\.expert_bias)", {r"\1.bias": as_it_is}),
)

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
    engines=(TRANSFORMERS, SGLANG, LLAMA_CPP, MLX, EXLLAMA),
    dense="first",
    router="sigmoid",
    options=frozenset({"routed_scaling_factor"}),
    renormalizes=False,
    notes=(always(ROTARY_KERNEL),),
    gguf=Gguf(
        "lfm2moe",
        _keys,
        _REWRITES,
        (
            equal("routed_scaling_factor", 1.0, "it does not scale the output of the experts there"),
            equal("norm_topk_prob", True, "it always renormalizes there"),
        ),
    ),
)
