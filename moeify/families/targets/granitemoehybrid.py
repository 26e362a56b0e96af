"""Granite 4: state-space and attention layers in turns; a dense one is this format without routed experts.

Its FFN, the shared one of the format, becomes the experts, and the shared one an idle one unless there are shared
experts.
"""

from moeify.families.base import (
    DOWN,
    GATE_UP,
    LLAMA_CPP,
    MLX,
    SGLANG,
    TRANSFORMERS,
    VLLM,
    Family,
    Pair,
    SharedWeight,
    expert_size,
)
from moeify.families.conditions import equal
from moeify.families.gated import IDLE
from moeify.families.granite import granite_fields, granite_tensors

_LAYER = "model.layers.{layer}"

FAMILY = Family(
    model_type="granitemoehybrid",
    architecture="GraniteMoeHybridForCausalLM",
    sources={"granitemoehybrid": Pair((equal("num_local_experts", 0, "it is an MoE already"),))},
    tensors={
        **granite_tensors(f"{_LAYER}.block_sparse_moe"),
        f"{_LAYER}.shared_mlp.input_linear.weight": SharedWeight(GATE_UP, IDLE),
        f"{_LAYER}.shared_mlp.output_linear.weight": SharedWeight(DOWN, IDLE),
    },
    fields=lambda plan, config: {
        **granite_fields(plan),
        "shared_intermediate_size": plan.config.shared_experts * expert_size(plan) or IDLE,
    },
    engines=(TRANSFORMERS, VLLM, SGLANG, LLAMA_CPP, MLX),
    shared=True,
)
