"""Qwen2-MoE: biases of q, k and v, sliding windows per layer, any layer can stay dense, one gated shared expert."""

from __future__ import annotations

from dataclasses import replace

from moeify.families.attention import zero_biases
from moeify.families.base import (
    SGLANG,
    TRANSFORMERS,
    TRT,
    VLLM,
    Config,
    Family,
    Fields,
    Gguf,
    Pair,
    dense_layers,
    experts,
    qwen_fields,
    router,
)
from moeify.families.conditions import (
    NO_ATTENTION_BIAS,
    NO_MLP_BIAS,
    NO_SLIDING_WINDOW,
    ONE_WINDOW,
    PLAIN_HEAD_DIM,
    WHOLE_ROTARY,
    always,
    equal,
)
from moeify.families.gated import gated_shared_expert, qwen_keys, shared_size
from moeify.plan import Plan

_MOE = "model.layers.{layer}.mlp"


def _fields(plan: Plan, config: Config) -> Fields:
    return {
        **qwen_fields(plan),
        "shared_expert_intermediate_size": shared_size(plan),
        "norm_topk_prob": plan.config.renormalize,
        "decoder_sparse_step": 1,
        "mlp_only_layers": dense_layers(plan, config),
        "qkv_bias": True,  # vLLM has them whatever this says
    }


_NO_WINDOW: dict[str, object] = {"use_sliding_window": False}
_ADDED = zero_biases("q", "k", "v")

FAMILY = Family(
    model_type="qwen2_moe",
    architecture="Qwen2MoeForCausalLM",
    sources={
        "qwen2": Pair((PLAIN_HEAD_DIM,)),
        "llama": Pair(
            (NO_ATTENTION_BIAS, NO_MLP_BIAS, PLAIN_HEAD_DIM, WHOLE_ROTARY), lambda config: _NO_WINDOW, added=_ADDED
        ),
        "mistral": Pair((NO_SLIDING_WINDOW, PLAIN_HEAD_DIM), lambda config: _NO_WINDOW, added=_ADDED),
        "ministral": Pair(
            (PLAIN_HEAD_DIM,),
            lambda config: {
                "use_sliding_window": True,
                "layer_types": config["layer_types"],
                "sliding_window": config["sliding_window"],
            },
            added=_ADDED,
        ),
        "seed_oss": Pair(
            (
                equal("attention_bias", True, "q, k and v have biases in the format"),
                equal("attention_out_bias", False, "the format has no bias of o_proj"),
                NO_MLP_BIAS,
                PLAIN_HEAD_DIM,
            ),
            lambda config: _NO_WINDOW,
        ),
    },
    tensors={
        f"{_MOE}.gate.weight": router,
        **experts(_MOE),
        **gated_shared_expert(_MOE),
    },
    fields=_fields,
    engines=(TRANSFORMERS, VLLM, SGLANG, TRT),
    dense="any",
    renormalizes=False,
    shared=True,
    untied=True,
    notes=(
        always("llama.cpp and mlx-lm do not renormalize the weights of Qwen2-MoE: they compute something else"),
        replace(ONE_WINDOW, otherwise="vLLM and transformers 4 have a sliding window in all layers here or in none"),
    ),
    gguf=Gguf(
        "qwen2moe",
        qwen_keys,
        differs="llama.cpp does not renormalize the weights of Qwen2-MoE: it computes something else",
    ),
)
