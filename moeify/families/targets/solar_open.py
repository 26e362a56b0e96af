"""Solar Open: a Llama with a sigmoid router and shared experts in every layer."""

from moeify.families.attention import whole_rotary
from moeify.families.base import EXLLAMA, LLAMA_CPP, MLX, TRANSFORMERS, VLLM, Family, Pair
from moeify.families.conditions import LLAMA_CPP_SCALES, MLX_SCALES, NO_ATTENTION_BIAS, NO_MLP_BIAS, always
from moeify.families.sigmoid import GLM4_GGUF, OPTIONS, sigmoid_fields, sigmoid_tensors

FAMILY = Family(
    model_type="solar_open",
    architecture="SolarOpenForCausalLM",
    sources={"llama": Pair((NO_ATTENTION_BIAS, NO_MLP_BIAS), whole_rotary)},
    tensors=sigmoid_tensors("model.layers.{layer}.mlp"),
    fields=lambda plan, config: sigmoid_fields(plan),
    engines=(TRANSFORMERS, VLLM, LLAMA_CPP, MLX, EXLLAMA),
    router="sigmoid",
    options=OPTIONS,
    renormalizes=False,
    shared=True,
    untied=True,
    notes=(
        always("llama.cpp's converter takes Solar's own tokenizer only: write a .gguf file instead"),
        LLAMA_CPP_SCALES,
        MLX_SCALES,
    ),
    gguf=GLM4_GGUF,
)
