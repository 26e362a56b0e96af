"""GLM-4.5: q, k and v can have biases and norms, heads can rotate in part; a sigmoid router, shared experts.

The target of Qwen2, whose own MoE format several engines compute otherwise.
"""

from moeify.families.attention import PAIRS_TO_HALVES, SPLIT_GATE_UP, SPLIT_QKV, whole_rotary
from moeify.families.base import EXLLAMA, MLX, SGLANG, TRANSFORMERS, TRT, VLLM, Family, Pair, head_dim
from moeify.families.conditions import (
    FULL_ATTENTION,
    LLAMA_CPP_SCALES,
    MLX_SCALES,
    NO_ATTENTION_BIAS,
    NO_MLP_BIAS,
    NO_OUTPUT_BIAS,
    NO_SLIDING_WINDOW,
    always,
)
from moeify.families.sigmoid import GLM4_GGUF, OPTIONS, sigmoid_fields, sigmoid_tensors

FAMILY = Family(
    model_type="glm4_moe",
    architecture="Glm4MoeForCausalLM",
    sources={
        "qwen2": Pair((FULL_ATTENTION,), lambda config: {**whole_rotary(config), "attention_bias": True}),
        "llama": Pair((NO_ATTENTION_BIAS, NO_MLP_BIAS), whole_rotary),
        "mistral": Pair((NO_SLIDING_WINDOW,), whole_rotary),
        "qwen3": Pair((FULL_ATTENTION, NO_OUTPUT_BIAS), lambda config: {**whole_rotary(config), "use_qk_norm": True}),
        "phi3": Pair((NO_SLIDING_WINDOW,), whole_rotary, (SPLIT_QKV, SPLIT_GATE_UP)),
        "glm": Pair(rewrites=(*PAIRS_TO_HALVES, SPLIT_GATE_UP)),
    },
    tensors=sigmoid_tensors("model.layers.{layer}.mlp"),
    fields=lambda plan, config: {
        **sigmoid_fields(plan),
        "head_dim": head_dim(config),  # vLLM and mlx-lm have no default
        "use_qk_norm": False,
        "num_nextn_predict_layers": 0,
    },
    engines=(TRANSFORMERS, VLLM, SGLANG, MLX, EXLLAMA, TRT),
    dense="first",
    router="sigmoid",
    options=OPTIONS,
    renormalizes=False,
    shared=True,
    untied=True,
    notes=(
        always("llama.cpp's converter takes GLM's own tokenizer only: write a .gguf file instead"),
        LLAMA_CPP_SCALES,
        MLX_SCALES,
    ),
    gguf=GLM4_GGUF,
)
