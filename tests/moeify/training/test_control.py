from __future__ import annotations

from typing import Any

import pytest
import torch

import moeify
from moeify.config import MoEConfig
from moeify.errors import ConfigError
from tests.moeify import tiny

IDS = torch.arange(60).reshape(4, 15) % tiny.VOCABULARY


@pytest.fixture(scope="module")
def converted() -> Any:
    return moeify.convert(tiny.build("llama"), MoEConfig(5, 2), layers="0,2")


@pytest.fixture
def model(converted: Any) -> Any:
    return converted.requires_grad_(True)


@pytest.mark.parametrize(
    ("what", "trained"),
    [
        ("experts", {"router", "rest"}),
        ("routers", {"experts", "rest"}),
        ("moe", {"rest"}),
        ("dense", {"experts"}),
        ("non_moe", {"router", "experts"}),
    ],
)
def test_freeze_leaves_the_other_parts_to_train(model: Any, what: Any, trained: set[str]) -> None:
    def part(name: str) -> str:
        return next((p for p in ("router", "experts") if f".mlp.{p}." in name), "rest")

    moeify.freeze(model, what)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (part(name) in trained), name


def test_an_unknown_part_is_named(model: Any) -> None:
    with pytest.raises(ConfigError, match="cannot freeze 'gates': expected one of experts, routers"):
        moeify.freeze(model, "gates")  # type: ignore[arg-type]


def test_param_groups_hold_every_trained_parameter_once(model: Any) -> None:
    groups = moeify.param_groups(model, routers={"lr": 1e-2, "weight_decay": 0.0}, rest={"lr": 1e-5})
    assert [group["name"] for group in groups] == ["routers", "experts", "rest"]
    ids = [id(p) for group in groups for p in group["params"]]
    assert sorted(ids) == sorted(id(p) for p in model.parameters())
    optimizer = torch.optim.AdamW(groups, lr=1e-3, weight_decay=0.1)
    assert [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [(1e-2, 0.0), (1e-3, 0.1), (1e-5, 0.1)]
    moeify.freeze(model, "experts")
    assert [group["name"] for group in moeify.param_groups(model)] == ["routers", "rest"]


def dropped(model: Any) -> int:
    model(input_ids=IDS)
    return sum(stats.dropped for stats in moeify.routing_stats(model).values())


def test_capacity_changes_on_a_live_model(model: Any) -> None:
    model.eval()
    assert dropped(model) == 0
    moeify.set_capacity(model, 0.25)
    assert dropped(model) > 0
    assert dropped(model.train()) == 0
    moeify.set_capacity(model, 0.5, when="train")
    assert dropped(model) > 0
    moeify.set_capacity(model, None, when="always")
    assert dropped(model) == dropped(model.eval()) == 0
    with pytest.raises(ConfigError, match="factor is 0"):
        moeify.set_capacity(model, 0)
    with pytest.raises(ConfigError, match="when is 'now'"):
        moeify.set_capacity(model, 1, when="now")  # type: ignore[arg-type]
