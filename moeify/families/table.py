"""The native formats that a dense checkpoint can become, as data: key names, config fields, and what must hold.

Each entry is a dense → MoE pair that computes the same function in stock transformers when every condition holds. A
source that fails one is refused with that condition, never converted into something that is only close.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from moeify.config import MoEConfig
from moeify.config.contracts import StartValue
from moeify.errors import ConfigError, RefusedError
from moeify.plan import Plan, Site

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Condition:
    """Something that must hold of a dense config, and the words for when it does not."""

    holds: Callable[[Config], bool]
    otherwise: str


def _is(field: str, value: Any, why: str) -> Condition:
    return Condition(lambda config: config.get(field, value) == value, f"its config has {field} ≠ {value}: {why}")


@dataclass(frozen=True)
class ExpertWeight:
    """A weight of an expert: some of the projections that moeify stacks in one tensor."""

    stack: str
    blocks: slice


GATE, UP, GATE_UP = (ExpertWeight("gate_up_proj", blocks) for blocks in (slice(0, 1), slice(1, 2), slice(2)))
DOWN = ExpertWeight("down_proj", slice(1))
# What starts a tensor that the dense model lacks, from its name on disk, its place and the settings.
Start: TypeAlias = Callable[[str, Site, MoEConfig], StartValue]


def router(name: str, site: Site, config: MoEConfig) -> StartValue:
    """Start a router's weight."""
    return replace(config.router.start(config, site.hidden, site.path)["weight"], short=True)


@dataclass(frozen=True)
class Family:
    """One native MoE format.

    Attributes:
        model_type: The target's type in `config.json`.
        architecture: The transformers class.
        sources: Dense model types, each with the conditions under which the conversion is exact.
        tensors: What the tensors of a layer hold, in order, by their keys on disk with `{layer}`; a key with `{expert}`
            is there for each expert, without it an expert's weight is stacked for all experts.
        fields: Config fields that the MoE adds, from the plan.
        any_layer: Layers can stay dense.
    """

    model_type: str
    architecture: str
    sources: Mapping[str, tuple[Condition, ...]]
    tensors: Mapping[str, ExpertWeight | Start]
    fields: Callable[[Plan, Config], dict[str, Any]]
    any_layer: bool


# What a native format cannot hold: it routes by top-k softmax without a limit, and trains with its own balancing loss.
_UNSAID = (
    "router", "capacity_factor", "eval_capacity_factor", "shared_experts", "balance", "divide_loss_by_top_k",
    "balance_level", "z_loss", "attach_losses", "jitter", "expert_dropout",
)  # fmt: skip

_LANGUAGE_MODEL = Condition(
    lambda config: all(str(name).endswith("ForCausalLM") for name in config.get("architectures") or ()),
    "its architecture is not a language model (…ForCausalLM), and that is what the format holds",
)
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
    converted = {layer_number(site) for site in plan.sites}
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
    return {**_qwen_fields(plan, config), "shared_expert_intermediate_size": _SHARED_SIZE, "qkv_bias": qkv_bias}


def _qwen3_moe_fields(plan: Plan, config: Config) -> dict[str, Any]:
    # transformers writes num_local_experts, other engines read num_experts: the config says both
    return {**_qwen_fields(plan, config), "num_local_experts": plan.config.experts}


_SHARED_SIZE = 128  # of the shared expert that qwen2_moe insists on; ours outputs zero, so any size is exact


def _idle_rows(name: str, site: Site, config: MoEConfig) -> StartValue:
    """Start a projection of the shared expert with random values, ready to be trained."""
    from moeify.routing.logits import router_init  # the command line lists the families, and needs no torch for that

    shape = (_SHARED_SIZE, site.hidden)
    return StartValue(shape, None, lambda: router_init(shape, config.seed, name), short=True)


def _zeros(*shape: int) -> StartValue:
    import torch

    return StartValue(shape, None, lambda: torch.zeros(shape), short=True)


def _tensors(moe: str, gate: str, up: str, down: str) -> dict[str, ExpertWeight | Start]:
    """Return the usual form: a router, and three weights for each expert."""
    weights = {f"{moe}.experts.{{expert}}.{key}.weight": w for key, w in ((gate, GATE), (up, UP), (down, DOWN))}
    return {f"{moe}.gate.weight": router, **weights}


