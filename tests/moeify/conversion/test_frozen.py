"""What is trained after a conversion is what was trained before, and the routers, in whatever way it is converted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import moeify
from moeify.config import MoEConfig
from tests.moeify import tiny

CONFIG = MoEConfig(experts=3, top_k=2, shared_experts=1)
X = torch.linspace(-1, 1, 2 * 5 * 12).reshape(2, 5, 12)


class Model(nn.Module):
    """Two blocks whose activation is learned, a slope for each neuron."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(12)
        self.ffns = nn.ModuleList(
            nn.Sequential(nn.Linear(12, 31), Slope(), nn.Linear(31, 12, bias=False)) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        for ffn in self.ffns:
            x = x + ffn(self.norm(x))
        return x


class Slope(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.linspace(0.1, 0.4, 31))

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(x > 0, x, self.slope * x)


def trained(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def frozen(model: nn.Module, *names: str) -> nn.Module:
    for name in names:
        model.get_parameter(name).requires_grad_(False)
    return model


ALL = {f"ffns.{i}.{name}" for i in range(2) for name in (
    "router.weight", "experts.up_proj", "experts.up_proj_bias", "experts.down_proj", "experts.region.slope",
    "shared_expert.up_proj", "shared_expert.up_proj_bias", "shared_expert.down_proj", "shared_expert.region.slope",
)} | {"norm.weight", "norm.bias"}  # fmt: skip
WEIGHTS = ("ffns.0.0.weight", "ffns.0.0.bias", "ffns.0.2.weight")
REGIONS = {"ffns.0.experts.region.slope", "ffns.0.shared_expert.region.slope"}
FIRST = {name for name in ALL if name.startswith(("ffns.0.experts.", "ffns.0.shared"))}


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ((), ALL),
        (WEIGHTS, ALL - FIRST | REGIONS),
        ((*WEIGHTS, "ffns.0.1.slope"), ALL - FIRST),
        (WEIGHTS[:2], ALL),  # one weight that is trained is enough
        (("ffns.0.1.slope",), ALL - REGIONS),
        (("norm.bias",), ALL - {"norm.bias"}),
    ],
)
def test_frozen_weights_make_frozen_experts(names: tuple[str, ...], expected: set[str]) -> None:
    module, model = moeify.convert(frozen(Model(), *names), CONFIG, example_inputs=X), frozen(Model(), *names)
    program = torch.export.export(model, (X,))
    graph, traced = moeify.convert_graph(program, CONFIG), moeify.convert_graph(program.module(), CONFIG)
    assert trained(module) == trained(graph) == trained(traced) == expected
    graph(X).sum().backward()
    assert {name for name, p in graph.named_parameters() if p.grad is not None} == expected


@pytest.mark.parametrize("name", ["llama", "bert", "gpt2"])
def test_a_loaded_checkpoint_is_trained_as_the_converted_model_is(name: str, tmp_path: Path) -> None:
    model = tiny.build(name)
    tiny.convert_files(tiny.save(model, tmp_path / "src"), tmp_path / "moe", CONFIG, target="moeify")
    loaded = moeify.load(tmp_path / "moe")
    moeify.convert(model, CONFIG)
    assert trained(loaded) == trained(model) == {name for name, _ in model.named_parameters()}
