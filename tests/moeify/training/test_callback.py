from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

import moeify
from moeify.config import MoEConfig
from moeify.contract.found import find_layers
from moeify.training.callback import RoutingCallback, summary
from moeify.training.stats import LayerStats, RoutingWindow
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


def test_what_is_logged_is_of_all_forward_passes_since_the_last_time() -> None:
    """Three micro-batches, the last one looked at twice, are the numbers of one batch of all their tokens."""
    x = make.inputs(6, 7)
    whole, apart = make.layer(MoEConfig(5, 2, capacity_factor=2.0)), make.layer(MoEConfig(5, 2, capacity_factor=2.0))
    whole(x)
    expected = moeify.routing_stats(whole)[""]
    window = RoutingWindow()
    for part in (x[:1], x[1:3], x[3:]):
        apart(part)
        window.add(apart)
    window.add(apart)
    stats = window.stats()[""]
    assert stats.load == pytest.approx(expected.load) and stats.tokens == 42 and stats.choices == 84
    assert stats.entropy == pytest.approx(expected.entropy, rel=1e-6)
    assert stats.logit_size == pytest.approx(expected.logit_size, rel=1e-6)
    assert window.stats() == {}


def test_ranks_are_summed_and_losses_are_means(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = make.layer(MoEConfig(5, 2, z_loss=0.1))
    layer(make.inputs(3, 7))
    alone = moeify.routing_stats(layer)[""]
    monkeypatch.setattr("torch.distributed.all_reduce", lambda tensor, group: tensor.mul_(2))
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 0)
    group: Any = "two equal ranks"
    both = moeify.routing_stats(layer, group)[""]
    assert (both.tokens, both.choices) == (42, 84)
    assert both.load == alone.load and both.losses == pytest.approx(alone.losses)
    assert both.entropy == pytest.approx(alone.entropy) and both.logit_size == pytest.approx(alone.logit_size)