_QWEN_MOE = "model.layers.{layer}.mlp"
_QWEN_TENSORS = _tensors(_QWEN_MOE, "gate_proj", "up_proj", "down_proj")

FAMILIES: dict[str, Family] = {
    "mixtral": Family(
        model_type="mixtral",
        architecture="MixtralForCausalLM",
        sources={"llama": (_NO_ATTENTION_BIAS, _NO_MLP_BIAS), "mistral": ()},
        tensors=_tensors("model.layers.{layer}.block_sparse_moe", "w1", "w3", "w2"),
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
        tensors={
            **_QWEN_TENSORS,
            f"{_QWEN_MOE}.shared_expert.gate_proj.weight": _idle_rows,
            f"{_QWEN_MOE}.shared_expert.up_proj.weight": _idle_rows,
            f"{_QWEN_MOE}.shared_expert.down_proj.weight": lambda _, site, config: _zeros(site.hidden, _SHARED_SIZE),
            f"{_QWEN_MOE}.shared_expert_gate.weight": lambda _, site, config: _zeros(1, site.hidden),
        },
        fields=_qwen2_moe_fields,
        any_layer=True,
    ),
    "qwen3_moe": Family(
        model_type="qwen3_moe",
        architecture="Qwen3MoeForCausalLM",
        sources={"qwen3": (_FULL_ATTENTION,)},
        tensors=_QWEN_TENSORS,
        fields=_qwen3_moe_fields,
        any_layer=True,
    ),
}
MOEIFY = "moeify"


def layer_number(site: Site) -> int:
    """Return the number of a site's layer: the first number in its path, as every native source is one stack."""
    return next(int(part) for part in site.path.split(".") if part.isdigit())


def check_target(wanted: str) -> None:
    """Check the word for a format (see `choose_target`).

    Raises:
        ConfigError: There is no such format.
    """
    words = ("auto", MOEIFY, *FAMILIES)
    if wanted not in words:
        raise ConfigError(f"--to {wanted}: expected {', '.join(words)}")


def choose_target(plan: Plan, config: Config, wanted: str) -> str:
    """Return the checkpoint format to write.

    Args:
        plan: What is converted.
        config: The dense config, defaults filled in.
        wanted: "auto" (the first native family that is exact, else "moeify"), "moeify", or a family's model type.

    Raises:
        ConfigError: There is no such family.
        RefusedError: The wanted family would not be exact; the message says which condition fails.
    """
    check_target(wanted)
    if wanted == MOEIFY:
        return MOEIFY
    if wanted == "auto":
        return next((name for name, family in FAMILIES.items() if not why_not(family, plan, config)), MOEIFY)
    reason = why_not(FAMILIES[wanted], plan, config)
    if reason:
        raise RefusedError(f"--to {wanted} would not be exact for this {plan.model_type}: {reason}")
    return wanted


def why_not(family: Family, plan: Plan, config: Config) -> str | None:
    """Return the first condition that a source fails for a family, None when the conversion is exact."""
    conditions = family.sources.get(plan.model_type)
    if conditions is None:
        return f"{family.model_type} can be made from {', '.join(family.sources)}"
    for condition in (_LANGUAGE_MODEL, *conditions):
        if not condition.holds(config):
            return condition.otherwise
    unnamed = next((site.path for site in plan.sites if not site.gated), None)
    if unnamed:
        return f"its activation at {unnamed} has no name here, so it is not known which projection is the gate"
    dense = config["num_hidden_layers"] - len(plan.sites)
    if dense and not family.any_layer:
        return f"{dense} of its layers stay dense, and every layer of {family.model_type} is an MoE"
    if not plan.config.renormalize and not family.any_layer:
        return f"{family.model_type} always renormalizes the weights of the chosen experts"
    defaults = MoEConfig(1, 1)
    for field in _UNSAID:
        value = getattr(plan.config, field)
        if value != getattr(defaults, field):
            said = getattr(value, "name", value)  # a router's word, and not all of its options
            return f"{family.model_type} has no place for {field} = {said!r}; moeify format holds it"
    return None
