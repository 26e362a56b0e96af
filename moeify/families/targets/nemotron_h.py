"""Nemotron-H: state-space, attention and FFN blocks in turns; a sigmoid router, experts with relu² and no gate.

Any FFN block can stay dense. On disk the model is called `backbone`.
"""

from __future__ import annotations

from moeify.families.attention import reordered
from moeify.families.base import (
    DOWN,
    EXLLAMA,
    LLAMA_CPP,
    MLX,
    SGLANG,
    TRANSFORMERS,
    TRT,
    UP_ALONE,
    VLLM,
    Condition,
    Config,
    Family,
    Fields,
    Gguf,
    Pair,
    Rewrite,
    SharedWeight,
    as_it_is,
    expert_size,
    layer_count,
    layer_number,
    router,
    selection_bias,
)
from moeify.families.conditions import NO_MLP_BIAS, equal
from moeify.families.gated import IDLE, shared_size
from moeify.families.hybrid import ENDLESS, attends, hub_kinds, mamba_rewrites
from moeify.families.sigmoid import OPTIONS, sigmoid_keys
from moeify.plan import Plan

_MOE = "backbone.layers.{layer}.mixer"
_PATTERN = "hybrid_override_pattern"  # the hub's, which all read; the kinds as words are others for each
_LETTERS = {"mamba": "M", "attention": "*", "mlp": "-", "moe": "E"}
_KINDS = {letter: kind for kind, letter in _LETTERS.items()}


def _fields(plan: Plan, config: Config) -> Fields:
    converted = {layer_number(site) for site in plan.sites}
    kinds = hub_kinds("moe" if layer in converted else kind for layer, kind in enumerate(config["layers_block_type"]))
    chosen = {name: getattr(plan.config.router, name) for name in sorted(OPTIONS)}
    return {
        "num_hidden_layers": layer_count(config),
        _PATTERN: "".join(_LETTERS.get(kind, "?") for kind in kinds),
        "n_routed_experts": plan.config.experts,
        "n_shared_experts": 1,  # one wide FFN: SGLang multiplies its size by this
        "mamba_n_groups": config["n_groups"],  # as SGLang calls it
        "num_experts_per_tok": plan.config.top_k,
        "moe_intermediate_size": expert_size(plan),
        "moe_shared_expert_intermediate_size": shared_size(plan),
        "moe_latent_size": None,
        "norm_topk_prob": plan.config.renormalize,
        "output_router_logits": False,
        **chosen,
    }


def _kinds(config: Config) -> list[str]:
    return [_KINDS[letter] for letter in config[_PATTERN]]


def _keys(config: Config) -> Fields:
    """Return the keys of a GGUF file: a layer that neither attends nor has an FFN is a state space to llama.cpp."""
    kinds, size = _kinds(config), config["moe_intermediate_size"]
    return {
        **sigmoid_keys(config),
        "expert_gating_func": None,  # llama.cpp has no other there
        "leading_dense_block_count": None,
        "vocab_size": config["vocab_size"],
        "context_length": ENDLESS,
        "rope_dimension_count": config["head_dim"],  # none is rotated
        "rope_scaling_finetuned": False,
        "head_count_kv": attends(config, kinds),
        "feed_forward_length": [size if kind == "moe" else 0 for kind in kinds],
        "expert_shared_feed_forward_length": config["moe_shared_expert_intermediate_size"],
        "layer_norm_eps": config["layer_norm_epsilon"],
        "ssm_conv_kernel": config["conv_kernel"],
        "ssm_state_size": config["ssm_state_size"],
        "ssm_group_count": config["n_groups"],
        "ssm_inner_size": config["mamba_num_heads"] * config["mamba_head_dim"],
        "ssm_time_step_rank": config["mamba_num_heads"],
    }


_LLAMA_CPP = (
    Condition(lambda config: "mlp" not in _kinds(config), "no FFN can stay dense there"),
    equal("use_conv_bias", True, "its convolutions have biases there"),
    equal("use_bias", False, "its projections to states have no biases there"),
    equal("sliding_window", None, "it has no sliding window there"),
)

FAMILY = Family(
    model_type="nemotron_h",
    architecture="NemotronHForCausalLM",
    sources={
        "nemotron_h": Pair(
            (NO_MLP_BIAS,),
            rewrites=(Rewrite(r"model\.(.*)", {r"backbone.\1": as_it_is}),),
            activation="relu2",
        )
    },
    tensors={
        f"{_MOE}.gate.weight": router,
        f"{_MOE}.gate.e_score_correction_bias": selection_bias,
        f"{_MOE}.experts.{{expert}}.up_proj.weight": UP_ALONE,
        f"{_MOE}.experts.{{expert}}.down_proj.weight": DOWN,
        f"{_MOE}.shared_experts.up_proj.weight": SharedWeight(UP_ALONE, IDLE),
        f"{_MOE}.shared_experts.down_proj.weight": SharedWeight(DOWN, IDLE),
    },
    fields=_fields,
    engines=(TRANSFORMERS, VLLM, SGLANG, LLAMA_CPP, MLX, EXLLAMA, TRT),
    dense="any",
    router="sigmoid",
    options=OPTIONS,
    gated=False,
    renormalizes=False,
    shared=True,
    gguf=Gguf(
        "nemotron_h_moe",
        _keys,
        (*mamba_rewrites("backbone", "mixer"), *reordered(r"backbone\.layers\.\d+\.mixer", to_pairs=True)),
        _LLAMA_CPP,
        {"up": UP_ALONE, "down": DOWN},
    ),
)
