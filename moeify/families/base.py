"""The words in which a native MoE format is described: a family, its dense sources, and what becomes of their tensors.

A family is one file in `moeify/families/targets/`. It says nothing that another one says too: what several share is
here, in `moeify/families/conditions.py` and `moeify/families/attention.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from moeify.config import MoEConfig
from moeify.config.contracts import StartValue
from moeify.errors import CheckpointError
from moeify.plan import Plan, Site
from moeify.routing.logits import router_init

Config: TypeAlias = Mapping[str, Any]
Fields: TypeAlias = dict[str, object]  # of a config.json
# Engines that know a family, by their names in docs/families.md.
TRANSFORMERS, VLLM, SGLANG, LLAMA_CPP, MLX, EXLLAMA, TRT = (
    "transformers", "vLLM", "SGLang", "llama.cpp", "mlx-lm", "exllamav3", "TensorRT-LLM",
)  # fmt: skip


@dataclass(frozen=True)
class Condition:
    """Something that must hold of a dense config, and the words for when it does not."""

    holds: Callable[[Config], bool]
    otherwise: str


@dataclass(frozen=True)
class Rewrite:
    r"""Dense tensors that are stored otherwise.

    Attributes:
        pattern: A regular expression for the whole name.
        parts: What is stored instead, by name (`\\1` is the first group of the pattern), computed from the tensor.
        wide: Stored in float32 whatever the rest is: 16 bits do not hold what is computed.
    """

    pattern: str
    parts: Mapping[str, Callable[[Tensor, Config], Tensor]]
    wide: bool = False


@dataclass(frozen=True)
class Pair:
    """A dense source of a family.

    Attributes:
        conditions: What must hold of its config for the conversion to be exact.
        fields: Config fields that it needs, from its own config.
        rewrites: Its tensors, besides those of FFNs that are converted, that the family stores otherwise.
        added: Tensors that the family has and it lacks, by name, for each layer where that has `{layer}`.
        activation: Of its FFNs, by the name that is found for it; the fields say it to the family.
        only: Why transformers alone computes this pair: "auto" does not take it. Empty if every engine of the family
            does.
    """

    conditions: tuple[Condition, ...] = ()
    fields: Callable[[Config], Fields] = lambda config: {}
    rewrites: tuple[Rewrite, ...] = ()
    added: Mapping[str, Callable[[Config], Tensor]] = field(default_factory=dict)
    activation: str = "silu"
    only: str = ""


@dataclass(frozen=True)
class ExpertWeight:
    """A weight of an expert: some of the projections that moeify stacks in one tensor.

    Attributes:
        stack: The tensor.
        blocks: Which projections.
        turned: What is stored of them for one expert; None for themselves, (out, in).
    """

    stack: str
    blocks: slice
    turned: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True)
class SharedWeight:
    """A weight of the shared experts, which a format holds as one wide FFN.

    Attributes:
        weight: What of each shared expert it holds, next to each other along the intermediate size.
        idle: Intermediate size of the FFN that stands there when there are no shared experts: it is ready to be
            trained, and outputs zeros. None has no such FFN, 0 one as wide as an expert.
        scale: What the down projection is multiplied by.
    """

    weight: ExpertWeight
    idle: int | None
    scale: float = 1.0


GATE, UP, GATE_UP = (ExpertWeight("gate_up_proj", blocks) for blocks in (slice(0, 1), slice(1, 2), slice(2)))
DOWN, UP_ALONE = ExpertWeight("down_proj", slice(1)), ExpertWeight("up_proj", slice(1))
# What starts a tensor that the dense model lacks, from its name on disk, its place and the settings.
Start: TypeAlias = Callable[[str, Site, MoEConfig], StartValue]
Held: TypeAlias = ExpertWeight | SharedWeight | Start


# Rotary scalings that all of llama.cpp computes, and with those for which some of it reads factors of the frequencies.
ROPES = frozenset({"default", "linear", "yarn"})
ROPES_WITH_FACTORS = ROPES | {"llama3", "longrope"}


@dataclass(frozen=True)
class Gguf:
    """How llama.cpp's GGUF holds a family, besides what it holds of every one (see `moeify.families.gguf`).

    Attributes:
        architecture: llama.cpp's name for it.
        keys: What it says of the MoE's config, by the names of the `add_…` methods of `gguf.GGUFWriter`.
        rewrites: Tensors that it stores otherwise than the family; what they are called is the gguf library's matter.
        conditions: What must hold of the MoE's config for llama.cpp to compute what the family does.
        experts: What of each expert of a layer is stacked in one tensor, by the tensor's word.
        ropes: Rotary scalings that llama.cpp computes there.
        windows: Whether llama.cpp has sliding windows there.
        characters: llama.cpp's word for byte-pair encoding of characters there.
        differs: What llama.cpp computes otherwise: "auto" does not take it. Empty if nothing.
        unless: Which configs llama.cpp holds in another form, and that form.
    """

    architecture: str
    keys: Callable[[Config], Fields] = lambda config: {}
    rewrites: tuple[Rewrite, ...] = ()
    conditions: tuple[Condition, ...] = ()
    experts: Mapping[str, ExpertWeight] = field(default_factory=lambda: {"gate": GATE, "up": UP, "down": DOWN})
    ropes: frozenset[str] = ROPES
    windows: bool = False
    characters: str = "llama"
    differs: str = ""
    unless: tuple[Callable[[Config], bool], Gguf] | None = None


@dataclass(frozen=True)
class Family:
    """One native MoE format.

    Attributes:
        model_type: The target's type in `config.json`.
        architecture: The transformers class.
        sources: Dense model types, each with what makes the conversion exact.
        tensors: What the tensors of a layer hold, in order, by their keys on disk with `{layer}`; a key with `{expert}`
            is there for each expert, without it an expert's weight is stacked for all experts.
        fields: Config fields that the MoE adds, from the plan.
        engines: What runs it and renormalizes its weights: "auto" takes the exact family that most engines run.
        dense: Layers that can stay dense: "none", "any", the "first" ones, or the "outer" ones: some at each end.
        router: The router that it has: the word of a file in `moeify/routers/`.
        options: Options of the router that it can hold.
        gated: Whether its experts have a gate.
        renormalizes: Whether it always does; else its config says.
        shared: Whether it holds shared experts: none (0), 1, or any number.
        untied: Some engine wants the output head stored apart from the embedding.
        notes: What its users must know where a condition does not hold, of a dense config.
        gguf: How a GGUF file holds it; None if llama.cpp does not know it, or if that is not written here.
    """

    model_type: str
    architecture: str
    sources: Mapping[str, Pair]
    tensors: Mapping[str, Held]
    fields: Callable[[Plan, Config], Fields]
    engines: tuple[str, ...]
    dense: Literal["none", "any", "first", "outer"] = "none"
    router: str = "softmax"
    options: frozenset[str] = frozenset()
    gated: bool = True
    renormalizes: bool = True
    shared: bool = False
    untied: bool = False
    notes: tuple[Condition, ...] = ()
    gguf: Gguf | None = None

    @property
    def idle(self) -> int | None:
        """Intermediate size of the idle shared expert, 0 for that of an expert; None where there is none."""
        found = [held.idle for held in self.tensors.values() if isinstance(held, SharedWeight)]
        return found[0] if found else None


def router(name: str, site: Site, config: MoEConfig) -> StartValue:
    """Start a router's weight."""
    return replace(config.router.start(config, site.hidden, site.path)["weight"], short=True)


