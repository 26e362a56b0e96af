"""Add a loss to the gradients in backward, so that a training script need not know of it.

This is an operator, one node to torch.export and torch.compile: an autograd.Function would be inlined by torch.export,
and the loss silently lost.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("moeify::attach_loss", mutates_args=())
def _attach_loss(x: Tensor, loss: Tensor) -> Tensor:
    return x.clone()


@_attach_loss.register_fake
def _(x: Tensor, loss: Tensor) -> Tensor:
    return torch.empty_like(x)


def _attach_loss_setup(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _attach_loss_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    (loss,) = ctx.saved_tensors
    return grad, torch.ones_like(loss)


_attach_loss.register_autograd(_attach_loss_backward, setup_context=_attach_loss_setup)


def attach_loss(x: Tensor, loss: Tensor) -> Tensor:
    """Return x; backward through it also adds the gradient of `loss`, once.

    So a training script that knows nothing of balancing trains balanced. If its own loss is scaled (a gradient scaler,
    division by accumulation steps), scale this one alike: `attach_loss(x, loss * scale)`.

    It copies x: attach to something small that the output depends on, such as the routing weights.

    Args:
        x: Any floating point tensor on the way to the script's loss.
        loss: (), already multiplied by its coefficient.

    Returns:
        A copy of x.
    """
    attached: Tensor = _attach_loss(x, loss)
    return attached
