"""Granite 4: state-space and attention layers in turns; a dense one is this format without routed experts.

Its FFN, the shared one of the format, becomes the experts, and the shared one an idle one unless there are shared
experts.
"""

from dataclasses import replace

from moeify.families.base import (
    MLX,
    ROPES_WITH_FACTORS,
    SGLANG,
    TRANSFORMERS,
    VLLM,
    Condition,
    Config,
    Family,
    Fields,
    Gguf,
    Pair,
)
from moeify.families.conditions import SILU, equal
from moeify.families.gated import IDLE, shared_size
from moeify.families.granite import GRANITE_GGUF, granite_fields, granite_keys, granite_shared, granite_tensors
from moeify.families.hybrid import ENDLESS, attends, hub_kinds, mamba_rewrites


def _rotates(config: Config) -> bool:
    return config.get("position_embedding_type") == "rope"


def _keys(config: Config) -> Fields:
    """Return the keys of a GGUF file; llama.cpp's word for rotating at all is another one."""
    return {
        **granite_keys(config),
        "context_length": config["max_position_embeddings"] if _rotates(config) else ENDLESS,
        "rope_scaling_finetuned": _rotates(config),
        "head_count_kv": attends(config, config["layer_types"]),
        "ssm_conv_kernel": config["mamba_d_conv"],
        "ssm_state_size": config["mamba_d_state"],
        "ssm_group_count": config["mamba_n_groups"],
        "ssm_inner_size": config["mamba_expand"] * config["hidden_size"],
        "ssm_time_step_rank": config["mamba_n_heads"],
    }


_LLAMA_CPP = (
    SILU,
    Condition(
        lambda config: config["mamba_expand"] == 2,
        "its states are not twice as wide as the model (mamba_expand), as they are there",
    ),
    Condition(lambda config: config["mamba_conv_bias"], "its convolutions have no bias (mamba_conv_bias)"),
    Condition(lambda config: not config["mamba_proj_bias"], "its projections to states have biases (mamba_proj_bias)"),
)
_ATTENDS_ONLY = replace(
    GRANITE_GGUF,
    conditions=(
        SILU,
        Condition(_rotates, "it has no rotary positions (position_embedding_type), and attention alone"),
    ),
)

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
        "layer_types": hub_kinds(config["layer_types"]),
        "position_embedding_type": "rope" if _rotates(config) else "nope",  # the hub's word, which mlx-lm looks for
    },
    engines=(TRANSFORMERS, VLLM, SGLANG, MLX),
    shared=True,
    notes=(
        Condition(
            lambda config: not _rotates(config) or "mamba" not in hub_kinds(config["layer_types"]),
            "llama.cpp's converter leaves out the rotary positions of a Granite 4 with state-space layers: write a "
            ".gguf file instead",
        ),
    ),
    gguf=Gguf(
        "granitehybrid",
        _keys,
        (*GRANITE_GGUF.rewrites, *mamba_rewrites("model", "mamba")),
        _LLAMA_CPP,
        ropes=ROPES_WITH_FACTORS,
        unless=(lambda config: "mamba" not in hub_kinds(config["layer_types"]), _ATTENDS_ONLY),
    ),
)
