"""A plan is tried on a model without weights: one whose code expects its dense FFN is refused before it is changed."""

from __future__ import annotations

from torch import nn

from moeify.contract.model import prefer_ours
from moeify.conversion.dense import Dense
from moeify.conversion.restructure import restructure
from moeify.errors import MoeifyError, RefusedError, first_line
from moeify.layers import MoELayer, moe_layers
from moeify.layers.model_inputs import ModelInputs
from moeify.plan import Plan
from moeify.planning.placement import GRAPH_INSTEAD
from moeify.tracing.exporting import run_without_values
from moeify.tracing.inputs import candidate_inputs
from moeify.tracing.trace import UNTRACED, Inputs, meta_twin, trace


def rehearse(dense: Dense, plan: Plan) -> None:
    """Convert a twin without weights and run it, or trace it where running does not reach every new layer.

    Raises:
        RefusedError: The converted twin does not run where the model did, in evaluation or in training.
    """
    twin = restructure(meta_twin(dense.model).eval(), plan, dense.regions)
    prefer_ours(twin, plan)
    layers = list(moe_layers(twin).values())
    if not plan.config.router.needs_token_ids:
        for layer in layers:
            layer.model_inputs = ModelInputs()  # a part must not read what a failed trace of the whole left
    if _runs(twin, layers, dense.example_inputs):
        _check_training(twin, dense)
        return
    try:
        untraced = trace(twin, dense.example_inputs).meta[UNTRACED]
    except MoeifyError as error:
        raise _refusal(str(error)) from error
    for path, reason in untraced.items():
        if path not in dense.graph_module.meta[UNTRACED]:
            raise _refusal(reason)


def _runs(twin: nn.Module, layers: list[MoELayer], example_inputs: Inputs | None) -> bool:
    """Return whether a converted twin runs and calls every new layer: a tenth of the time that tracing takes."""
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


def _check_training(twin: nn.Module, dense: Dense) -> None:
    """Refuse a model that changes its dense weights when it is trained (RWKV scales them), as only its code says."""
    inputs = next(candidate_inputs(twin)) if dense.example_inputs is None else dense.example_inputs
    try:
        run_without_values(twin.train(), inputs)
    except Exception as error:
        try:
            run_without_values(meta_twin(dense.model).train(), inputs)
        except Exception:  # it does not train on these inputs: the conversion has changed nothing about that
            return
        raise _refusal(f"in training, {type(error).__name__}: {first_line(error)}") from error


def _refusal(reason: str) -> RefusedError:
    why = reason.split("; pass example_inputs")[0]  # that advice is for a caller of `trace`
    return RefusedError(f"the converted model does not run ({why}); {GRAPH_INSTEAD}")
