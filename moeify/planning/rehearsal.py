"""A plan is tried on a model without weights, so that one whose code expects its dense FFN is refused untouched."""

from __future__ import annotations

from torch import nn

from moeify.errors import MoeifyError, RefusedError
from moeify.layers import MoELayer
from moeify.layers.model_inputs import ModelInputs
from moeify.plan import Plan
from moeify.planning.make import Survey
from moeify.planning.replacement import apply_plan
from moeify.tracing.exporting import run_without_values
from moeify.tracing.inputs import candidate_inputs
from moeify.tracing.trace import UNTRACED, Inputs, meta_twin, trace


def rehearse(model: nn.Module, plan: Plan, found: Survey, example_inputs: Inputs | None) -> None:
    """Convert a weightless twin and run it, or trace it where running does not reach every new layer.

    Raises:
        RefusedError: the converted twin does not run where the model did.
    """
    twin = apply_plan(meta_twin(model).eval(), plan, found.regions, fill=False)
    layers = [module for module in twin.modules() if isinstance(module, MoELayer)]
    if not plan.config.router.needs_token_ids:
        for layer in layers:
            layer.model_inputs = ModelInputs()  # a part must not read what a failed trace of the whole left
    if _runs(twin, layers, example_inputs):
        return
    try:
        untraced = trace(twin, example_inputs).meta[UNTRACED]
    except MoeifyError as error:
        raise _refusal(str(error)) from error
    for path, reason in untraced.items():
        if path not in found.graph_module.meta[UNTRACED]:
            raise _refusal(reason)


def _runs(twin: nn.Module, layers: list[MoELayer], example_inputs: Inputs | None) -> bool:
    """Whether a converted twin runs and every new layer is called: a tenth of the time that tracing takes."""
    called: set[nn.Module] = set()
    hooks = [layer.register_forward_hook(lambda layer, *_: called.add(layer)) for layer in layers]
    try:
        run_without_values(twin, next(candidate_inputs(twin)) if example_inputs is None else example_inputs)
    except Exception:  # tracing finds out whether that is the conversion's doing, and can do what running cannot
        return False
    finally:
        for hook in hooks:
            hook.remove()
    return called == set(layers)


def _refusal(reason: str) -> RefusedError:
    why = reason.split("; pass example_inputs")[0]  # that advice is for who calls `trace`
    return RefusedError(f"the converted model does not run ({why}); convert the graph instead")
