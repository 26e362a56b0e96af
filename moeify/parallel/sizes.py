"""The sizes that an estimate needs, of a plan or of the MoE layers that a model has."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace

from moeify.config import MoEConfig
from moeify.contract.found import FoundLayer
from moeify.errors import ConfigError
from moeify.layers import MoELayer
from moeify.parallel.costs import Layer
from moeify.plan import Plan, Site


def planned_layers(plan: Plan) -> tuple[Layer, ...]:
    """Return the MoE layers that a plan makes, equal ones once."""
    return _counted(_of_site(site, plan.config) for site in plan.sites)


def found_layers(layers: Mapping[str, FoundLayer]) -> tuple[Layer, ...]:
    """Return the MoE layers of a model, equal ones once.

    Raises:
        ConfigError: Nothing says how many experts a token of one visits.
    """
    return _counted(_of_found(path, layer) for path, layer in layers.items())


def _counted(layers: Iterable[Layer]) -> tuple[Layer, ...]:
    return tuple(replace(layer, count=count) for layer, count in Counter(layers).items())


def _of_site(site: Site, config: MoEConfig) -> Layer:
    up_rows = sum(rows.count for rows in site.ups) // config.granularity
    intermediate = site.intermediate // config.granularity
    biases = up_rows * site.up_bias + site.hidden * (site.down.bias is not None)
    parameters = site.hidden * (up_rows + intermediate) + biases
    return _set(Layer(1, config.experts, config.top_k, site.hidden, intermediate, up_rows, parameters), config)


def _of_found(path: str, found: FoundLayer) -> Layer:
    if found.top_k is None:
        raise ConfigError(f"{path}: nothing says how many experts a token visits, so its cost cannot be counted")
    tensors = [parameter for part in found.experts for parameter in part.parameters()]
    deepest = max(tensor.dim() for tensor in tensors)
    matrices = sum(tensor.numel() for tensor in tensors if tensor.dim() == deepest)
    layer = Layer(
        count=1,
        experts=found.num_experts,
        top_k=found.top_k,
        hidden=found.hidden,
        intermediate=found.intermediate,
        up_rows=matrices // (found.num_experts * found.hidden) - found.intermediate,
        parameters=sum(tensor.numel() for tensor in tensors) // found.num_experts,
    )
    return _set(layer, found.state.config) if isinstance(found.state, MoELayer) else layer


def _set(layer: Layer, config: MoEConfig) -> Layer:
    return replace(
        layer,
        capacity_factor=config.capacity_factor,
        min_capacity=config.min_capacity,
        balanced=config.router.keeps_capacity,
        slots=config.router.name == "soft",
    )
