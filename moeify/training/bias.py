"""Balance without a loss: the selection bias of DeepSeek-V3's router, moved once per optimizer step."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from moeify.errors import MoeifyError
from moeify.layers import MoELayer
from moeify.ranks import told_by_ranks
from moeify.routers.base import RouterModule
from moeify.training.layers_of import own_layers


@torch.no_grad()
def update_selection_bias(model: nn.Module, group: dist.ProcessGroup | None = None) -> None:
    """Move every selection bias by the choices of all training forwards since the last call, on all ranks.

    Call it once after each optimizer step, however many micro-batches were accumulated; all ranks must call it.

    Args:
        model: A model with MoE layers; nothing happens if no router of moeify has a selection bias.
        group: The data-parallel ranks; None for all ranks.
    """
    layers = _biased(model)
    if not layers:
        return
    device = next(model.parameters()).device
    counts = [
        torch.zeros(layer.config.experts, dtype=torch.int64) if layer.counts_E is None else layer.counts_E
        for layer in layers
    ]
    if dist.is_initialized():
        together = torch.cat([counts_E.to(device) for counts_E in counts])
        with told_by_ranks("the choices of the layers could not be summed over the ranks", group):
            dist.all_reduce(together, group=group)
        counts = list(torch.split(together, [len(counts_E) for counts_E in counts]))
    for layer, counts_E in zip(layers, counts, strict=True):
        layer.counts_E = None
        for router in layer.router.modules():  # PEFT may have put a wrapper around it
            if isinstance(router, RouterModule):
                router.update_bias(counts_E)


def attach_bias_update(model: nn.Module, optimizer: Optimizer) -> RemovableHandle:
    """Make an optimizer move the selection biases after each of its steps.

    Args:
        model: A converted model.
        optimizer: The optimizer that steps once per global batch, also as accelerate wraps it.

    Returns:
        A handle whose `remove()` undoes it.

    Raises:
        MoeifyError: No layer has a selection bias.
    """
    if not _biased(model):
        raise MoeifyError("no layer has a selection bias: convert with router=moeify.routers.Sigmoid(bias_rate=1e-3)")

    def update(*_: object) -> None:
        update_selection_bias(model)

    inner: Optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper has no hooks of its own
    return inner.register_step_post_hook(update)


def _biased(model: nn.Module) -> list[MoELayer]:
    return [layer for layer in own_layers(model).values() if layer.config.router.updates_bias]