def selection_bias(name: str, site: Site, config: MoEConfig) -> StartValue:
    """Start a bias that moves the selection of experts only."""
    return StartValue((config.experts,), "F32", lambda: torch.zeros(config.experts))


def as_it_is(tensor: Tensor, config: Config) -> Tensor:
    """Store a tensor under another name."""
    return tensor


def random_rows(count: int) -> Start:
    """Return what starts rows with random values, ready to be trained."""

    def start(name: str, site: Site, config: MoEConfig) -> StartValue:
        shape = (count, site.hidden)
        return StartValue(shape, None, lambda: router_init(shape, config.seed, name), short=True)

    return start


def experts(moe: str, gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj") -> dict[str, Held]:
    """Return three weights for each expert."""
    weights = ((gate, GATE), (up, UP), (down, DOWN))
    return {f"{moe}.experts.{{expert}}.{key}.weight": weight for key, weight in weights}


def shared_expert(path: str, idle: int | None = 0, scale: float = 1.0) -> dict[str, Held]:
    """Return three weights for the shared experts at a path."""
    weights = (("gate_proj", GATE), ("up_proj", UP), ("down_proj", DOWN))
    return {f"{path}.{key}.weight": SharedWeight(weight, idle, scale) for key, weight in weights}


def layer_number(site: Site) -> int:
    """Return the number of a site's layer: the first number in its path, as every native source is one stack.

    Raises:
        CheckpointError: The path, of a saved plan, has none.
    """
    for part in site.path.split("."):
        if part.isdecimal() and part.isascii():
            return int(part)
    raise CheckpointError(f"a plan converts {site.path!r}, which is in no numbered layer: make the plan again")


def layer_count(config: Config) -> int:
    """Return the number of layers."""
    return int(config.get("num_hidden_layers") or len(config["layers_block_type"]))


def dense_layers(plan: Plan, config: Config) -> list[int]:
    """Return the numbers of the layers that stay dense."""
    converted = {layer_number(site) for site in plan.sites}
    return [layer for layer in range(layer_count(config)) if layer not in converted]


def first_converted(plan: Plan) -> int:
    """Return the number of the first layer that is converted."""
    return min(map(layer_number, plan.sites))


def expert_size(plan: Plan) -> int:
    """Return the intermediate size of an expert."""
    return plan.sites[0].intermediate // plan.config.granularity


def qwen_fields(plan: Plan) -> Fields:
    """Return the config fields of Qwen's formats and those that followed them."""
    return {
        "num_experts": plan.config.experts,
        "num_experts_per_tok": plan.config.top_k,
        "moe_intermediate_size": expert_size(plan),
        "router_aux_loss_coef": plan.config.aux_loss,
        "output_router_logits": False,
    }


def head_dim(config: Config) -> int:
    """Return the size of an attention head."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def kv_heads(config: Config) -> int:
    """Return the number of key heads."""
    return int(config.get("num_key_value_heads") or config["num_attention_heads"])


def of_full_attention(config: Config) -> Config:
    """Return the fields that layers with full attention have otherwise (`per_layer_config`)."""
    own = config.get("per_layer_config") or {}
    return next((own[layer] for layer in own if config["layer_types"][int(layer)] == "full_attention"), {})


def full_attention(config: Config) -> Config:
    """Return a config as layers with full attention have it: in some formats they have other heads and positions."""
    rope = config.get("rope_parameters") or {}
    return {**config, **of_full_attention(config), "rope_parameters": rope.get("full_attention", rope)}
