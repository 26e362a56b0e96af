"""The auxiliary losses of a whole model."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from moeify.arguments import check_model
from moeify.contract.found import FoundLayer, text_config
from moeify.contract.outputs import ASK, COEFFICIENT, RouterOutputs
from moeify.contract.stock_loss import adds_loss
from moeify.contract.watch import stock_losses
from moeify.errors import ConfigError, MoeifyError
from moeify.layers import MoELayer
from moeify.layers.forward_record import ForwardRecord, summed_losses
from moeify.training.layers_of import layers_of, own_layers, ran_layers


def aux_loss(model: nn.Module) -> Tensor:
    """Return the summed losses of all layers in the last forward pass, times their coefficients.

    Add it to the loss of the script. With `attach_losses`, backward adds the gradients already; then the sum has no
    gradient and is for logging.

    For layers of transformers' own (see `track_routing`) it is `router_aux_loss_coef` times the loss that transformers
    computes over the tokens of all layers together, and `router_z_loss_coef` times the z-loss where the config has one.

    Args:
        model: Any model with MoE layers, wrapped or not.

    Returns:
        () float32 on the device of the first layer; 0 when no loss is asked for.

    Raises:
        MoeifyError: No layer has run yet, or a layer that is trained ran without gradients.
        ConfigError: The model adds the loss to its own already, or its config has no coefficient.
    """
    check_model(model)
    first = next(model.parameters())
    total = torch.zeros((), dtype=torch.float32, device=first.device)
    if not any(_asks(layer) for layer in layers_of(model).values()):
        return total
    _refuse_twice(model)
    layers = ran_layers(model, "aux_loss")
    own = [layer.state for layer in layers.values() if isinstance(layer.state, MoELayer)]
    stock = {path: layer for path, layer in layers.items() if not isinstance(layer.state, MoELayer)}
    attached, added = ([layer for layer in own if layer.config.attach_losses is value] for value in (True, False))
    with torch.no_grad():
        logged = summed_losses(attached)
    for loss in (logged, summed_losses(added), _stock_loss(stock)):
        total = total if loss is None else total + loss.to(total.device)
    for path, layer in layers.items():
        if _asks(layer) and _gradient_is_missing(layer):
            raise MoeifyError(
                f"{path} ran without gradients, as under reentrant activation checkpointing: "
                "pass use_reentrant=False to it, or convert with attach_losses=True"
            )
    return total


def scale_attached_losses(model: nn.Module, scale: float) -> None:
    """Multiply attached losses by the factor that the script multiplies its own loss by before backward.

    That is 1 / n for the mean over n accumulated micro-batches, times the scale of a gradient scaler
    (`scaler.get_scale()`). Set it before the forward pass. `RoutingCallback` does so in transformers' Trainer.

    Args:
        model: A model with MoE layers; nothing is attached to those of transformers.
        scale: The factor.
    """
    for layer in own_layers(model).values():
        layer.loss_scale = float(scale)


def _asks(layer: FoundLayer) -> bool:
    """Return whether a layer is to be balanced."""
    if not isinstance(layer.state, MoELayer):
        return True
    return layer.state.chooses and bool(layer.state.config.aux_loss or layer.state.config.z_loss)


def _gradient_is_missing(layer: FoundLayer) -> bool:
    """Return whether training needs the gradient of a loss that has none."""
    record, attached = layer.record, isinstance(layer.state, MoELayer) and layer.state.config.attach_losses
    trains = layer.router.training and any(p.requires_grad for p in layer.router.parameters())
    if record is None or attached or not trains:
        return False
    return torch.is_grad_enabled() and not record.routing.logits_TE.requires_grad


def _stock_loss(layers: Mapping[str, FoundLayer]) -> Tensor | None:
    """Return the losses of transformers' own layers: of each stack over all its tokens together."""
    stacks: dict[tuple[str, int], list[ForwardRecord]] = {}
    for path, layer, record in ((path, layer, layer.record) for path, layer in layers.items()):
        if record is None:
            continue
        stack = re.split(r"(?:^|\.)\d+(?:\.|$)", path, maxsplit=1)[0]
        stacks.setdefault((stack, layer.num_experts), []).append(record)
    if not stacks:
        return None
    config = next(iter(layers.values())).config
    coefficient = getattr(config, COEFFICIENT, None)
    if coefficient is None:
        raise ConfigError(
            f"the config has no {COEFFICIENT} to multiply the loss by: set model.config.{COEFFICIENT} = 0.001, "
            "or leave out aux_loss where a selection bias keeps the balance"
        )
    factors = {"balance": coefficient, "z": getattr(config, "router_z_loss_coef", None) or 0.0}
    losses = [stock_losses(records) for records in stacks.values()]
    terms = [factors[name] * loss for stack in losses for name, loss in stack.items() if factors[name]]
    return sum(terms[1:], terms[0]) if terms else None


def _refuse_twice(model: nn.Module) -> None:
    """Refuse to give the loss of a model that adds it to its own."""
    for module in model.modules() if torch.is_grad_enabled() else ():
        text = text_config(module)
        if not getattr(text, ASK, False) or not getattr(text, COEFFICIENT, 0):
            continue
        if adds_loss(module) or _asks_for_loss(module):
            raise ConfigError(
                f"{type(module).__name__} adds the balancing loss itself ({ASK} is on, {COEFFICIENT} is "
                f"{getattr(text, COEFFICIENT)}): leave out aux_loss, or set model.config.{ASK} = False"
            )


def _asks_for_loss(module: nn.Module) -> bool:
    """Return whether a converted model adds to its loss what its routers ask for."""
    hooked = any(isinstance(hook, RouterOutputs) for hook in module._forward_pre_hooks.values())
    return hooked and "labels" in inspect.signature(module.forward).parameters
