"""The MoE layers of a model, by their paths: moeify's own and transformers'."""

from __future__ import annotations

from torch import nn

from moeify.arguments import check_model
from moeify.contract.found import FoundLayer, find_layers
from moeify.contract.track import Tracking, track
from moeify.errors import MoeifyError
from moeify.layers import MoELayer


def layers_of(model: nn.Module) -> dict[str, FoundLayer]:
    """Return the MoE layers inside a model, in the order of its modules; the model may be wrapped (PEFT, DDP).

    Raises:
        MoeifyError: There is none.
        ConfigError: It is no model.
    """
    check_model(model)
    found = find_layers(model)
    if not found:
        raise MoeifyError(f"{type(model).__name__} has no MoE layer: convert it first")
    return found


def own_layers(model: nn.Module) -> dict[str, MoELayer]:
    """Return those of them that moeify put there: no other has a selection bias to move, or losses attached.

    Raises:
        MoeifyError: There is no MoE layer at all.
    """
    return {path: layer.state for path, layer in layers_of(model).items() if isinstance(layer.state, MoELayer)}


def ran_layers(model: nn.Module, asked: str) -> dict[str, FoundLayer]:
    """Return the layers that a forward pass went through; transformers' own are tracked from now on.

    Args:
        model: Any model with MoE layers.
        asked: Who asks, for the message.

    Raises:
        MoeifyError: None has run, or nobody looked when it did, or no token chooses an expert in them.
    """
    layers = layers_of(model)
    if not any(not isinstance(layer.state, MoELayer) or layer.state.chooses for layer in layers.values()):
        raise MoeifyError(f"the tokens of {next(iter(layers))} choose no experts (soft routing): leave out {asked}")
    unseen = [path for path, layer in layers.items() if layer.state is None]
    track(model)
    ran = {path: layer for path, layer in layers.items() if layer.record is not None}
    if not ran and unseen:
        raise MoeifyError(
            f"nobody looked when {unseen[0]} ran: from now on moeify does, so call the model again before {asked} "
            "(moeify.track_routing(model) before the first call spares you this)"
        )
    if not ran:
        raise MoeifyError(f"no MoE layer has run yet: call the model before {asked}")
    return ran


def track_routing(model: nn.Module) -> Tracking:
    """Let `routing_stats` and `aux_loss` see what transformers' own MoE layers do, from the next forward pass on.

    Call it before the first one, and before a compiled model runs: a compiler does not see hooks that come later. It is
    for models that `moeify convert` wrote in a native format, and for downloaded ones; moeify's own layers need none.

    Args:
        model: Any model with MoE layers, wrapped or not.

    Returns:
        A handle whose `remove()` undoes it.

    Raises:
        MoeifyError: The model has no MoE layer.
    """
    layers_of(model)
    return track(model)
