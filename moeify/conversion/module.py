"""The applier for modules: MoE layers take the places of the dense FFNs of a live model."""

from __future__ import annotations

from collections.abc import Mapping
from operator import attrgetter

from torch import fx, nn
from torch.optim import Optimizer

from moeify.arguments import check_config
from moeify.config import MoEConfig
from moeify.contract.model import prefer_ours, remember
from moeify.conversion.dense import Dense
from moeify.conversion.layout import fill_layer, layer_tensors
from moeify.conversion.optimizer import DenseState
from moeify.conversion.refusals import check_convertible, check_replaceable
from moeify.conversion.rehearsal import rehearse
from moeify.conversion.restructure import restructure
from moeify.plan import Plan
from moeify.planning.make_plan import make_plan
from moeify.tracing.trace import Inputs


def convert(
    model: nn.Module,
    config: MoEConfig,
    layers: str = "all",
    *,
    example_inputs: Inputs | None = None,
    optimizer: Optimizer | None = None,
) -> nn.Module:
    """Replace the dense FFNs of a model by mixtures of experts, in place.

    All checks come before the first change: when this raises, the model is as it was.

    Args:
        model: Any module; its FFNs are found by dataflow, not by name.
        config: Experts, top_k and the rest.
        layers: Which FFNs: "all", "every:2", "last:8", "0,3-7", or a regular expression on their paths.
        example_inputs: Inputs that the forward accepts; None guesses them for a transformers model.
        optimizer: An optimizer of this model: its state follows the weights into the experts, and its groups then hold
            the new parameters instead of the old.

    Returns:
        The same model. `repr` shows the new layers.

    Raises:
        RefusedError: No FFN was found, one cannot be replaced alone, or the optimizer's state cannot follow.
        MoeifyError: The model cannot be traced.
        ConfigError: The selection matches nothing, or an argument is of another kind.
    """
    check_config(config)
    check_convertible(model)
    dense = Dense(model, example_inputs)
    plan = make_plan(model, dense.graph_module, dense.inspection, config, layers)
    check_replaceable(model, plan)
    state = None if optimizer is None else DenseState(optimizer, model, plan)
    rehearse(dense, plan)
    put_layers(model, plan, dense.regions)
    if state is not None:
        state.move_to(model)
    _tell_config(model, plan)
    return model


def put_layers(model: nn.Module, plan: Plan, regions: Mapping[tuple[str, ...], fx.GraphModule]) -> None:
    """Put the layers of a plan in place and fill them, if the model has values.

    Dense weights are let go as soon as their experts have them.

    Args:
        model: The model that the plan was made for.
        plan: What to replace.
        regions: Captured activations by the names of the projections' parameters; needed for custom ones.
    """
    weights = {name: attrgetter(name)(model) for site in plan.sites for name in site.reads}
    restructure(model, plan, regions)
    for site in plan.sites:
        if not weights[site.down.parameter].is_meta:
            fill_layer(model.get_submodule(site.path), layer_tensors(site, plan.config), weights.__getitem__)
        for name in site.parameters:
            del weights[name]


def _tell_config(model: nn.Module, plan: Plan) -> None:
    """Write a plan into a transformers model's config, so that `save_pretrained` makes a moeify checkpoint."""
    if hasattr(getattr(model, "config", None), "to_json_string"):
        prefer_ours(model, plan)
        remember(model.config, plan)
