from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from moeify.measure import TOLERANCE
from moeify.passes.find_ffn import FFN, find_ffns_in
from moeify.tracing.trace import trace

HIDDEN, INNER = 10, 23


class Block(nn.Module):
    """x + down(region(up_0(x), up_1(x), …)), with as many projections as `widths`."""

    def __init__(self, region: Callable[..., torch.Tensor], *widths: int) -> None:
        super().__init__()
        self.region = region
        self.ups = nn.ModuleList(nn.Linear(HIDDEN, width) for width in widths)
        self.down = nn.Linear(INNER, HIDDEN)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        down: torch.Tensor = self.down(self.region(*(up(x) for up in self.ups)))
        return x + down


def find_one(model: nn.Module) -> FFN:
    found = find_ffns_in(trace(model, torch.zeros(2, 5, HIDDEN)))
    assert len(found.ffns) == 1, found.refused
    return found.ffns[0]


NAMED: dict[str, list[Callable[[torch.Tensor], torch.Tensor]]] = {
    "silu": [F.silu, lambda x: x * x.sigmoid(), lambda x: x / (1 + (-x).exp())],
    "gelu": [F.gelu, lambda x: 0.5 * x * (1 + (x / 2**0.5).erf())],
    "gelu_tanh": [
        lambda x: F.gelu(x, approximate="tanh"),
        lambda x: 0.5 * x * (1 + (0.7978845608028654 * (x + 0.044715 * x**3)).tanh()),
    ],
    "relu": [F.relu, lambda x: x.clamp(min=0), lambda x: (x + x.abs()) / 2],
    "relu2": [lambda x: F.relu(x) ** 2, lambda x: x * F.relu(x)],
    "quick_gelu": [lambda x: x * torch.sigmoid(1.702 * x)],
    "sigmoid": [torch.sigmoid],
    "tanh": [torch.tanh, lambda x: 2 * torch.sigmoid(2 * x) - 1],
    "mish": [F.mish, lambda x: x * F.softplus(x).tanh()],
}
FORMULAS = [(name, formula) for name, formulas in NAMED.items() for formula in formulas]


@pytest.mark.parametrize(("name", "formula"), FORMULAS)
def test_an_activation_is_named_by_its_values(name: str, formula: Callable[[torch.Tensor], torch.Tensor]) -> None:
    assert find_one(Block(formula, INNER)).activation == name


@pytest.mark.parametrize(("constant", "rounded"), [(0.7978845608028654, False), (0.79788456, True)])
def test_a_name_that_fits_up_to_rounding_is_told_apart(constant: float, rounded: bool) -> None:
    found = find_one(Block(lambda x: 0.5 * x * (1 + (constant * (x + 0.044715 * x**3)).tanh()), INNER))
    assert found.activation == "gelu_tanh" and found.rounded == rounded


@pytest.mark.parametrize("name", NAMED)
def test_the_gate_is_the_half_that_goes_through_the_activation(name: str) -> None:
    act = NAMED[name][-1]
    cases: list[tuple[Callable[..., torch.Tensor], tuple[int, ...], tuple[int, ...], tuple[int, ...]]] = [
        (lambda a, b: act(a) * b, (INNER, INNER), (0, 0, INNER, 1), (1, 0, INNER, 1)),
        (lambda a, b: a * act(b), (INNER, INNER), (1, 0, INNER, 1), (0, 0, INNER, 1)),
        (lambda z: act(z[..., :INNER]) * z[..., INNER:], (2 * INNER,), (0, 0, INNER, 1), (0, INNER, 2 * INNER, 1)),
        (
            lambda z: z.chunk(2, -1)[0] * act(z.chunk(2, -1)[1]),
            (2 * INNER,),
            (0, INNER, 2 * INNER, 1),
            (0, 0, INNER, 1),
        ),
        (lambda z: act(z[..., ::2]) * z[..., 1::2], (2 * INNER,), (0, 0, 2 * INNER, 2), (0, 1, 2 * INNER, 2)),
    ]
    for region, widths, gate, up in cases:
        ffn = find_one(Block(region, *widths))
        assert (ffn.kind, ffn.activation) == ("glu", name)
        assert ffn.gate_up_rows is not None
        assert (ffn.gate_up_rows.gate, ffn.gate_up_rows.up) == (gate, up)


def test_a_gate_without_an_activation_is_bilinear() -> None:
    ffn = find_one(Block(lambda a, b: a * b, INNER, INNER))
    assert (ffn.kind, ffn.activation) == ("glu", "identity")


CUSTOM: dict[str, tuple[Callable[..., torch.Tensor], tuple[int, ...]]] = {
    "a formula of its own": (lambda x: x.sin() * x.clamp(-3, 3), (INNER,)),
    "three projections": (lambda a, b, c: F.silu(a) * b * c.sigmoid(), (INNER, INNER, INNER)),
    "a clamped GLU": (lambda a, b: F.silu(a.clamp(max=7)) * (b.clamp(-7, 7) + 1), (INNER, INNER)),
    "a gate of another slope": (lambda a, b: a * torch.sigmoid(1.5 * a) * b, (INNER, INNER)),
    "nearly a gelu": (lambda x: F.gelu(x) * 1.0001, (INNER,)),
    "a norm inside": (lambda x: F.layer_norm(F.relu(x), (INNER,)), (INNER,)),
}


@pytest.mark.parametrize(("region", "widths"), CUSTOM.values(), ids=CUSTOM)
def test_an_activation_that_nobody_named_is_kept_as_a_graph(
    region: Callable[..., torch.Tensor], widths: tuple[int, ...]
) -> None:
    ffn = find_one(Block(region, *widths))
    assert (ffn.activation, ffn.gate_up_rows) == ("custom", None)
    inputs = [torch.randn(3, 7, 2, width, dtype=torch.float64) for width in widths]  # not the traced leading shape
    torch.testing.assert_close(ffn.region(*inputs), region(*inputs), rtol=TOLERANCE["float64"], atol=0)


@pytest.mark.parametrize("leading", [(), (1,), (3, 7), (2, 3, 4, 5)])
def test_a_region_works_for_any_leading_shape(leading: tuple[int, ...]) -> None:
    region = find_one(Block(lambda z: F.glu(z.reshape(10, 2 * INNER), 1).reshape(2, 5, INNER), 2 * INNER)).region
    z = torch.randn(*leading, 2 * INNER)
    torch.testing.assert_close(region(z), F.glu(z, -1))


class LearnedActivation(nn.Module):
    """a·relu(x) + b·x with a learned a and a learned b for each neuron."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(()))
        self.b = nn.Parameter(torch.randn(INNER))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.a * x.relu() + self.b * x


def test_parameters_of_a_learned_activation_come_along() -> None:
    act = LearnedActivation()
    ffn = find_one(Block(act, INNER))
    assert ffn.activation == "custom"
    assert {"region.a", "region.b"} <= set(ffn.parameters)
