"""Balance without a loss: the selection bias of DeepSeek-V3's router, moved once per optimizer step."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from moeify.errors import MoeifyError
from moeify.layers.routing import SigmoidRouter
from moeify.training.layers_of import layers_of


@torch.no_grad()
def update_selection_bias(model: nn.Module, group: dist.ProcessGroup | None = None) -> None:
    """Move every selection bias by the choices of all training forwards since the last call, on all ranks.

    Call it once after each optimizer step, however many micro-batches were accumulated; all ranks must call.

    Args:
        model: A converted model; without such a router nothing happens.
        group: The data-parallel ranks; None is all of them.
    """
    routers = _biased(model)
    if not routers:
        return
    counts = [
        router.selection_bias.new_zeros(router.config.experts, dtype=torch.int64)
        if router.counts_E is None
        else router.counts_E
        for router in routers
    ]
    if dist.is_initialized():
        together = torch.cat([c.to(counts[0].device) for c in counts])
        dist.all_reduce(together, group=group)
        counts = list(torch.split(together, [len(c) for c in counts]))
    for router, counts_E in zip(routers, counts, strict=True):
        router.update_bias(counts_E.to(router.selection_bias.device))


def attach_bias_update(model: nn.Module, optimizer: Optimizer) -> RemovableHandle:
    """Make an optimizer move the selection biases after each of its steps.

    Args:
        model: A converted model.
        optimizer: The one that steps once per global batch (under accelerate, the optimizer inside the wrapper).

    Returns:
        A handle whose `remove()` undoes it.

    Raises:
        MoeifyError: no layer has a selection bias.
    """
    if not _biased(model):
        raise MoeifyError("no layer has a selection bias: convert with router='sigmoid' and a bias_rate above 0")

    def update(*_: Any) -> None:
        update_selection_bias(model)

    return optimizer.register_step_post_hook(update)


def _biased(model: nn.Module) -> list[SigmoidRouter]:
    routers = [layer.router for layer in layers_of(model).values()]
    return [router for router in routers if isinstance(router, SigmoidRouter) and router.config.bias_rate]
