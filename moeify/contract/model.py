"""A converted model of transformers as its tools expect an MoE: config, choice of implementation, outputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from moeify.contract.outputs import ASK, COEFFICIENT, RouterOutputs
from moeify.contract.stock_experts import offer_stock_experts
from moeify.layers import MoELayer
from moeify.layers.implementations import OURS
from moeify.plan import ASK_FOR_MOEIFY, Plan


def keep_contract(model: nn.Module, layers: Mapping[str, MoELayer]) -> None:
    """Let a model that holds MoE layers be taken for an MoE by whoever knows transformers' conventions.

    Its experts follow `set_experts_implementation`, and its outputs hold `router_logits` and `aux_loss` where
    `output_router_logits` asks for them. A model that is not transformers' stays as it is.

    Args:
        model: The model; its layers are in place.
        layers: Those that were put there, by their paths.
    """
    if not _is_pretrained(model):
        return
    offer_stock_experts()
    for path, layer in layers.items():
        owners = _owners(model, path)
        for owner in owners:
            RouterOutputs.watch(owner)
            if not owner._can_set_experts_implementation():
                owner._can_set_experts_implementation = _yes  # of this model: its class stays what it is
        kind = type(owners[-1].config)  # transformers tells the outermost of each kind: T5's stacks have copies
        for experts in (layer.experts, layer.shared_expert):
            if experts is not None:
                experts.config = next(owner.config for owner in owners if type(owner.config) is kind)


def prefer_ours(model: nn.Module, plan: Plan) -> None:
    """Let our operator compute the layers of a plan, in models whose own code has no experts."""
    for site in plan.sites if _is_pretrained(model) else ():
        for owner in _owners(model, site.path):
            if not type(owner)._can_set_experts_implementation():
                owner.config._experts_implementation_internal = OURS


def describe(fields: dict[str, Any], config: Any, plan: Plan) -> dict[str, Any]:
    """Return the `config.json` of a converted model, under the names that transformers' tools look for.

    Args:
        fields: The `config.json` of the dense model.
        config: Its configuration object: where a model has parts, that of the text says it too.
        plan: The conversion.
    """
    text = config.get_text_config()
    parts = [name for name in config.sub_configs if text is not config and getattr(config, name, None) is text]
    inside = {name: {**(fields.get(name) or {}), **_entries(text, plan)} for name in parts}
    return {**fields, **inside, **plan.config_entries, **_entries(config, plan)}


def remember(config: Any, plan: Plan) -> None:
    """Write a plan into a configuration object, so that `save_pretrained` makes a moeify checkpoint."""
    text = config.get_text_config()
    for holder, said in ((config, plan.config_entries | _entries(config, plan)), (text, _entries(text, plan))):
        for name, value in said.items():
            setattr(holder, name, value)


def _entries(config: Any, plan: Plan) -> dict[str, Any]:
    """Return what the configuration of a converted model says of its layers, and what is asked of it.

    Where its class has such a size, the architecture has MoE layers of its own. Those stay as they are, and are built
    from it.
    """
    settings = plan.config
    sizes = {
        "num_experts": settings.experts,
        "num_local_experts": settings.experts,
        "num_experts_per_tok": settings.top_k,
        "moe_intermediate_size": plan.sites[0].intermediate // settings.granularity,
    }
    held = {name: config.attribute_map.get(name, name) for name in sizes}  # two names can be of one field
    known = {held[name] for name in sizes if hasattr(type(config), name) or hasattr(type(config), held[name])}
    own = {name for name in known if vars(config).get(name) is not None}
    return {
        **{name: size for name, size in sizes.items() if held[name] not in own},
        ASK: False,
        COEFFICIENT: settings.aux_loss,
        "experts_implementation": ASK_FOR_MOEIFY,  # of a part too, which can be loaded by itself
    }


def _is_pretrained(module: Any) -> bool:
    return hasattr(module, "set_experts_implementation") and hasattr(getattr(module, "config", None), "to_json_string")


def _owners(model: nn.Module, path: str) -> list[Any]:
    """Return the models of transformers around the module at `path`, the outermost first."""
    steps = path.split(".")
    around = [model.get_submodule(".".join(steps[:count])) for count in range(len(steps) + 1)]
    return [module for module in around if _is_pretrained(module)]


def _yes() -> bool:
    return True
