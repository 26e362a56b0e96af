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
    Condition,
    Config,
    Family,
    Fields,
    Gguf,
    Pair,
    Rewrite,
    as_it_is,
    expert_size,
    full_attention,
    kv_heads,
    of_full_attention,
    router,
    shared_expert,
)
from moeify.families.conditions import always, equal
from moeify.families.gated import IDLE
from moeify.plan import Site

_LAYER = "model.layers.{layer}"
_NORM = r"(model\.layers\.\d+)\.pre_feedforward_layernorm\.weight"


def _ones(config: Config) -> Tensor:
    return torch.ones(config["hidden_size"])


def _wide_heads(config: Config) -> Fields:
    """Say in the hub's words, which mlx-lm reads, how large the heads of full attention are."""
    full = of_full_attention(config)
    return {
        "global_head_dim": full.get("head_dim", config["head_dim"]),
        "num_global_key_value_heads": full.get("num_key_value_heads"),
    }


def _no_scale(name: str, site: Site, config: MoEConfig) -> StartValue:
    return StartValue((config.experts,), None, lambda: torch.ones(config.experts), short=True)


def _slides(config: Config) -> list[bool]:
    return [kind == "sliding_attention" for kind in config["layer_types"]]


def _keys(config: Config) -> Fields:
    """Return the keys of a GGUF file: what it says of attention is of full attention, but for the keys of windows."""
    full, size = full_attention(config), config["head_dim"]
    heads, wide = kv_heads(config), kv_heads(full)
    return {
        "head_count_kv": heads if heads == wide else [heads if slides else wide for slides in _slides(config)],
        "rope_dimension_count": full["head_dim"],  # what is not rotated has frequencies of zero
        "rope_dimension_count_swa": size,
        "rope_freq_base_swa": config["rope_parameters"]["sliding_attention"]["rope_theta"],
        "key_length_swa": size,
        "value_length_swa": size,
        "sliding_window": config["sliding_window"],
        "sliding_window_pattern": _slides(config),
        "shared_kv_layers": config["num_kv_shared_layers"],
        "embedding_length_per_layer_input": config["hidden_size_per_layer_input"],
        "expert_feed_forward_length": config["moe_intermediate_size"],
        "final_logit_softcapping": config["final_logit_softcapping"] or 0.0,  # llama.cpp has one if none is said
    }


def _same_heads(config: Config) -> bool:
    """Whether layers differ in their heads as they do in their kinds of attention."""
    own = config.get("per_layer_config") or {}
    full = {str(layer) for layer, slides in enumerate(_slides(config)) if not slides}
    return {str(layer) for layer in own} in (set(), full) and len({str(each) for each in own.values()}) < 2


def _shared_keys_are_near(config: Config) -> bool:
    """Whether layers that share keys take those of the last layer, or of the one before, by their kind of attention."""
    first = config["num_hidden_layers"] - config["num_kv_shared_layers"]
    return not config["num_kv_shared_layers"] or _slides(config)[first - 2 : first] == [True, False]


_LLAMA_CPP = (
    equal("hidden_activation", "gelu_pytorch_tanh", "it computes gelu there"),
    Condition(lambda config: config["use_bidirectional_attention"] != "all", "it looks back only"),
    Condition(
        lambda config: config["rope_parameters"]["sliding_attention"].get("rope_type", "default") == "default",
        "its layers with sliding windows have plain rotary positions there",
    ),
    Condition(_same_heads, "its layers have other heads by their kind of attention only (per_layer_config)"),
    Condition(_shared_keys_are_near, "the last two layers with keys of their own are a sliding and a full one there"),
)
_REWRITES = (
    Rewrite(r"(model\.layers\.\d+\.router)\.scale", {r"\1.proj.scale": as_it_is}),
    Rewrite(r"model\.layers\.(\d+)\.router\.per_expert_scale", {r"blk.\1.ffn_down_exps.scale": as_it_is}),
    Rewrite(r"(model\.layers\.\d+\.layer_scalar)", {r"\1.weight": as_it_is}),
)

_SMALL_EPSILON = Condition(
    lambda config: config["rms_norm_eps"] <= 1e-6,
    "its config has rms_norm_eps > 1e-6: outputs of FFNs are normalized twice in the format, which adds it twice",
)

FAMILY = Family(
    model_type="gemma4_text",
    architecture="Gemma4ForCausalLM",
    sources={
        "gemma4_text": Pair(
            (
                equal("enable_moe_block", False, "it is an MoE already"),
                equal("use_double_wide_mlp", False, "its FFNs have two sizes"),
                _SMALL_EPSILON,
            ),
            rewrites=(
                Rewrite(
                    _NORM,
                    {
                        r"\1.pre_feedforward_layernorm.weight": as_it_is,
                        r"\1.pre_feedforward_layernorm_2.weight": as_it_is,
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
    notes=(
        always(
            "FFN outputs are normalized twice in this format: a relative difference of rms_norm_eps / (2 · mean square)"
        ),
        always("llama.cpp computes GELU with half precision on CPUs, as for dense Gemma 4"),
    ),
    gguf=Gguf(
        "gemma4",
        _keys,
        _REWRITES,
        _LLAMA_CPP,
        {"gate_up": GATE_UP, "down": DOWN},
        ropes=frozenset({"proportional"}),
        windows=True,
        characters="gemma4",
    ),
)
