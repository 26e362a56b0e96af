"""DeepSeek-V3: latent attention; a sigmoid router, shared experts."""

from moeify.families.base import EXLLAMA, LLAMA_CPP, MLX, SGLANG, TRANSFORMERS, TRT, VLLM, Family, Pair
from moeify.families.conditions import NO_MLP_BIAS
from moeify.families.sigmoid import OPTIONS, sigmoid_fields, sigmoid_tensors

FAMILY = Family(
    model_type="deepseek_v3",
    architecture="DeepseekV3ForCausalLM",
    sources={"youtu": Pair((NO_MLP_BIAS,))},
    tensors=sigmoid_tensors("model.layers.{layer}.mlp"),
    fields=lambda plan, config: {**sigmoid_fields(plan), "num_nextn_predict_layers": 0},
    engines=(TRANSFORMERS, VLLM, SGLANG, LLAMA_CPP, MLX, EXLLAMA, TRT),
    dense="first",
    router="sigmoid",
    options=OPTIONS,
    renormalizes=False,
    shared=True,
)
