"""The in-place applier: dense FFNs of a live module become `SparseMoE` layers."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from torch import fx, nn
from torch.optim import Optimizer

from moeify.config import MoEConfig
from moeify.errors import MoeifyError, RefusedError
from moeify.layers.batch import connect
from moeify.layers.build import build_layer, start_layer
from moeify.passes.activation import bind
from moeify.plan import Plan
from moeify.planning.live import check_plain, check_replaceable
from moeify.planning.make import Survey, make_plan, survey
from moeify.planning.weights import dense_ffn, held
from moeify.tracing.trace import UNTRACED, Inputs, meta_twin, trace
from moeify.training.carry import take_up

Regions = Mapping[tuple[str, ...], fx.GraphModule]


def convert(
    model: nn.Module,
    config: MoEConfig,
    layers: str = "all",
    *,
    example_inputs: Inputs | None = None,
    optimizer: Optimizer | None = None,
) -> nn.Module:
    """Replace the dense FFNs of a model by sparse mixtures of experts, in place.

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
        RefusedError: no FFN was found, or one cannot be replaced without changing something else, or the optimizer's
            state cannot follow.
        MoeifyError: the model cannot be traced.
        ConfigError: the selection matches nothing.
    """
    check_plain(model)
    found = survey(trace(model, example_inputs))
    plan = make_plan(model, found, config, layers)
    check_replaceable(model, plan)
    carried = None if optimizer is None else take_up(optimizer, model, plan)
    rehearse(model, plan, found, example_inputs)
    apply_plan(model, plan, found.regions)
    if carried is not None:
        carried.hand_over(model)
    remember_plan(model, plan)
    return model


def remember_plan(model: nn.Module, plan: Plan) -> None:
    """Write a plan into a transformers model's config, so that `save_pretrained` makes a moeify checkpoint."""
    if hasattr(getattr(model, "config", None), "to_json_string"):
        for name, value in plan.config_entries.items():
            setattr(model.config, name, value)


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


def rehearse(model: nn.Module, plan: Plan, found: Survey, example_inputs: Inputs | None) -> None:
    """Convert a weightless twin and trace it, so that a model that calls its FFN in an unforeseen way stays untouched.

    Raises:
        RefusedError: the converted twin does not run where the model did.
    """
    twin = apply_plan(meta_twin(model).eval(), plan, found.regions, fill=False)
    try:
        untraced = trace(twin, example_inputs).meta[UNTRACED]
    except MoeifyError as error:
        raise RefusedError(f"the converted model does not run ({_why(error)}); convert the graph instead") from error
    for path, reason in untraced.items():
        if path not in found.graph_module.meta[UNTRACED]:
            raise RefusedError(f"the converted model does not run ({reason}); convert the graph instead")


def _why(error: MoeifyError) -> str:
    """What went wrong, without the advice for who calls `trace`."""
    return str(error).split("; pass example_inputs")[0]
