"""Activations that nobody named convert as they are, in place and in a graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moeify
from moeify.config import MoEConfig
from moeify.conversion.graph import convert_graph
from moeify.measure import TOLERANCE
from tests.moeify.tiny import relative

HIDDEN, INNER = 12, 29
CONFIG = MoEConfig(experts=4, top_k=2)


class Learned(nn.Module):
    """a·relu(x)² + b·sin(x), a for all and b for each neuron."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.rand(())), nn.Parameter(torch.rand(INNER))

    def forward(self, x: Tensor) -> Tensor:
        return self.a * x.relu().square() + self.b * x.sin()


class Three(nn.Module):
    """A product of three projections, clamped and scaled."""

    def __init__(self) -> None:
        super().__init__()
        self.p, self.q, self.r = (nn.Linear(HIDDEN, INNER, bias=i == 1) for i in range(3))
        self.down = nn.Linear(INNER, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        product = 0.7 * self.p(x).sigmoid().clamp(max=0.8) * self.q(x) * self.r(x).tanh()
        out: Tensor = self.down(product)
        return out


class Packed(nn.Module):
    """Gate and up rows in alternation, clamped as no named activation is."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.down = nn.Linear(HIDDEN, 2 * INNER), nn.Linear(INNER, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        z = self.both(x)
        gate, up = z[..., ::2].clamp(max=7), z[..., 1::2].clamp(-7, 7)
        out: Tensor = self.down(gate * torch.sigmoid(1.3 * gate) * (up + 1))
        return out


class Normed(nn.Module):
    """A norm between the activation and the projection back."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(HIDDEN, INNER), nn.LayerNorm(INNER), nn.Linear(INNER, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(self.norm(self.up(x).relu()))
        return out


class Snake(nn.Module):
    """x + sin(ax)²/a with a frequency for each neuron, prepared from its parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.log = nn.Parameter(torch.rand(INNER))

    def forward(self, x: Tensor) -> Tensor:
        frequency = self.log.abs() + 0.5
        return x + torch.sin(frequency * x).square() / frequency


class LargestFive(nn.Module):
    """A sparse activation: the five largest neurons of each token."""

    def forward(self, x: Tensor) -> Tensor:
        return x.relu() * (x >= x.topk(5, dim=-1).values[..., -1:])


class Scattered(nn.Module):
    """The same, written with indices, and of length 1."""

    def forward(self, x: Tensor) -> Tensor:
        values, indices = x.relu().topk(5, dim=-1)
        return nn.functional.normalize(torch.zeros_like(x).scatter(-1, indices, values), dim=-1)


def between(activation: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(HIDDEN, INNER), activation, nn.Linear(INNER, HIDDEN))


class Written(nn.Module):
    """The largest twentieth of neurons, as in Gemma 3n: numbers that the code writes down, and checks of them."""

    def forward(self, x: Tensor) -> Tensor:
        share = torch.tensor(0.95, dtype=torch.float32, device=x.device)
        normal: Any = torch.distributions.Normal(0, 1, validate_args=True)
        threshold = normal.icdf(share)
        above: Tensor = (x - x.mean(-1, keepdim=True) - x.std(-1, keepdim=True, unbiased=False) * threshold).relu()
        return above


FFNS: dict[str, Callable[[], nn.Module]] = {
    "learned": lambda: between(Learned()),
    "three": Three,
    "packed": Packed,
    "normed": Normed,
    "snake": lambda: between(Snake()),
    "largest": lambda: between(LargestFive()),
    "scattered": lambda: between(Scattered()),
    "written": lambda: between(Written()),
    "mish": lambda: between(nn.Mish()),  # it has a name, but no kernel
}


class Model(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.ffns = nn.ModuleList(FFNS[name]() for _ in range(2))
        self.norm = nn.LayerNorm(HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        for ffn in self.ffns:
            x = x + ffn(self.norm(x))
        return x


@pytest.fixture(params=FFNS)
def model(request: pytest.FixtureRequest) -> Model:
    torch.manual_seed(0)
    made = Model(request.param).eval()
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.4)
    return made


def test_in_place_and_in_a_graph(model: Model) -> None:
    x = torch.randn(3, 7, HIDDEN)
    dense = model(x).detach()
    graph = convert_graph(torch.export.export(model, (x,)), CONFIG)
    moeify.convert(model, CONFIG, example_inputs=torch.zeros(2, 5, HIDDEN))
    assert not any(isinstance(module, nn.Linear) for module in model.modules())
    assert relative(model(x).detach(), dense) < TOLERANCE["float32"]
    assert torch.equal(graph(x), model(x))
    assert set(graph.state_dict()) == set(model.state_dict())


def test_learned_parts_go_on_learning(model: Model) -> None:
    moeify.convert(model, CONFIG, example_inputs=torch.zeros(2, 5, HIDDEN))
    model(torch.randn(3, 7, HIDDEN)).square().sum().backward()
    inside = {name: p for name, p in model.named_parameters() if ".experts.region." in name}
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in inside.values())
