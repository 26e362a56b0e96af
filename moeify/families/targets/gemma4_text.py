"""Gemma 4: norms around attention and FFN; beside the dense FFN of each layer, experts with norms of their own.

The experts are the dense FFN, and what stands beside them outputs zeros. The router sees the residual stream after a
norm without weights, divided by the root of the hidden size: its own scale makes that what the FFN sees.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moeify.config import MoEConfig
from moeify.config.contracts import StartValue
from moeify.families.base import (
    DOWN,
    GATE_UP,
    LLAMA_CPP,
    MLX,
    TRANSFORMERS,
    TRT,
    VLLM,
    Config,
    Family,
    Fields,
    Pair,
    Rewrite,
    expert_size,
    router,
    shared_expert,
)
from moeify.families.conditions import always, equal
from moeify.families.gated import IDLE
from moeify.plan import Site

_LAYER = "model.layers.{layer}"
_NORM = r"(model\.layers\.\d+)\.pre_feedforward_layernorm\.weight"


def _as_it_is(tensor: Tensor, config: Config) -> Tensor:
    return tensor


def _ones(config: Config) -> Tensor:
    return torch.ones(config["hidden_size"])


def _wide_heads(config: Config) -> Fields:
    """Say in the hub's words, which mlx-lm reads, how large the heads of full attention are."""
    layers = config.get("per_layer_config") or {}
    overridden = (layers[key] for key in layers if config["layer_types"][int(key)] == "full_attention")
    full: Config = next(overridden, {})
    return {
        "global_head_dim": full.get("head_dim", config["head_dim"]),
        "num_global_key_value_heads": full.get("num_key_value_heads"),
    }


def _no_scale(name: str, site: Site, config: MoEConfig) -> StartValue:
    return StartValue((config.experts,), None, lambda: torch.ones(config.experts), short=True)


FAMILY = Family(
    model_type="gemma4_text",
    architecture="Gemma4ForCausalLM",
    sources={
        "gemma4_text": Pair(
            (
                equal("enable_moe_block", False, "it is an MoE already"),
                equal("use_double_wide_mlp", False, "its FFNs have two sizes"),
            ),
            rewrites=(
                Rewrite(
                    _NORM,
                    {
                        r"\1.pre_feedforward_layernorm.weight": _as_it_is,
                        r"\1.pre_feedforward_layernorm_2.weight": _as_it_is,
                        r"\1.router.scale": lambda tensor, config: tensor * config["hidden_size"] ** 0.5,
                    },
                ),
            ),
            added={f"{_LAYER}.post_feedforward_layernorm_{number}.weight": _ones for number in (1, 2)},
            activation="gelu_tanh",
            fields=_wide_heads,
        )
    },
    tensors={
        f"{_LAYER}.router.proj.weight": router,
        f"{_LAYER}.router.per_expert_scale": _no_scale,
        f"{_LAYER}.experts.gate_up_proj": GATE_UP,
        f"{_LAYER}.experts.down_proj": DOWN,
        **shared_expert(f"{_LAYER}.mlp", IDLE),
    },
    fields=lambda plan, config: {
        "enable_moe_block": True,
        "num_experts": plan.config.experts,
        "top_k_experts": plan.config.top_k,
        "moe_intermediate_size": expert_size(plan),
        "intermediate_size": IDLE,
    },
    engines=(TRANSFORMERS, VLLM, LLAMA_CPP, MLX, TRT),
    notes=(always("llama.cpp computes GELU with half precision on CPUs, as for dense Gemma 4"),),
)
