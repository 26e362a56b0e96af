"""The native formats that a dense checkpoint can become, as data: key names, config fields, and what must hold.

Each entry is a dense → MoE pair that computes the same function in stock transformers when every condition holds. A
source that fails one is refused with that condition, never converted into something that is only close.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from moeify.config import MoEConfig
from moeify.errors import ConfigError, RefusedError
from moeify.plan import Plan

Config = Mapping[str, Any]
SHARED_WIDTH = 128  # of the shared expert that qwen2_moe insists on; ours outputs zero, so any width is exact


@dataclass(frozen=True)
class Condition:
    """Something that must hold of a dense config, and the words for when it does not."""

    holds: Callable[[Config], bool]
    otherwise: str


def _is(field: str, value: Any, why: str) -> Condition:
    return Condition(lambda config: config.get(field, value) == value, f"its config has {field} ≠ {value}: {why}")


@dataclass(frozen=True)
class Family:
    """One native MoE format.

    Attributes:
        model_type: The target's type in `config.json`.
        architecture: The transformers class.
        sources: Dense model types, each with the conditions under which the conversion is exact.
        router: Key of the router, with `{layer}`.
        gate: Key of an expert's gate projection, with `{layer}` and `{expert}`; `up` and `down` likewise.
        fields: Config fields that the MoE adds, from the plan.
        any_layer: Layers can stay dense.
        shared: Key prefix of the shared expert that the format insists on, or None.
    """

    model_type: str
    architecture: str
    sources: Mapping[str, tuple[Condition, ...]]
    router: str
    gate: str
    up: str
    down: str
    fields: Callable[[Plan, Config], dict[str, Any]]
    any_layer: bool
    shared: str | None = None


# What a native format cannot hold: it routes by top-k softmax without a limit, and trains with its own balancing loss.
_UNSAID = (
    "router", "capacity_factor", "eval_capacity_factor", "shared_experts", "balance", "divide_loss_by_top_k",
    "balance_level", "z_loss", "attach_losses", "jitter", "expert_dropout",
)  # fmt: skip
_DEFAULTS = MoEConfig(1, 1)

_NO_ATTENTION_BIAS = _is("attention_bias", False, "the format has no attention biases")
_NO_MLP_BIAS = _is("mlp_bias", False, "the experts have no biases")
_FULL_ATTENTION = Condition(
    lambda config: all(kind == "full_attention" for kind in config.get("layer_types") or ()),
    "some of its layers use sliding-window attention, which the format cannot say",
)
_NO_SLIDING_WINDOW = _is("sliding_window", None, "the format has no sliding window in this form")
_PLAIN_HEAD_DIM = Condition(
    lambda c: c.get("head_dim") in (None, c["hidden_size"] // c["num_attention_heads"]),
    "its head_dim is not hidden_size / num_attention_heads, which the format takes for granted",
)


def _mixtral_fields(plan: Plan, config: Config) -> dict[str, Any]:
    return {
        "num_local_experts": plan.config.experts,
        "num_experts_per_tok": plan.config.top_k,
        "intermediate_size": plan.sites[0].intermediate // plan.config.granularity,
        "router_aux_loss_coef": plan.config.aux_loss,
        "router_jitter_noise": 0.0,
        "output_router_logits": False,
        "sliding_window": config.get("sliding_window"),
    }


def _qwen_fields(plan: Plan, config: Config) -> dict[str, Any]:
    converted = set(converted_layers(plan))
    return {
        "num_experts": plan.config.experts,
        "num_experts_per_tok": plan.config.top_k,
        "moe_intermediate_size": plan.sites[0].intermediate // plan.config.granularity,
        "norm_topk_prob": plan.config.renormalize,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [i for i in range(config["num_hidden_layers"]) if i not in converted],
        "router_aux_loss_coef": plan.config.aux_loss,
        "output_router_logits": False,
    }


def _qwen2_moe_fields(plan: Plan, config: Config) -> dict[str, Any]:
    qkv_bias = config["model_type"] == "qwen2"
    return {**_qwen_fields(plan, config), "shared_expert_intermediate_size": SHARED_WIDTH, "qkv_bias": qkv_bias}


def _qwen3_moe_fields(plan: Plan, config: Config) -> dict[str, Any]:
    # transformers writes num_local_experts, other engines read num_experts: the config says both
    return {**_qwen_fields(plan, config), "num_local_experts": plan.config.experts}


_QWEN_KEYS = {
    "router": "model.layers.{layer}.mlp.gate.weight",
    "gate": "model.layers.{layer}.mlp.experts.{expert}.gate_proj.weight",
    "up": "model.layers.{layer}.mlp.experts.{expert}.up_proj.weight",
    "down": "model.layers.{layer}.mlp.experts.{expert}.down_proj.weight",
}
_MIXTRAL_MOE = "model.layers.{layer}.block_sparse_moe"

FAMILIES: dict[str, Family] = {
    "mixtral": Family(
        model_type="mixtral",
        architecture="MixtralForCausalLM",
        sources={"llama": (_NO_ATTENTION_BIAS, _NO_MLP_BIAS), "mistral": ()},
        router=_MIXTRAL_MOE + ".gate.weight",
        gate=_MIXTRAL_MOE + ".experts.{expert}.w1.weight",
        up=_MIXTRAL_MOE + ".experts.{expert}.w3.weight",
        down=_MIXTRAL_MOE + ".experts.{expert}.w2.weight",
        fields=_mixtral_fields,
        any_layer=False,
    ),
    "qwen2_moe": Family(
        model_type="qwen2_moe",
        architecture="Qwen2MoeForCausalLM",
        sources={
            "qwen2": (),
            "llama": (_NO_ATTENTION_BIAS, _NO_MLP_BIAS, _PLAIN_HEAD_DIM),
            "mistral": (_NO_SLIDING_WINDOW, _PLAIN_HEAD_DIM),
        },
        **_QWEN_KEYS,
        fields=_qwen2_moe_fields,
        any_layer=True,
        shared="model.layers.{layer}.mlp.shared_expert",
    ),
    "qwen3_moe": Family(
        model_type="qwen3_moe",
        architecture="Qwen3MoeForCausalLM",
        sources={"qwen3": (_FULL_ATTENTION,)},
        **_QWEN_KEYS,
        fields=_qwen3_moe_fields,
        any_layer=True,
    ),
}
MOEIFY = "moeify"


def layer_number(path: str) -> int:
    """Return N of `model.layers.N.…`, the form that every native source has."""
    return int(path.split(".")[2])


def converted_layers(plan: Plan) -> list[int]:
    """Return the numbers of the layers that a plan converts."""
    return [layer_number(site.path) for site in plan.sites]


def choose_target(plan: Plan, config: Config, wanted: str) -> str:
    """Return the checkpoint format to write.

    Args:
        plan: What is converted.
        config: The dense config, defaults filled in.
        wanted: "auto" (the first native family that is exact, else "moeify"), "moeify", or a family's model type.

    Raises:
        ConfigError: there is no such family.
        RefusedError: the wanted family would not be exact; the message says which condition fails.
    """
    if wanted == MOEIFY:
        return MOEIFY
    if wanted == "auto":
        return next((name for name, family in FAMILIES.items() if not why_not(family, plan, config)), MOEIFY)
    if wanted not in FAMILIES:
        raise ConfigError(f"--to {wanted}: expected auto, moeify, {', '.join(FAMILIES)}")
    reason = why_not(FAMILIES[wanted], plan, config)
    if reason:
        raise RefusedError(f"--to {wanted} would not be exact for this {plan.model_type}: {reason}")
    return wanted


def why_not(family: Family, plan: Plan, config: Config) -> str | None:
    """Return the first condition that a source fails for a family, None when the conversion is exact."""
    conditions = family.sources.get(plan.model_type)
    if conditions is None:
        return f"{family.model_type} can be made from {', '.join(family.sources)}"
    for condition in conditions:
        if not condition.holds(config):
            return condition.otherwise
    dense = config["num_hidden_layers"] - len(plan.sites)
    if dense and not family.any_layer:
        return f"{dense} of its layers stay dense, and every layer of {family.model_type} is an MoE"
    if not plan.config.renormalize and not family.any_layer:
        return f"{family.model_type} always renormalises the weights of the chosen experts"
    unsaid = [field for field in _UNSAID if getattr(plan.config, field) != getattr(_DEFAULTS, field)]
    if unsaid:
        value = getattr(plan.config, unsaid[0])
        return f"{family.model_type} has no place for {unsaid[0]} = {value!r}; moeify format holds it"
    return None
