"""The log of a run's routing, as lines of JSON: written while it trains, read by `moeify report`.

A line is a window of training steps, complete in itself, so that a run that is killed loses no other. A run that goes
on from a checkpoint writes its steps again; the later ones count.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from moeify.errors import CheckpointError
from moeify.files.json_text import parse_json
from moeify.files.limits import EXPERTS, LAYERS, RUN_BYTES
from moeify.files.reading import read_bytes
from moeify.training.stats import LayerStats

RUN_FILE = "routing.jsonl"
_VERSION, _LARGEST = 1, 1e15


@dataclass(frozen=True)
class LayerWindow:
    """One layer in a window.

    Attributes:
        load: Of each expert, in multiples of the fair share.
        entropy: Mean of the tokens', in nats.
        dropped: Share of the choices.
        logit_size: Root of the mean square of the router logits.
        losses: By name, without coefficients.
    """

    load: tuple[float, ...]
    entropy: float
    dropped: float
    logit_size: float
    losses: dict[str, float]


@dataclass(frozen=True)
class Window:
    """What was logged at a step: the loss of the trainer, and the layers by their paths."""

    step: int
    loss: float | None
    layers: dict[str, LayerWindow]


@dataclass(frozen=True)
class Run:
    """What a log holds.

    Attributes:
        windows: In the order of their steps.
        damaged: Lines that are not what was written, but for the last one.
        cut: Whether the last line ends in its middle.
    """

    windows: tuple[Window, ...]
    damaged: int
    cut: bool


def layer_window(stats: LayerStats) -> LayerWindow:
    """Return what is logged of a layer, in four digits."""
    load = tuple(_short(share * len(stats.load)) for share in stats.load)
    dropped, losses = _short(stats.dropped / max(stats.choices, 1)), {k: _short(v) for k, v in stats.losses.items()}
    return LayerWindow(load, _short(stats.entropy), dropped, _short(stats.logit_size), losses)


class RunLog:
    """The file that a run writes; one that cannot be written does not stop the training, which is told once.

    Args:
        path: The file.
        goes_on: Whether what is there belongs to this run.
    """

    def __init__(self, path: Path, *, goes_on: bool) -> None:
        self.path, self._mode, self._works = path, "a" if goes_on else "w", True

    def add(self, step: int, loss: float | None, stats: Mapping[str, LayerStats]) -> None:
        """Write a window."""
        layers = {path: vars(layer_window(layer)) for path, layer in stats.items()}
        line = json.dumps(
            {"moeify_run": _VERSION, "step": step, "loss": loss and _short(loss), "layers": layers},
            separators=(",", ":"),
        )
        if not self._works:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, self._mode, encoding="utf-8") as file:
                # What an earlier run was killed in the middle of stays a line of its own.
                file.write("\n" * (self._mode == "a" and file.tell() > 0) + line)
            self._mode = "a"
        except OSError as error:
            self._works = False
            warnings.warn(f"{self.path} cannot be written ({error.strerror}): the run is not logged", stacklevel=2)


def read_run(path: Path) -> Run:
    """Read a log, also one that ends in the middle of a line.

    Raises:
        CheckpointError: It cannot be read, or holds no window.
    """
    lines = [line for line in read_bytes(path, RUN_BYTES).split(b"\n") if line.strip()]
    found = [_window(line) for line in lines]
    windows = {window.step: window for window in found if window is not None}
    if not windows:
        raise CheckpointError(f"{path} holds no window of a run: expected what moeify.RoutingCallback wrote")
    wrong = sum(window is None for window in found)
    cut = found[-1] is None
    return Run(tuple(windows[step] for step in sorted(windows)), wrong - cut, cut)


def _window(line: bytes) -> Window | None:
    """Return what a line says; None if it is not what was written."""
    try:
        row = parse_json(line)
        if not isinstance(row, dict) or row["moeify_run"] != _VERSION:
            return None
        layers = {str(path): _layer(layer) for path, layer in row["layers"].items()}
        loss = None if row["loss"] is None else float(row["loss"])
        return Window(int(_number(row["step"])), loss, layers) if 0 < len(layers) <= LAYERS else None
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError):
        return None


def _layer(data: Mapping[str, object]) -> LayerWindow:
    load, losses = data["load"], data["losses"]
    if not isinstance(load, list) or not 0 < len(load) <= EXPERTS or not isinstance(losses, dict):
        raise ValueError("it is another form")
    entropy, dropped, size = (_number(data[name]) for name in ("entropy", "dropped", "logit_size"))
    named = {str(name): _number(value) for name, value in losses.items()}
    return LayerWindow(tuple(map(_number, load)), entropy, dropped, size, named)


def _number(value: object) -> float:
    """Return a number that can be drawn."""
    if not isinstance(value, int | float) or not 0 <= value <= _LARGEST:
        raise ValueError("it is no such number")
    return float(value)


def _short(number: float) -> float:
    return float(f"{number:.4g}")
