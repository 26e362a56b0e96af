"""The activations that the fused expert kernels know by name, each with its derivative."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

QUICK_GELU_SCALE = 1.702  # Hendrycks & Gimpel, arXiv:1606.08415, section 2


@dataclass(frozen=True)
class Activation:
    """An elementwise function and its backward.

    Attributes:
        forward: x -> act(x).
        backward: (grad, x) -> grad * act'(x).
    """

    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]


def _relu2_backward(grad: Tensor, x: Tensor) -> Tensor:
    return grad * F.relu(x).mul_(2)


def _quick_gelu_backward(grad: Tensor, x: Tensor) -> Tensor:
    gate = torch.sigmoid(QUICK_GELU_SCALE * x)
    return grad * gate * (1 + QUICK_GELU_SCALE * x * (1 - gate))


ACTIVATIONS: dict[str, Activation] = {
    "silu": Activation(F.silu, torch.ops.aten.silu_backward.default),
    "gelu": Activation(F.gelu, torch.ops.aten.gelu_backward.default),
    "gelu_tanh": Activation(
        lambda x: F.gelu(x, approximate="tanh"),
        lambda grad, x: torch.ops.aten.gelu_backward.default(grad, x, approximate="tanh"),
    ),
    "relu": Activation(F.relu, lambda grad, x: torch.ops.aten.threshold_backward.default(grad, x, 0)),
    "relu2": Activation(lambda x: F.relu(x).square(), _relu2_backward),
    "quick_gelu": Activation(lambda x: x * torch.sigmoid(QUICK_GELU_SCALE * x), _quick_gelu_backward),
    "sigmoid": Activation(
        torch.sigmoid, lambda grad, x: torch.ops.aten.sigmoid_backward.default(grad, torch.sigmoid(x))
    ),
    "tanh": Activation(torch.tanh, lambda grad, x: torch.ops.aten.tanh_backward.default(grad, torch.tanh(x))),
}


def find_activation(name: str) -> Activation:
    """Return the activation called `name`; ValueError if there is none."""
    if name not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise ValueError(f"unknown activation {name!r}: expected one of {known}; compose any other from grouped_linear")
    return ACTIVATIONS[name]
