"""Where the layer of an FFN is put, and which dropout it takes over."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moeify
from moeify.config import MoEConfig
from moeify.conversion.dense import Dense
from moeify.errors import RefusedError
from moeify.planning.placement import Placement, Placer

X = torch.linspace(-1, 1, 2 * 5 * 12).reshape(2, 5, 12)


class Owner(nn.Module):
    """An FFN that is a module, with dropout inside, at its end, and around it."""

    def __init__(self, hidden: float = 0.0, end: float | None = None, around: float = 0.0) -> None:
        super().__init__()
        last = [] if end is None else [nn.Dropout(end)]
        self.mlp = nn.Sequential(nn.Linear(12, 31), nn.GELU(), nn.Dropout(hidden), nn.Linear(31, 12), *last)
        self.drop = nn.Dropout(around)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.drop(self.mlp(x))
        return out


class Spread(nn.Module):
    """An FFN that is spread over siblings."""

    def __init__(self, activation: nn.Module | None = None, gated: bool = False, fc1: int = 31) -> None:
        super().__init__()
        self.fc1, self.fc2, self.act = nn.Linear(12, fc1), nn.Linear(31, 12), activation
        self.gate = nn.Linear(12, 31) if gated else None
        self.drop = nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        z = self.fc1(x)
        z = F.gelu(z) if self.act is None else self.act(z)
        z = z if self.gate is None else z * self.gate(x)
        out: Tensor = x + self.drop(self.fc2(z))
        return out


class Gate(nn.Module):
    """An activation with a norm in it, and with code that looks for the halves of the features."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(31)

    def forward(self, z: Tensor) -> Tensor:
        gate, up = F.relu(z, inplace=True).chunk(2, dim=-1)
        out: Tensor = self.norm(gate) * up
        return out


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Conv1d(12, 31, 1), nn.GELU(), nn.Conv1d(31, 12, 1))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.mlp(x.transpose(1, 2)).transpose(1, 2)
        return out


class Shared(nn.Module):
    """One FFN that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Owner()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.block(self.block(x))
        return out


class Busy(Owner):
    """The module of the FFN does something else besides."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = Inner()  # type: ignore[assignment]


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(12)
        self.up, self.act, self.down = nn.Linear(12, 31), nn.GELU(), nn.Linear(31, 12)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(self.act(self.up(self.norm(x))))
        return out


class Mixed(nn.Module):
    """One weight is stored (out, in), the other one (in, out)."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = Conv1D()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.mlp(x)
        return out


class Conv1D(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(12, 31), nn.Parameter(torch.randn(31, 12) / 5)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.up(x)) @ self.down


def placed(model: nn.Module, *, in_place: bool = True) -> Placement:
    dense = Dense(model, X)
    (ffn,) = dense.inspection.ffns
    placer = Placer(dense.graph_module)
    return placer.place(ffn) if in_place else placer.place_in_graph(ffn)


@pytest.mark.parametrize(
    ("model", "place"),
    [
        (Owner(), Placement("mlp", (), 0.0, 0.0)),
        (Owner(hidden=0.2), Placement("mlp", (), 0.0, 0.2)),
        (Owner(end=0.1), Placement("mlp", (), 0.1, 0.0)),
        (Owner(around=0.1), Placement("mlp", (), 0.0, 0.0)),  # that one stays where it is
        (Owner(end=0.2, around=0.1), Placement("mlp", (), 0.2, 0.0)),
        (Owner(end=0.1, around=0.2), Placement("mlp", (), 0.1, 0.0)),
        (Owner(0.2, 0.1), Placement("mlp", (), 0.1, 0.2)),
        (Spread(nn.GELU()), Placement("fc2", ("fc1", "act"), 0.0, 0.0)),
        (Busy(), Placement("mlp.down", ("mlp.up", "mlp.act"), 0.0, 0.0)),
        (Shared(), Placement("block.mlp", (), 0.0, 0.0)),
        (Mixed(), Placement("mlp", (), 0.0, 0.0)),
        (Spread(), Placement("fc2", ("fc1",), 0.0, 0.0, handing=("fc1",))),
        (Spread(nn.GELU(), gated=True), Placement("fc2", ("fc1", "gate"), 0.0, 0.0, handing=("fc1", "gate"))),
        (Spread(Gate(), fc1=62), Placement("fc2", ("fc1", "act.norm"), 0.0, 0.0, handing=("fc1",))),
        (Convolutions(), Placement("mlp", (), 0.0, 0.0, axis=-2)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_place_and_the_dropout(model: nn.Module, place: Placement) -> None:
    assert placed(model) == place


class Raw(nn.Module):
    """The block multiplies by parameters of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w2 = (nn.Parameter(torch.randn(*shape) / 4) for shape in ((12, 31), (31, 12)))

    def forward(self, x: Tensor) -> Tensor:
        return x + F.gelu(x @ self.w1) @ self.w2


class Sloped(Spread):
    """Its activation reads a parameter of the block."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.linspace(0.1, 0.4, 31))

    def forward(self, x: Tensor) -> Tensor:
        z = self.fc1(x)
        out: Tensor = x + self.fc2(torch.where(z > 0, z, self.slope * z))
        return out


class Crossed(Spread):
    """Two calls of one FFN, the second before the first has ended."""

    def forward(self, x: Tensor) -> Tensor:
        first, second = (F.gelu(self.fc1(each)) for each in (x, 2 * x))
        out: Tensor = (x + self.fc2(first)) * torch.sigmoid(2 * x + self.fc2(second))
        return out


class Flat(Spread):
    """The down projection writes one list of positions."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x.view(-1, 12) + self.fc2(F.gelu(self.fc1(x)).view(-1, 31))
        return out


@pytest.mark.parametrize(
    ("model", "words", "path"),
    [
        (Raw(), "its projection `matmul_1` is not a module", "w2_moe"),
        (Sloped(), "its activation reads slope, which no module of the activation holds", "fc2"),
        (Crossed(), "its block calls it again before it is done", "fc2"),
        (Flat(), "`linear_1` has another shape than what `linear` reads", "fc2"),
    ],
    ids=["parameters", "slope", "crossed", "flat"],
)
def test_what_has_no_place_in_the_module_tree_has_one_in_a_graph(model: nn.Module, words: str, path: str) -> None:
    with pytest.raises(RefusedError, match=f"{words}.*; convert the graph instead"):
        placed(model)
    place = placed(model, in_place=False)
    assert (place.path, place.bypassed, place.handing, place.dropout, place.axis) == (path, (), (), 0.0, -1)


@pytest.mark.parametrize("where", ["end", "around"])
def test_dropout_is_applied_once_in_training(where: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(40, 50, 12)
    model: Any = moeify.convert(Owner(**{where: 0.5}), MoEConfig(3, 2), example_inputs=X).train()
    dropped = (model(x) == x).float().mean()
    assert 0.47 < float(dropped) < 0.53


@torch.no_grad()
@pytest.mark.parametrize("make", [Mixed, Busy, Shared, Convolutions])
def test_placed_layers_compute_what_the_ffn_did(make: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = make().eval()
    before = model(X)
    moeify.convert(model, MoEConfig(3, 2), example_inputs=X)
    torch.testing.assert_close(model(X), before)
