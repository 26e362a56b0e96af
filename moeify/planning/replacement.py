"""A plan is carried out in a module: MoE layers take the places of its FFNs."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from torch import fx, nn

from moeify.layers.build import build_layer, start_layer
from moeify.layers.model_inputs import connect
from moeify.passes.activation import bind
from moeify.plan import Plan
from moeify.planning.weights import dense_ffn, held

Regions = Mapping[tuple[str, ...], fx.GraphModule]


def apply_plan(model: nn.Module, plan: Plan, regions: Regions, *, fill: bool = True) -> nn.Module:
    """Put an MoE layer at every site of a plan.

    Args:
        model: The model that the plan was made for.
        plan: What to replace.
        regions: Captured activations by the names of the projections' parameters; needed for custom ones.
        fill: Compute the experts from the dense weights; False leaves zeros, for a state dict that is loaded next.
    """
    made = {}
    for site in plan.sites:
        dense = model.get_parameter(site.down.parameter)
        region = bind(regions[site.parameters], partial(held, model)) if site.activation == "custom" else None
        layer = build_layer(site, plan.config, region, dense)
        layer.requires_grad_(any(model.get_parameter(name).requires_grad for name in site.parameters))
        layer.router.requires_grad_(True)  # nobody froze what was not there
        layer.train(model.get_submodule(site.path).training)
        if fill:
            start_layer(layer, site, dense_ffn(site, model.get_parameter))
        for path in _paths_to(model, site.path):
            model.set_submodule(path, layer)
        for path in [alias for through in site.through for alias in _paths_to(model, through)]:
            model.set_submodule(path, nn.Identity())
        made[site.path] = layer
    connect(model, made)
    return model


def _paths_to(model: nn.Module, path: str) -> list[str]:
    """Every path of a module: layers may share it."""
    module = model.get_submodule(path)
    return [other for other, found in model.named_modules(remove_duplicate=False) if found is module]
