"""Gradient clipping for parameters on several meshes."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moeify.errors import ConfigError
from moeify.ranks import told_by_ranks


@torch.no_grad()
def clip_grad_norm_(model: nn.Module, max_norm: float) -> Tensor:
    """Scale the gradients of a model so that their norm over all parameters of all ranks is at most `max_norm`.

    torch's own function refuses parameters on two meshes, as experts and the rest are. All ranks must call it.

    Args:
        model: Any model, parallel or not, wrapped or not.
        max_norm: The limit.

    Returns:
        The norm before, (), the same on every rank.

    Raises:
        ConfigError: `max_norm` is not a positive number.
        MoeifyError: Another rank has ended or hangs.
    """
    if not max_norm > 0 or math.isnan(max_norm):
        raise ConfigError(f"max_norm is {max_norm}: choose a number above 0")
    groups: dict[object, list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.grad is not None:
            groups.setdefault(getattr(parameter.grad, "device_mesh", None), []).append(parameter)
    with told_by_ranks("the norm of the gradients could not be summed over the ranks"):
        norms = [_norm([p.grad for p in group if p.grad is not None]) for group in groups.values()]
    if not norms:
        return torch.zeros(())
    total: Tensor = torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]))
    for group in groups.values():
        nn.utils.clip_grads_with_norm_(group, max_norm, total)
    return total


def _norm(gradients: list[Tensor]) -> Tensor:
    norm = nn.utils.get_total_norm(gradients)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
