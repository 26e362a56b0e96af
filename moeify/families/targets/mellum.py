"""Mellum: norms of q and k, sliding windows per layer, and any layer can stay dense."""

from __future__ import annotations

from moeify.families.base import (
    LLAMA_CPP,
    MLX,
    SGLANG,
    TRANSFORMERS,
    VLLM,
    Config,
    Family,
    Fields,
    Pair,
    dense_layers,
    experts,
    qwen_fields,
    router,
)
from moeify.plan import Plan

_MOE = "model.layers.{layer}.mlp"


def _fields(plan: Plan, config: Config) -> Fields:
    dense, rope = dense_layers(plan, config), config["rope_parameters"]
    return {
        **qwen_fields(plan),
        "num_local_experts": plan.config.experts,
        "norm_topk_prob": plan.config.renormalize,
        "num_nextn_predict_layers": 0,  # vLLM adds it up, and transformers' default is null
        "mlp_layer_types": ["dense" if i in dense else "sparse" for i in range(config["num_hidden_layers"])],
        "layer_types": config["layer_types"],
        "rope_parameters": {kind: rope for kind in ("full_attention", "sliding_attention")},
    }


FAMILY = Family(
    model_type="mellum",
    architecture="MellumForCausalLM",
    sources={"qwen3": Pair()},
    tensors={f"{_MOE}.gate.weight": router, **experts(_MOE)},
    fields=_fields,
    engines=(TRANSFORMERS, VLLM, SGLANG, LLAMA_CPP, MLX),
    dense="any",
    renormalizes=False,
    untied=True,
)
