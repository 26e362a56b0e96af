"""The auxiliary losses of a whole model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moeify.errors import MoeifyError
from moeify.layers import MoELayer
from moeify.routing.balance import weighted_sum
from moeify.training.layers_of import layers_of


def aux_loss(model: nn.Module) -> Tensor:
    """Return the summed losses of all layers in the last forward pass, times their coefficients.

    Add it to the loss of the script. With `attach_losses`, backward adds the gradients already; then the sum has no
    gradient and is for logging.

    Args:
        model: A converted model, wrapped or not.

    Returns:
        () float32 on the device of the first layer; 0 when no loss is asked for.

    Raises:
        MoeifyError: No layer has run yet, or a layer that is trained ran without gradients.
    """
    layers = layers_of(model)
    found = [(path, layer) for path, layer in layers.items() if layer.record is not None]
    first = next(model.parameters())
    total = torch.zeros((), dtype=torch.float32, device=first.device)
    if not found and any(layer.config.aux_loss or layer.config.z_loss for layer in layers.values()):
        raise MoeifyError("no MoE layer has run yet: call the model before aux_loss")
    for path, layer in found:
        loss = weighted_sum(layer.losses(), layer.config, layer.loss_share)
        if loss is None:
            continue
        if layer.config.attach_losses:
            loss = loss.detach()
        elif _gradient_is_missing(layer, loss):
            raise MoeifyError(
                f"{path} ran without gradients, as under reentrant activation checkpointing: "
                "pass use_reentrant=False to it, or convert with attach_losses=True"
            )
        total = total + loss.to(total.device)
    return total


def scale_attached_losses(model: nn.Module, scale: float) -> None:
    """Multiply attached losses by the factor that the script multiplies its own loss by before backward.

    That is 1 / n for the mean over n accumulated micro-batches, times the scale of a gradient scaler
    (`scaler.get_scale()`). Set it before the forward pass. `RoutingCallback` does so in transformers' Trainer.

    Args:
        model: A converted model.
        scale: The factor.
    """
    for layer in layers_of(model).values():
        layer.loss_scale = float(scale)


def _gradient_is_missing(layer: MoELayer, loss: Tensor) -> bool:
    """Return whether training needs the gradient of a loss that has none."""
    trains = layer.training and any(p.requires_grad for p in layer.router.parameters())
    return trains and torch.is_grad_enabled() and not loss.requires_grad
