"""MoE layers in transformers' Trainer: routing is logged, and selection biases and attached losses are kept right."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch.distributed as dist
from transformers import TrainerCallback

from moeify.contract.stock_loss import StockLoss
from moeify.contract.track import Tracking
from moeify.training.bias import update_selection_bias
from moeify.training.layers_of import track_routing
from moeify.training.losses import scale_attached_losses
from moeify.training.run_log import RUN_FILE, RunLog, layer_window
from moeify.training.stats import LayerStats, RoutingWindow
from moeify.training.trackers import load_picture, trackers_of

if TYPE_CHECKING:
    from torch import nn
    from transformers import Trainer


class RoutingCallback(TrainerCallback):
    """A callback that logs load, entropy, dropped choices and losses each time the trainer logs its loss.

    `trainer.add_callback(moeify.RoutingCallback(trainer))`. It works with every Trainer of transformers and TRL, and
    logs to every place that the trainer reports to. It also moves the selection biases after each optimizer step, and
    scales attached losses by the accumulation steps and the gradient scaler, as the trainer scales its own loss. MoE
    models of transformers' own are asked for their balancing loss in training, and it counts once per step.

    Logged, over all ranks and all training steps since the last time, and averaged over layers: `moe_load_max` and
    `moe_load_min`, the shares of the busiest and the idlest expert; `moe_entropy`, in nats; `moe_dropped`, the share of
    choices that were dropped; `moe_idle`, experts without a token, summed over layers; `moe_balance` and `moe_z`, the
    losses without coefficients.

    TensorBoard and Weights & Biases get more: each layer's numbers, one group for each kind (`moe_load_max/PATH`), the
    histogram of each layer's loads (`moe_loads/PATH`), and now and then a picture of all of them (`moe_loads`). The
    same windows go to a file for `moeify report`.

    Args:
        trainer: The trainer.
        layers: Log each layer's own values to the other places too, as `moe_load_max/PATH` and so on.
        file: The name of that file, in the trainer's output folder unless it is absolute; None for none.
        picture_every: Every how many times a picture is logged; 0 for never.
    """

    def __init__(
        self, trainer: Trainer, *, layers: bool = False, file: str | Path | None = RUN_FILE, picture_every: int = 10
    ) -> None:
        self.trainer, self.layers, self.file, self.picture_every = trainer, layers, file, picture_every
        self._hooks: list[Tracking | StockLoss] = []
        self._window, self._logged = RoutingWindow(), 0
        self._log: RunLog | None = None

    @property
    def _model(self) -> nn.Module:
        return cast("nn.Module", self.trainer.model)

    def on_train_begin(self, args: Any, state: Any, control: object, **kwargs: object) -> None:
        """Look at the layers of transformers, and balance them, from the first step on."""
        self._hooks = [track_routing(self._model), *StockLoss.on(self._model)]
        self._window, self._logged = RoutingWindow(), 0
        if self.file is not None and state.is_world_process_zero:
            self._log = RunLog(Path(args.output_dir) / self.file, goes_on=state.global_step > 0)

    def on_train_end(self, args: object, state: object, control: object, **kwargs: object) -> None:
        """Leave the model as it was."""
        for hooks in self._hooks:
            hooks.remove()

    def on_step_begin(self, args: object, state: object, control: object, **kwargs: object) -> None:
        """Scale attached losses as the trainer scales its loss; the last step of an epoch may have fewer batches."""
        scaler = self.trainer.accelerator.scaler
        scale = 1.0 if scaler is None else scaler.get_scale()
        scale_attached_losses(self._model, scale / self.trainer.current_gradient_accumulation_steps)

    def on_substep_end(self, args: object, state: object, control: object, **kwargs: object) -> None:
        """Count a micro-batch."""
        self._window.add(self._model)

    def on_optimizer_step(self, args: object, state: object, control: object, **kwargs: object) -> None:
        """Count the last micro-batch of a step, and move the selection biases."""
        self._window.add(self._model)
        update_selection_bias(self._model)

    def on_log(
        self, args: object, state: Any, control: object, logs: Mapping[str, float] | None = None, **kwargs: object
    ) -> None:
        """Log beside the training loss; what is logged here has no loss, so it does not call itself."""
        if not logs or "loss" not in logs:
            return
        group = dist.group.WORLD if dist.is_initialized() else None  # every rank logs, and the first one writes
        stats = self._window.stats(group)
        self.trainer.log(summary(stats, each=self.layers))
        if stats and state.is_world_process_zero:
            self._tell(stats, int(state.global_step), float(logs["loss"]))

    def _tell(self, stats: dict[str, LayerStats], step: int, loss: float) -> None:
        """Write the file, and what trackers take beyond single numbers."""
        if self._log is not None:
            self._log.add(step, loss, stats)
        windows = {path: layer_window(layer) for path, layer in stats.items()}
        for tracker in trackers_of(self.trainer):
            tracker.scalars(_by_layer(stats), step)
            tracker.histograms({f"moe_loads/{path}": window.load for path, window in windows.items()}, step)
            if self.picture_every and self._logged % self.picture_every == 0:
                tracker.picture("moe_loads", load_picture(list(windows.values())), step)
        self._logged += 1


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
    return found | _by_layer(stats) if each else found


def _by_layer(stats: Mapping[str, LayerStats]) -> dict[str, float]:
    return {f"moe_{name}/{path}": v for path, layer in stats.items() for name, v in _numbers(layer).items()}


def _numbers(layer: LayerStats) -> dict[str, float]:
    return {
        "load_max": max(layer.load),
        "load_min": min(layer.load),
        "entropy": layer.entropy,
        "dropped": layer.dropped / max(layer.choices, 1),
        "idle": sum(share == 0 for share in layer.load),
        **layer.losses,
    }
