from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
import transformers

from moeify.colors import level, ramp
from moeify.training.run_log import LayerWindow
from moeify.training.trackers import TensorBoard, WandB, load_picture, trackers_of


def window(*load: float) -> LayerWindow:
    return LayerWindow(load, 0.5, 0.0, 1.0, {})


class Heard:
    """A writer or a module that keeps what it is told."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
            self.calls.append((name, *args, *kwargs.values()))
            return (name, *args)

        return call


def test_trackers_are_those_that_the_trainer_has_begun() -> None:
    known: Any = transformers.integrations
    kinds = (known.TensorBoardCallback, known.TensorBoardCallback, known.WandbCallback, object)
    board, idle, wandb, other = [object.__new__(kind) for kind in kinds]
    board.tb_writer, idle.tb_writer, wandb._wandb = "writer", None, "module"
    trainer = SimpleNamespace(callback_handler=SimpleNamespace(callbacks=[board, idle, other, wandb]))
    first, second = trackers_of(trainer)
    assert isinstance(first, TensorBoard) and first.writer == "writer"
    assert isinstance(second, WandB) and second.wandb == "module"
    assert trackers_of(SimpleNamespace()) == []


def test_weights_and_biases_gets_its_kinds_at_the_step_of_the_trainer() -> None:
    heard = Heard()
    tracker = WandB(heard)
    tracker.scalars({"moe_idle/a": 1.0}, 7)
    tracker.histograms({"moe_loads/a": (1.0, 2.0)}, 7)
    tracker.picture("moe_loads", torch.zeros(2, 3, 3, dtype=torch.uint8), 8)
    logged: list[Mapping[str, Any]] = [call[1] for call in heard.calls if call[0] == "log"]
    assert logged[0] == {"moe_idle/a": 1.0, "train/global_step": 7}
    assert logged[1] == {"moe_loads/a": ("Histogram", [1.0, 2.0]), "train/global_step": 7}
    assert logged[2]["moe_loads"][0] == "Image" and logged[2]["train/global_step"] == 8


def test_the_picture_has_a_square_for_each_expert() -> None:
    pixels = load_picture([window(0, 1, 8), window(2, 0)])
    colors = [*ramp(dark=False), (255, 255, 255)]
    assert pixels.shape == (24, 36, 3) and pixels.dtype == torch.uint8
    cells = pixels[6::12, 6::12].tolist()
    expected = [[level(0), level(1), level(8)], [level(2), level(0), -1]]
    assert cells == [[list(colors[step]) for step in row] for row in expected]
    assert (pixels[:12, :12] == pixels[0, 0]).all()
