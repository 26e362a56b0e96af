"""What the formats of models with state-space layers share: kinds of layers by the hub's words, and Mamba 2 in GGUF."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from moeify.families.base import Config, Fields, Rewrite, kv_heads

_HUB_WORDS = {"linear_attention": "mamba", "full_attention": "attention"}
_MAMBA = r"(model\.layers\.\d+\.mamba)"


def hub_kinds(kinds: Iterable[str]) -> list[str]:
    """Return kinds of layers by the hub's words, which engines read; transformers 5 has others, and reads both."""
    return [_HUB_WORDS.get(kind, kind) for kind in kinds]


def decay(tensor: Tensor) -> Tensor:
    """Return what llama.cpp has in place of the logarithm of a state's decay."""
    return -tensor.float().exp()


def mamba_keys(config: Config) -> Fields:
    """Return the keys of a GGUF file for layers in `layer_types` that are a state space, and for those that attend."""
    heads = kv_heads(config)
    return {
        "head_count_kv": [heads if kind == "attention" else 0 for kind in hub_kinds(config["layer_types"])],
        "ssm_conv_kernel": config["mamba_d_conv"],
        "ssm_state_size": config["mamba_d_state"],
        "ssm_group_count": config["mamba_n_groups"],
        "ssm_inner_size": config["mamba_expand"] * config["hidden_size"],
        "ssm_time_step_rank": config["mamba_n_heads"],
    }


MAMBA_REWRITES = (
    Rewrite(rf"{_MAMBA}\.A_log", {r"\1.A_log": lambda tensor, config: decay(tensor).unsqueeze(-1)}),
    Rewrite(rf"{_MAMBA}\.D", {r"\1.D": lambda tensor, config: tensor.unsqueeze(-1)}),
    Rewrite(rf"{_MAMBA}\.dt_bias", {r"\1.dt_proj.bias": lambda tensor, config: tensor}),
    Rewrite(rf"{_MAMBA}\.conv1d\.weight", {r"\1.conv1d.weight": lambda tensor, config: tensor.squeeze(1)}),
    Rewrite(
        rf"{_MAMBA}\.norm\.weight",
        {r"\1.norm.weight": lambda tensor, config: tensor.reshape(config["mamba_n_groups"], -1)},
    ),
)
