"""The structure of a plan is put into a module: layers with zero weights, for whoever fills them next."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from operator import attrgetter

from torch import Tensor, fx, nn

from moeify.contract.model import keep_contract
from moeify.layers.build import layer_in
from moeify.layers.model_inputs import connect
from moeify.passes.matching.region import bind
from moeify.plan import Plan


def restructure(model: nn.Module, plan: Plan, regions: Mapping[tuple[str, ...], fx.GraphModule]) -> nn.Module:
    """Put an MoE layer with zero weights at every site of a plan, in place, and return the model.

    Args:
        model: The model that the plan was made for.
        plan: What to replace.
        regions: Captured activations by the names of the projections' parameters; needed for custom ones.
    """
    layers = {}
    for site in plan.sites:
        region = bind(regions[site.parameters], partial(read, model)) if site.activation == "custom" else None
        layer = layer_in(model, site, plan, region)
        layers[site.path] = layer.train(model.get_submodule(site.path).training)
        for path in _paths_to(model, site.path):
            model.set_submodule(path, layer)
        for path in [alias for bypassed in site.bypassed for alias in _paths_to(model, bypassed)]:
            model.set_submodule(path, nn.Identity())
    connect(model, layers)
    keep_contract(model, layers)
    return model


def read(root: nn.Module, name: str) -> Tensor:
    """Return a parameter or buffer by its name."""
    tensor: Tensor = attrgetter(name)(root)
    return tensor


def _paths_to(model: nn.Module, path: str) -> list[str]:
    """Return every path of a module: layers may share it."""
    module = model.get_submodule(path)
    return [other for other, found in model.named_modules(remove_duplicate=False) if found is module]
