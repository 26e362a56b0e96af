"""The structure of a plan is put into a module: layers with zero weights, for whoever fills them next."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from operator import attrgetter

from torch import Tensor, fx, nn

from moeify.contract.model import keep_contract
from moeify.layers.build import layer_in
from moeify.layers.hand_over import HandOver, Slot, tie
from moeify.layers.model_inputs import connect
from moeify.passes.matching.region import bind
from moeify.plan import Plan, Site


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
        slot = Slot() if site.handing else None
        tie(layer, slot=slot, axis=site.axis)
        idle = {path: HandOver(slot, _features(model, site, path), site.axis) if slot and path in site.handing
                else nn.Identity() for path in site.bypassed}  # fmt: skip
        for path, module in {site.path: layer, **idle}.items():
            for alias in _paths_to(model, path):
                model.set_submodule(alias, module)
        _leave_fast_path(model, site)
    connect(model, layers)
    keep_contract(model, layers)
    return model


def read(root: nn.Module, name: str) -> Tensor:
    """Return a parameter or buffer by its name."""
    tensor: Tensor = attrgetter(name)(root)
    return tensor


def _features(model: nn.Module, site: Site, path: str) -> int:
    """Return how many features the up projection at a path writes."""
    held = set(model.get_submodule(path).parameters())
    return next(rows.out_features for rows in site.ups if model.get_parameter(rows.parameter) in held)


def _leave_fast_path(model: nn.Module, site: Site) -> None:
    """Let torch's encoder layer compute its FFN: in evaluation it would give the dense weights to one fused kernel.

    Its encoder makes nested tensors for that kernel, which nothing else takes.
    """
    layer = model.get_submodule(site.path.rpartition(".")[0])
    if isinstance(layer, nn.TransformerEncoderLayer):
        layer.activation_relu_or_gelu = 0
        for encoder in model.modules():
            if isinstance(encoder, nn.TransformerEncoder) and layer in encoder.layers:
                encoder.use_nested_tensor = False


def _paths_to(model: nn.Module, path: str) -> list[str]:
    """Return every path of a module: layers may share it."""
    module = model.get_submodule(path)
    return [other for other, found in model.named_modules(remove_duplicate=False) if found is module]
