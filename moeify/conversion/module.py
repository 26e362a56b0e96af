"""The in-place applier: dense FFNs of a live module become `SparseMoE` layers."""

from __future__ import annotations

from torch import nn
from torch.optim import Optimizer

from moeify.config import MoEConfig
from moeify.conversion.optimizer import take_up
from moeify.conversion.refusals import check_plain, check_replaceable
from moeify.conversion.rehearsal import rehearse
from moeify.conversion.replacement import apply_plan
from moeify.plan import Plan
from moeify.planning.make_plan import make_plan, survey
from moeify.tracing.trace import Inputs, trace


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
