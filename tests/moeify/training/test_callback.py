from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moeify.config import MoEConfig
from moeify.contract.found import find_layers
from moeify.training.callback import RoutingCallback, summary
from moeify.training.stats import LayerStats
from tests.moeify import native
from tests.moeify.layers import make

STATS = {
    "a": LayerStats(10, 20, (0.5, 0.5, 0.0), 0.7, 4, {"balance": 1.0}),
    "b": LayerStats(10, 20, (0.2, 0.7, 0.1), 0.9, 0, {"balance": 2.0, "z": 3.0}),
    "c": LayerStats(0, 0, (0.0, 0.0, 0.0), 0.2, 0, {}),
}
STATE: Any = SimpleNamespace(global_step=0, is_world_process_zero=True)


def test_numbers_are_averaged_over_the_layers_that_have_them_and_idle_experts_are_summed() -> None:
    assert summary(STATS) == {
        "moe_load_max": pytest.approx(1.2 / 3),
        "moe_load_min": pytest.approx(0.1 / 3),
        "moe_entropy": pytest.approx(0.6),
        "moe_dropped": pytest.approx(0.2 / 3),
        "moe_idle": 4,
        "moe_balance": 1.5,
        "moe_z": 3.0,
    }


def test_each_layer_can_be_logged_too() -> None:
    found = summary(STATS, each=True)
    assert found["moe_entropy/b"] == 0.9 and found["moe_dropped/a"] == 0.2 and found["moe_idle/c"] == 3
    assert "moe_z/a" not in found and summary(STATS).items() <= found.items()


@pytest.mark.parametrize(("scaler", "expected"), [(None, 0.25), (SimpleNamespace(get_scale=lambda: 8.0), 2.0)])
def test_the_callback_follows_the_trainer(scaler: Any, expected: float) -> None:
    layer = make.layer(MoEConfig(5, 2, attach_losses=True))
    logged: list[dict[str, float]] = []
    trainer: Any = SimpleNamespace(
        model=layer,
        current_gradient_accumulation_steps=4,
        accelerator=SimpleNamespace(scaler=scaler),
        log=logged.append,
    )
    callback = RoutingCallback(trainer, layers=True)
    callback.on_step_begin(None, STATE, None, model=layer)
    assert layer.loss_scale == expected
    layer(make.inputs(3, 7))
    callback.on_optimizer_step(None, STATE, None)
    callback.on_log(None, STATE, None, logs={"eval_loss": 1.0})
    callback.on_log(None, STATE, None)
    assert logged == []
    callback.on_log(None, STATE, None, logs={"loss": 1.0})
    assert [entry["moe_entropy"] == entry["moe_entropy/"] for entry in logged] == [True]


def test_biases_move_after_an_optimizer_step() -> None:
    layer = make.layer(make.CONFIGS["deepseek_v3"])
    layer.train()(make.inputs(3, 7))
    trainer: Any = SimpleNamespace(model=torch.nn.Sequential(layer))
    RoutingCallback(trainer).on_optimizer_step(None, None, None)
    assert layer.router.selection_bias.any()


def test_layers_of_transformers_are_watched_while_training_lasts() -> None:
    model = native.build("mixtral")
    logged: list[dict[str, float]] = []
    trainer: Any = SimpleNamespace(
        model=model,
        current_gradient_accumulation_steps=1,
        accelerator=SimpleNamespace(scaler=None),
        log=logged.append,
    )
    callback = RoutingCallback(trainer, file=None)
    callback.on_train_begin(None, STATE, None)
    callback.on_step_begin(None, STATE, None)
    model(**native.inputs("mixtral"))
    callback.on_optimizer_step(None, STATE, None)
    callback.on_log(None, STATE, None, logs={"loss": 1.0})
    assert logged[0]["moe_balance"] > 0 and 0 < logged[0]["moe_load_min"] < logged[0]["moe_load_max"]
    callback.on_train_end(None, None, None)
    assert all(layer.state is None for layer in find_layers(model).values())
