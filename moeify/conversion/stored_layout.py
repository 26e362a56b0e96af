"""The tensors of a new MoE layer as a checkpoint stores them: under the layer's own names, or in a native format."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby

import torch
from torch import Tensor

from moeify.config import MoEConfig
from moeify.conversion.layout import LayerTensor, StartTensor, layer_tensors, routed_experts, stacked
from moeify.families.table import FAMILIES, MOEIFY, Added, Family, Role, layer_number
from moeify.plan import Plan, Site
from moeify.routers.base import StartValue
from moeify.routing.logits import router_init

_WEIGHTS = {
    Role.GATE: ("gate_up_proj", slice(0, 1)),
    Role.UP: ("gate_up_proj", slice(1, 2)),
    Role.GATE_UP: ("gate_up_proj", slice(None)),
    Role.DOWN: ("down_proj", slice(None)),
}


def stored_tensors(plan: Plan, site: Site) -> Iterator[LayerTensor]:
    """Describe the tensors that a checkpoint of the plan's target holds for a site, in order, by their full names."""
    if plan.target != MOEIFY:
        return _native_tensors(FAMILIES[plan.target], site, plan.config)
    return (replace(tensor, name=f"{site.path}.{tensor.name}") for tensor in layer_tensors(site, plan.config))


def _native_tensors(family: Family, site: Site, config: MoEConfig) -> Iterator[LayerTensor]:
    experts, layer = routed_experts(site, config), layer_number(site)
    for apart, entries in groupby(family.tensors.items(), key=lambda entry: "{expert}" in entry[0]):
        keys = list(entries)
        for expert in range(config.experts) if apart else (None,):
            for key, holds in keys:
                name = key.format(layer=layer, expert=expert)
                if isinstance(holds, Added):
                    yield StartTensor(name, _added(holds, name, site, config))
                elif holds is Role.ROUTER:
                    yield StartTensor(name, config.router.start(config, site.hidden, site.path)["weight"])
                else:
                    weight, blocks = _WEIGHTS[holds]
                    chosen = experts if expert is None else experts[expert : expert + 1]
                    stack = stacked(name, [blocks_of[weight][blocks] for blocks_of in chosen], routed=True)
                    yield stack if expert is None else replace(stack, shape=stack.shape[1:])


def _added(added: Added, name: str, site: Site, config: MoEConfig) -> StartValue:
    shape = added.shape(site.hidden)

    def build() -> Tensor:
        return router_init(shape, config.seed, name) if added.drawn else torch.zeros(shape)

    return StartValue(shape, None, build)
