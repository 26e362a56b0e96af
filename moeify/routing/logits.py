"""Router logits: the projection, the weights that it starts with, and the jitter on its input.

Logits, scores and weights are float32 whatever the model computes in, also under autocast; float64 stays float64, so
that gradients can be checked.

Shape suffixes: T tokens, H hidden size, E experts.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from moeify.errors import ConfigError
from moeify.seeding import normal


def router_init(shape: tuple[int, int], seed: int, name: str) -> Tensor:
    """Return initial router weights that break ties at any hidden size: entries N(0, 1/H).

    Their standard deviation is 1/sqrt(H), so inputs of unit root mean square (what an RMSNorm or LayerNorm gives) make
    logits of standard deviation 1: with 8 experts the first choice has probability 0.36 on average.

    The values depend on seed and name alone, not on what was drawn before or on the default device.

    Args:
        shape: (E, H).
        seed: Any integer.
        name: The parameter's full name in the model.

    Returns:
        float32 (E, H), on the CPU.
    """
    init_EH: Tensor = normal(shape, seed, name) / math.sqrt(shape[-1])
    return init_EH.float()


def router_logits(x_TH: Tensor, weight_EH: Tensor) -> Tensor:
    """Project tokens in float32, also under autocast (Switch Transformer's selective precision).

    Args:
        x_TH: (..., H), any float dtype.
        weight_EH: (E, H), any float dtype.

    Returns:
        (..., E) float32; float64 if x_TH and weight_EH are.
    """
    x_TH, weight_EH = at_least_fp32(x_TH), at_least_fp32(weight_EH)
    device = x_TH.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):
            return F.linear(x_TH, weight_EH)
    return F.linear(x_TH, weight_EH)


def jitter_inputs(x_TH: Tensor, eps: float = 1e-2) -> Tensor:
    """Multiply the router's input by U[1-eps, 1+eps] in training (Switch Transformer, Fedus et al. 2021).

    Takes (..., H) of any float dtype; returns float32, for bfloat16 has no room for a jitter of 1e-2.
    """
    x_TH = at_least_fp32(x_TH)
    noise_TH = torch.empty_like(x_TH).uniform_()
    return x_TH * (1 - eps + 2 * eps * noise_TH)


def at_least_fp32(tensor: Tensor) -> Tensor:
    """Return the tensor in float32, or as it is if it is float64."""
    # Not a bare .float(): torch.export would record the no-op and pin the dtype that it saw.
    return tensor if tensor.dtype in {torch.float32, torch.float64} else tensor.float()


def check_top_k(top_k: int, experts: int) -> None:
    """Check that top_k is in 1..experts.

    Raises:
        ConfigError: It is not.
    """
    if not 1 <= top_k <= experts:
        raise ConfigError(f"top_k is {top_k}, but there are {experts} experts: choose a number from 1 to {experts}")
