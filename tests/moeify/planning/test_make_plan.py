"""What a plan says of the FFNs that were found."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moeify.config import MoEConfig
from moeify.conversion.dense import Dense
from moeify.errors import ConfigError, RefusedError
from moeify.plan import Plan, Rows
from moeify.planning.make_plan import make_plan
from tests.moeify import tiny

CONFIG = MoEConfig(experts=6, top_k=3)


def plan(model: nn.Module, config: MoEConfig = CONFIG, layers: str = "all", inputs: Any = None, **options: Any) -> Plan:
    dense = Dense(model, inputs)
    return make_plan(model, dense.graph_module, dense.inspection, config, layers, **options)


def rows(weight: str, start: int, stop: int, step: int, of: int, bias: str | None = None, **options: bool) -> Rows:
    return Rows(weight, bias, start, stop, step, of, options.get("transposed", False))


H, I = tiny.HIDDEN, tiny.INTERMEDIATE  # noqa: E741 (hidden and intermediate size)


@pytest.mark.parametrize(
    ("name", "path", "ups", "down"),
    [
        ("llama", "model.layers.1.mlp",
         [rows("{}.gate_proj.weight", 0, I, 1, I), rows("{}.up_proj.weight", 0, I, 1, I)],
         rows("{}.down_proj.weight", 0, H, 1, H)),
        ("phi3", "model.layers.1.mlp",
         [rows("{}.gate_up_proj.weight", 0, I, 1, 2 * I), rows("{}.gate_up_proj.weight", I, 2 * I, 1, 2 * I)],
         rows("{}.down_proj.weight", 0, H, 1, H)),
        ("gpt2", "transformer.h.1.mlp",
         [rows("{}.c_fc.weight", 0, I, 1, I, "{}.c_fc.bias", transposed=True)],
         rows("{}.c_proj.weight", 0, H, 1, H, "{}.c_proj.bias", transposed=True)),
    ],
)  # fmt: skip
def test_rows_say_what_the_weights_are_called_and_how_they_are_stored(
    name: str, path: str, ups: list[Rows], down: Rows
) -> None:
    site = plan(tiny.build(name)).sites[1]

    def named(of: Rows) -> Rows:
        return Rows(of.parameter.format(path), of.bias and of.bias.format(path), *list(vars(of).values())[2:])

    assert (site.path, site.bypassed, site.hidden, site.intermediate) == (path, (), H, I)
    assert site.ups == tuple(map(named, ups)) and site.down == named(down)
    assert site.activation_state == ()


def test_a_spread_ffn_takes_the_place_of_its_down_projection() -> None:
    site = plan(tiny.build("bert")).sites[0]
    assert site.path == "bert.encoder.layer.0.output.dense"
    assert site.bypassed == ("bert.encoder.layer.0.intermediate",)
    assert site.expert_dropout == 0 and site.kind == "mlp" and site.activation == "gelu"


@pytest.mark.parametrize(("layers", "numbers"), [("all", [0, 1, 2]), ("last:2", [1, 2]), ("1", [1]), (r"\.0\.", [0])])
def test_only_the_selected_ffns_are_planned(layers: str, numbers: list[int]) -> None:
    assert [site.path for site in plan(tiny.build("qwen3"), layers=layers).sites] == [
        f"model.layers.{number}.mlp" for number in numbers
    ]


class Slope(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.rand(30))

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(x > 0, x, self.slope * x)


class Model(nn.Module):
    """A block with an FFN, and something in the way of planning it."""

    def __init__(self, activation: nn.Module | None = None, buffers: bool = False) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(12, 30), nn.Linear(30, 12)
        self.act = activation or nn.GELU()
        if buffers:
            weight = self.up.weight.detach()
            del self.up._parameters["weight"]
            self.up.register_buffer("weight", weight)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.down(self.act(self.up(x)))
        return out


X = torch.zeros(2, 5, 12)


@pytest.mark.parametrize(
    ("model", "config", "words"),
    [
        (Model(buffers=True), CONFIG, "up.weight is a buffer, not a parameter (quantized?)"),
        (Model(Slope()), MoEConfig(6, 3, granularity=3), "down: its activation has no name, so it cannot be cut"),
        (Model(), MoEConfig(8, 4, granularity=4), "down: its intermediate size 30 does not divide into 4 shards"),
        (nn.Linear(12, 12), CONFIG, "no dense FFN was found in Linear: "),
        (nn.Identity(), CONFIG, "no dense FFN was found in Identity: it projects no activation by a parameter"),
    ],
    ids=["buffer", "unnamed shards", "uneven shards", "one projection", "nothing"],
)
def test_what_cannot_be_planned_says_why(model: nn.Module, config: MoEConfig, words: str) -> None:
    with pytest.raises(RefusedError, match=re.escape(words)):
        plan(model, config, inputs=X)


def test_a_selection_of_nothing_is_wrong_usage() -> None:
    with pytest.raises(ConfigError, match="selects none of the 3 FFNs"):
        plan(tiny.build("llama"), layers="encoder")
