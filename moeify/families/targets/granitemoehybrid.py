"""Granite 4: state-space and attention layers in turns; a dense one is this format without routed experts.

Its FFN, the shared one of the format, becomes the experts, and the shared one an idle one unless there are shared
experts.
"""

from moeify.families.base import MLX, SGLANG, TRANSFORMERS, VLLM, Config, Family, Pair
from moeify.families.conditions import equal
from moeify.families.gated import IDLE, shared_size
from moeify.families.granite import granite_fields, granite_shared, granite_tensors

# transformers 5 calls them otherwise, and reads both names.
_HUB_NAMES = {"linear_attention": "mamba", "full_attention": "attention"}


def _layer_types(config: Config) -> list[str]:
    return [_HUB_NAMES.get(kind, kind) for kind in config["layer_types"]]


FAMILY = Family(
    model_type="granitemoehybrid",
    architecture="GraniteMoeHybridForCausalLM",
    sources={"granitemoehybrid": Pair((equal("num_local_experts", 0, "it is an MoE already"),))},
    tensors={
        **granite_tensors("model.layers.{layer}.block_sparse_moe"),
        **granite_shared(IDLE),
    },
    fields=lambda plan, config: {
        **granite_fields(plan),
        "shared_intermediate_size": shared_size(plan),
        "layer_types": _layer_types(config),
    },
    engines=(TRANSFORMERS, VLLM, SGLANG, MLX),
    shared=True,
)
