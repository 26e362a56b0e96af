"""Qwen3.5 MoE: linear and full attention in turns, in every layer one gated shared expert."""

from moeify.families.base import (
    EXLLAMA,
    LLAMA_CPP,
    SGLANG,
    TRANSFORMERS,
    TRT,
    VLLM,
    Config,
    Family,
    Fields,
    Pair,
    experts,
    qwen_fields,
    router,
)
from moeify.families.gated import gated_shared_expert, shared_size

_MOE = "model.layers.{layer}.mlp"


def _interval(config: Config) -> Fields:
    """Return how SGLang wants to be told which layers attend to all: by how many layers they are apart."""
    attends = [kind == "full_attention" for kind in config["layer_types"]]
    apart = attends.index(True) + 1 if any(attends) else 0
    regular = apart and all(is_so == (layer % apart == 0) for layer, is_so in enumerate(attends, 1))
    return {"full_attention_interval": apart} if regular else {}


FAMILY = Family(
    model_type="qwen3_5_moe_text",
    architecture="Qwen3_5MoeForCausalLM",
    sources={"qwen3_5_text": Pair()},
    tensors={f"{_MOE}.gate.weight": router, **experts(_MOE), **gated_shared_expert(_MOE)},
    fields=lambda plan, config: {
        **qwen_fields(plan),
        "shared_expert_intermediate_size": shared_size(plan),
        **_interval(config),
    },
    engines=(TRANSFORMERS, VLLM, SGLANG, LLAMA_CPP, EXLLAMA, TRT),
    shared=True,
)
