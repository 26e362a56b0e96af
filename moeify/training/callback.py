"""MoE layers in transformers' Trainer: routing is logged, and selection biases and attached losses are kept right."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

import torch.distributed as dist
from transformers import TrainerCallback

from moeify.contract.stock_loss import StockLoss
from moeify.contract.track import Tracking
from moeify.training.bias import update_selection_bias
from moeify.training.layers_of import track_routing
from moeify.training.losses import scale_attached_losses
from moeify.training.stats import LayerStats, routing_stats

if TYPE_CHECKING:
    from torch import nn
    from transformers import Trainer


class RoutingCallback(TrainerCallback):
    """A callback that logs load, entropy, dropped choices and losses each time the trainer logs its loss.

    `trainer.add_callback(moeify.RoutingCallback(trainer))`. It works with every Trainer of transformers and TRL, and
    logs to every place that the trainer reports to. It also moves the selection biases after each optimizer step, and
    scales attached losses by the accumulation steps and the gradient scaler, as the trainer scales its own loss. MoE
    models of transformers' own are asked for their balancing loss in training, and it counts once per step.

    Logged, over the last forward pass of all ranks and averaged over layers: `moe_load_max` and `moe_load_min`, the
    shares of the busiest and the idlest expert; `moe_entropy`, in nats; `moe_dropped`, the share of choices that were
    dropped; `moe_idle`, experts without a token, summed over layers; `moe_balance` and `moe_z`, the losses without
    coefficients.

    Args:
        trainer: The trainer.
        layers: Log each layer's own values too, as `moe_load_max/PATH` and so on.
    """

    def __init__(self, trainer: Trainer, *, layers: bool = False) -> None:
        self.trainer, self.layers = trainer, layers
        self._hooks: list[Tracking | StockLoss] = []

    @property
    def _model(self) -> nn.Module:
        return cast("nn.Module", self.trainer.model)

    def on_train_begin(self, args: object, state: object, control: object, **kwargs: object) -> None:
        """Look at the layers of transformers, and balance them, from the first step on."""
        self._hooks = [track_routing(self._model), *StockLoss.on(self._model)]

    def on_train_end(self, args: object, state: object, control: object, **kwargs: object) -> None:
        """Leave the model as it was."""
        for hooks in self._hooks:
            hooks.remove()

    def on_step_begin(self, args: object, state: object, control: object, **kwargs: object) -> None:
        """Scale attached losses as the trainer scales its loss; the last step of an epoch may have fewer batches."""
        scaler = self.trainer.accelerator.scaler
        scale = 1.0 if scaler is None else scaler.get_scale()
        scale_attached_losses(self._model, scale / self.trainer.current_gradient_accumulation_steps)

    def on_optimizer_step(self, args: object, state: object, control: object, **kwargs: object) -> None:
        """Move the selection biases."""
        update_selection_bias(self._model)

    def on_log(
        self, args: object, state: object, control: object, logs: Mapping[str, float] | None = None, **kwargs: object
    ) -> None:
        """Log beside the training loss; what is logged here has no loss, so it does not call itself."""
        if logs and "loss" in logs:
            group = dist.group.WORLD if dist.is_initialized() else None  # every rank logs, and the first one writes
            self.trainer.log(summary(routing_stats(self._model, group), each=self.layers))


def summary(stats: dict[str, LayerStats], *, each: bool = False) -> dict[str, float]:
    """Return the numbers that `RoutingCallback` logs.

    Args:
        stats: What `routing_stats` returned.
        each: Add each layer's own values.
    """
    by_layer = {path: _numbers(layer) for path, layer in stats.items()}
    names = dict.fromkeys(name for numbers in by_layer.values() for name in numbers)
    found = {}
    for name in names:
        values = [numbers[name] for numbers in by_layer.values() if name in numbers]
        found[f"moe_{name}"] = sum(values) if name == "idle" else sum(values) / len(values)
    if each:
        found |= {f"moe_{name}/{path}": v for path, numbers in by_layer.items() for name, v in numbers.items()}
    return found


def _numbers(layer: LayerStats) -> dict[str, float]:
    return {
        "load_max": max(layer.load),
        "load_min": min(layer.load),
        "entropy": layer.entropy,
        "dropped": layer.dropped / max(layer.choices, 1),
        "idle": sum(share == 0 for share in layer.load),
        **layer.losses,
    }
