"""Granite MoE: a Llama with multipliers."""

from moeify.families import gemma
from moeify.families.attention import scaled_as_usual
from moeify.families.base import LLAMA_CPP, MLX, SGLANG, TRANSFORMERS, VLLM, Family, Pair
from moeify.families.conditions import CAUSAL, NO_MLP_BIAS, PLAIN_HEAD_DIM, WHOLE_ROTARY
from moeify.families.granite import BIASES, GRANITE_GGUF, granite_fields, granite_tensors

FAMILY = Family(
    model_type="granitemoe",
    architecture="GraniteMoeForCausalLM",
    sources={
        "granite": Pair((NO_MLP_BIAS,)),
        "llama": Pair((NO_MLP_BIAS, PLAIN_HEAD_DIM, WHOLE_ROTARY), scaled_as_usual),
        "gemma": Pair(
            (PLAIN_HEAD_DIM, CAUSAL),
            lambda config: {
                **scaled_as_usual(config),
                **gemma.gelu(config),
                "embedding_multiplier": gemma.embedding_scale(config),
            },
            (gemma.NORMS,),
            activation=gemma.ACTIVATION,
            only=gemma.ONLY,
        ),
    },
    tensors=granite_tensors("model.layers.{layer}.block_sparse_moe"),
    fields=lambda plan, config: granite_fields(plan),
    engines=(TRANSFORMERS, VLLM, SGLANG, LLAMA_CPP, MLX),
    notes=(BIASES,),
    gguf=GRANITE_GGUF,
)
