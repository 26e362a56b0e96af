"""dots.llm1: norms of q and k, sliding windows per layer; a sigmoid router, shared experts."""

from moeify.families.base import EXLLAMA, MLX, TRANSFORMERS, VLLM, Condition, Family, Gguf, Pair, kv_heads
from moeify.families.conditions import NO_OUTPUT_BIAS, NO_WINDOW
from moeify.families.sigmoid import OPTIONS, sigmoid_fields, sigmoid_keys, sigmoid_tensors

FAMILY = Family(
    model_type="dots1",
    architecture="Dots1ForCausalLM",
    sources={"qwen3": Pair((NO_OUTPUT_BIAS,), lambda config: {"layer_types": config["layer_types"]})},
    tensors=sigmoid_tensors("model.layers.{layer}.mlp"),
    fields=lambda plan, config: sigmoid_fields(plan),
    engines=(TRANSFORMERS, VLLM, MLX, EXLLAMA),
    dense="first",
    router="sigmoid",
    options=OPTIONS,
    renormalizes=False,
    shared=True,
    untied=True,
    notes=(NO_WINDOW,),
    gguf=Gguf(
        "dots1",
        sigmoid_keys,
        conditions=(
            Condition(
                lambda config: kv_heads(config) == config["num_attention_heads"],
                "it has as many key heads as query heads there",
            ),
        ),
    ),
)
