"""Where trainers report to, beyond single numbers: histograms and pictures for TensorBoard and Weights & Biases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any, Protocol

import torch
from torch import Tensor

from moeify.colors import level, ramp
from moeify.training.run_log import LayerWindow

_CELL = 12  # pixels


class Tracker(Protocol):
    """What can be told to a tracker; nothing is kept of it."""

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Log numbers; what stands before the first slash of their names is their group."""

    def histograms(self, values: Mapping[str, Sequence[float]], step: int) -> None:
        """Log the distribution of some numbers, by name."""

    def picture(self, name: str, pixels: Tensor, step: int) -> None:
        """Log a picture, (height, width, 3) uint8."""


class TensorBoard:
    """TensorBoard's writer, as transformers' callback holds it."""

    def __init__(self, writer: Any) -> None:
        self.writer = writer

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Log numbers."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def histograms(self, values: Mapping[str, Sequence[float]], step: int) -> None:
        """Log distributions."""
        for name, numbers in values.items():
            self.writer.add_histogram(name, torch.tensor(numbers), step)

    def picture(self, name: str, pixels: Tensor, step: int) -> None:
        """Log a picture."""
        self.writer.add_image(name, pixels.numpy(), step, dataformats="HWC")


class WandB:
    """Weights & Biases, as transformers' callback holds it; the step goes along as transformers sends it."""

    def __init__(self, wandb: Any) -> None:
        self.wandb = wandb

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Log numbers."""
        self._log(values, step)

    def histograms(self, values: Mapping[str, Sequence[float]], step: int) -> None:
        """Log distributions."""
        self._log({name: self.wandb.Histogram(list(numbers)) for name, numbers in values.items()}, step)

    def picture(self, name: str, pixels: Tensor, step: int) -> None:
        """Log a picture."""
        self._log({name: self.wandb.Image(pixels.numpy())}, step)

    def _log(self, values: Mapping[str, object], step: int) -> None:
        self.wandb.log({**values, "train/global_step": step})


def trackers_of(trainer: Any) -> list[Tracker]:
    """Return the trackers among a trainer's callbacks that have begun."""
    integrations: Any = import_module("transformers.integrations")
    found: list[Tracker] = []
    for callback in getattr(getattr(trainer, "callback_handler", None), "callbacks", ()):
        if isinstance(callback, integrations.TensorBoardCallback) and callback.tb_writer is not None:
            found.append(TensorBoard(callback.tb_writer))
        elif isinstance(callback, integrations.WandbCallback) and callback._wandb is not None:
            found.append(WandB(callback._wandb))
    return found


def load_picture(layers: Sequence[LayerWindow]) -> Tensor:
    """Return the loads as a picture, a row of cells for each layer: pale is idle, dark takes many times its share.

    Args:
        layers: Those with fewer experts leave the end of their row white.
    """
    colors = torch.tensor([*ramp(dark=False), (255, 255, 255)], dtype=torch.uint8)
    wide = max(len(layer.load) for layer in layers)
    steps = [[*map(level, layer.load), *[len(colors) - 1] * (wide - len(layer.load))] for layer in layers]
    return colors[torch.tensor(steps)].repeat_interleave(_CELL, 0).repeat_interleave(_CELL, 1)
