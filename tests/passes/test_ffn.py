from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moeify.passes.ffn import FFN
from tests.passes.blocks import HIDDEN, INTERMEDIATE, Mlp, Model, find, residual


class Gated(nn.Module):
    """A GLU with one bias, and an activation with a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(HIDDEN, INTERMEDIATE, bias=False), nn.Linear(HIDDEN, INTERMEDIATE)
        self.down, self.slope = nn.Linear(INTERMEDIATE, HIDDEN, bias=False), nn.Parameter(torch.rand(()))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(F.leaky_relu(self.gate(x), 0.1) * self.slope * self.up(x))
        return out


def found(model: nn.Module) -> FFN:
    (ffn,) = find(model).ffns
    return ffn


def test_the_parameters_of_an_ffn() -> None:
    ffn = found(residual(Gated()))
    assert ffn.projected == ("mlps.0.gate.weight", "mlps.0.up.weight", "mlps.0.up.bias", "mlps.0.down.weight")
    assert ffn.parameters == (*ffn.projected, "mlps.0.slope")


def test_the_kind_is_told_by_the_sizes() -> None:
    assert [(ffn.kind, ffn.calls[0].kind) for ffn in find(residual(Gated(), Mlp())).ffns] == [
        ("glu", "glu"),
        ("mlp", "mlp"),
    ]


def test_a_call_names_all_its_nodes() -> None:
    ffn = found(residual())
    (call,) = ffn.calls
    assert sorted({node.name for node in call.inside}) == ["gelu", "linear", "linear_1"]
    assert call.source.name == "layer_norm"
    assert (ffn.ups, ffn.down, ffn.nodes) == (call.ups, call.down, call.nodes)


def test_biases_that_are_added_are_inside() -> None:
    class Written(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w1, self.b1 = nn.Parameter(torch.rand(HIDDEN, INTERMEDIATE)), nn.Parameter(torch.rand(INTERMEDIATE))
            self.w2, self.b2 = nn.Parameter(torch.rand(INTERMEDIATE, HIDDEN)), nn.Parameter(torch.rand(HIDDEN))

        def forward(self, x: Tensor) -> Tensor:
            return (x @ self.w1 + self.b1).relu() @ self.w2 + self.b2

    (call,) = found(residual(Written())).calls
    assert [node.name for node in call.inside] == ["matmul", "add", "matmul_1", "add_1", "relu"]


def test_calls_are_in_the_order_of_execution() -> None:
    def thrice(m: Model, x: Tensor) -> Tensor:
        for _ in range(3):
            x = x + m.mlps[0](m.norm(x))
        return x

    calls = found(Model(thrice, Mlp())).calls
    assert [call.down.node.name for call in calls] == ["linear_1", "linear_3", "linear_5"]
