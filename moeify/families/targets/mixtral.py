"""Mixtral: the format for what is a Llama in its attention."""

from dataclasses import replace

from moeify.families import gemma
from moeify.families.attention import HALVES_TO_PAIRS, SPLIT_GATE_UP, SPLIT_QKV
from moeify.families.base import (
    EXLLAMA,
    LLAMA_CPP,
    MLX,
    ROPES_WITH_FACTORS,
    SGLANG,
    TRANSFORMERS,
    TRT,
    VLLM,
    Family,
    Gguf,
    Pair,
    expert_size,
    experts,
    head_dim,
    router,
)
from moeify.families.conditions import (
    ALL_ROTATE,
    CAUSAL,
    CONVERTER_SCALES,
    MLX_SCALES,
    NO_ATTENTION_BIAS,
    NO_MLP_BIAS,
    NO_WINDOW,
    ONE_WINDOW,
    PLAIN_HEAD_DIM,
    SILU,
    WHOLE_ROTARY,
)

_MOE = "model.layers.{layer}.block_sparse_moe"

FAMILY = Family(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    sources={
        "llama": Pair((NO_ATTENTION_BIAS, NO_MLP_BIAS, WHOLE_ROTARY)),
        "mistral": Pair(),
        "ministral": Pair((ONE_WINDOW,)),
        "smollm3": Pair((NO_ATTENTION_BIAS, NO_MLP_BIAS, ALL_ROTATE, ONE_WINDOW)),
        "gemma": Pair(
            (NO_ATTENTION_BIAS, CAUSAL),
            gemma.gelu,
            (gemma.NORMS, gemma.EMBEDDING),
            activation=gemma.ACTIVATION,
            only=gemma.ONLY,
        ),
        "phi3": Pair((WHOLE_ROTARY,), rewrites=(SPLIT_QKV, SPLIT_GATE_UP)),
    },
    tensors={f"{_MOE}.gate.weight": router, **experts(_MOE, "w1", "w3", "w2")},
    fields=lambda plan, config: {
        "num_local_experts": plan.config.experts,
        "num_experts_per_tok": plan.config.top_k,
        "intermediate_size": expert_size(plan),
        "router_aux_loss_coef": plan.config.aux_loss,
        "router_jitter_noise": 0.0,
        "output_router_logits": False,
        "sliding_window": config.get("sliding_window"),
        "head_dim": head_dim(config),  # transformers' check of LongRoPE wants a number
    },
    engines=(TRANSFORMERS, VLLM, SGLANG, LLAMA_CPP, MLX, EXLLAMA, TRT),
    untied=True,
    notes=(
        MLX_SCALES,
        CONVERTER_SCALES,
        NO_WINDOW,
        replace(
            PLAIN_HEAD_DIM, otherwise="mlx-lm and SGLang have no head_dim but hidden_size / num_attention_heads here"
        ),
    ),
    gguf=Gguf(
        "llama",
        lambda config: {"vocab_size": config["vocab_size"], "rope_dimension_count": head_dim(config)},
        HALVES_TO_PAIRS,
        (SILU,),
        ropes=ROPES_WITH_FACTORS,
    ),
)
