from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from moeify.passes.matching.projection import Projection, as_projection, find_projections
from moeify.tracing.trace import trace

Function = Callable[..., torch.Tensor]


class Product(nn.Module):
    def __init__(self, function: Function, *weight_shape: int) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.empty(weight_shape))
        self.bias = nn.Parameter(torch.empty(7))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x, self.weight, self.bias)


def projections_of(model: nn.Module, *input_shape: int) -> list[Projection]:
    return list(find_projections(trace(model, torch.zeros(input_shape)).graph).values())


LINEAR: dict[str, tuple[Function, tuple[int, ...], str | None, bool]] = {
    "F.linear": (lambda x, w, b: F.linear(x, w, b), (7, 12), "bias", False),
    "F.linear without bias": (lambda x, w, b: F.linear(x, w), (7, 12), None, False),
    "F.linear of a transpose": (lambda x, w, b: F.linear(x, w.t()), (12, 7), None, True),
    "x @ w": (lambda x, w, b: x @ w, (12, 7), None, True),
    "x @ w.T": (lambda x, w, b: x @ w.T, (7, 12), None, False),
    "x @ w + b": (lambda x, w, b: x @ w + b, (12, 7), "bias", True),
    "b + x @ w": (lambda x, w, b: b + x @ w, (12, 7), "bias", True),
    "mm": (lambda x, w, b: x.reshape(10, 12).mm(w), (12, 7), None, True),
    "addmm": (lambda x, w, b: torch.addmm(b, x.reshape(10, 12), w), (12, 7), "bias", True),
    "a cast weight": (lambda x, w, b: F.linear(x.double(), w.double()), (7, 12), None, False),
    "einsum": (lambda x, w, b: torch.einsum("btd,df->btf", x, w), (12, 7), None, True),
    "einsum the other way": (lambda x, w, b: torch.einsum("b t d, f d -> b t f", x, w), (7, 12), None, False),
}


@pytest.mark.parametrize(("function", "weight_shape", "bias", "transposed"), LINEAR.values(), ids=LINEAR)
def test_projections_and_how_their_weight_is_stored(
    function: Function, weight_shape: tuple[int, ...], bias: str | None, transposed: bool
) -> None:
    (found,) = projections_of(Product(function, *weight_shape), 2, 5, 12)
    assert (found.weight, found.bias, found.transposed) == ("weight", bias, transposed)
    assert (found.in_features, found.out_features, found.axis) == (12, 7, -1)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_a_convolution_over_one_position_is_a_projection_of_channels(rank: int) -> None:
    conv = getattr(F, f"conv{rank}d")
    model = Product(lambda x, w, b: conv(x, w, b), 7, 12, *[1] * rank)
    (found,) = projections_of(model, 2, 12, *[5] * rank)
    assert (found.in_features, found.out_features, found.axis) == (12, 7, -1 - rank)
    assert (found.weight, found.bias, found.transposed) == ("weight", "bias", False)


# Each is one of the projections above with one thing changed.
OTHER: dict[str, tuple[Function, tuple[int, ...]]] = {
    "a product of two activations": (lambda x, w, b: x @ x.transpose(1, 2), (12, 7)),
    "a product over positions": (lambda x, w, b: w @ x, (3, 5)),
    "a sum over two dimensions": (lambda x, w, b: torch.einsum("btd,td->b", x, w), (5, 12)),
    "a weight for each batch": (lambda x, w, b: x @ w, (2, 12, 7)),
    "a computed weight": (lambda x, w, b: F.linear(x, w / w.norm()), (7, 12)),
    "a computed bias": (lambda x, w, b: F.linear(x, w, 2 * b), (7, 12)),
    "a scaled bias": (lambda x, w, b: torch.addmm(b, x.reshape(10, 12), w, beta=2), (12, 7)),
    "a scaled product": (lambda x, w, b: torch.addmm(b, x.reshape(10, 12), w, alpha=2), (12, 7)),
}


@pytest.mark.parametrize(("function", "weight_shape"), OTHER.values(), ids=OTHER)
def test_what_is_no_projection(function: Function, weight_shape: tuple[int, ...]) -> None:
    assert projections_of(Product(function, *weight_shape), 2, 5, 12) == []


def test_a_bias_for_each_position_is_no_bias() -> None:
    class Table(nn.Module):
        def __init__(self, *shape: int) -> None:
            super().__init__()
            self.w, self.table = nn.Parameter(torch.empty(12, 7)), nn.Parameter(torch.empty(shape))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.addmm(self.table, x, self.w)

    assert [p.bias for p in projections_of(Table(7), 5, 12)] == ["table"]
    assert projections_of(Table(5, 7), 5, 12) == []


EINSUMS: dict[str, bool] = {
    "btd,df->btf": True,
    "btd,df->tbf": False,  # the leading letters are permuted
    "btd,df->bft": False,
    "btd,df->bt": False,
    "btd,tf->bdf": False,  # over positions
    "bdd,df->bdf": False,  # a diagonal
    "bfd,df->bff": False,
    "btd,df": False,  # no result is named
}


@pytest.mark.parametrize("equation", EINSUMS)
def test_an_einsum_is_a_projection_if_it_contracts_the_last_letter_and_leaves_the_others(equation: str) -> None:
    graph = fx.Graph()
    x, w = graph.placeholder("x"), graph.create_node("get_attr", "w")
    x.meta["val"], w.meta["val"] = torch.empty(6, 6, 6), torch.empty(6, 6)
    node = graph.call_function(torch.ops.aten.einsum.default, (equation, [x, w]))
    node.meta["val"] = torch.empty(6, 6, 6)
    assert (as_projection(node) is not None) == EINSUMS[equation]


CONVOLUTIONS: dict[str, tuple[Function, tuple[int, ...], bool]] = {
    "over one position": (lambda x, w, b: F.conv1d(x, w, b), (7, 12, 1), True),
    "over neighbours": (lambda x, w, b: F.conv1d(x, w, b), (7, 12, 3), False),
    "over neighbours, as many as before": (lambda x, w, b: F.conv1d(x, w, b, padding="same"), (7, 12, 3), False),
    "over one position, with nothing padded": (lambda x, w, b: F.conv1d(x, w, b, padding="same"), (7, 12, 1), True),
    "strided": (lambda x, w, b: F.conv1d(x, w, b, stride=2), (7, 12, 1), False),
    "padded": (lambda x, w, b: F.conv1d(x, w, b, padding=1), (7, 12, 1), False),
    "in groups": (lambda x, w, b: F.conv1d(x, w, groups=2), (6, 6, 1), False),
    "of a computed weight": (lambda x, w, b: F.conv1d(x, 2 * w, b), (7, 12, 1), False),
}


@pytest.mark.parametrize(("function", "weight_shape", "expected"), CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_a_convolution_is_a_projection_if_it_sees_one_position(
    function: Function, weight_shape: tuple[int, ...], expected: bool
) -> None:
    assert bool(projections_of(Product(function, *weight_shape), 2, 12, 5)) == expected


ADDED: dict[str, tuple[Function, str | None]] = {
    "a parameter": (lambda x, w, b: x @ w + b, "bias"),
    "a number": (lambda x, w, b: x @ w + 1.0, None),
    "a parameter for each position": (lambda x, w, b: x @ w + b.expand(5, 7), None),
    "a computed value": (lambda x, w, b: x @ w + 2 * b, None),
    "itself": (lambda x, w, b: (y := x @ w) + y, None),
    "a scaled parameter": (lambda x, w, b: torch.add(x @ w, b, alpha=2), None),
    "a parameter, where the product is used elsewhere too": (lambda x, w, b: (y := x @ w) + b + y.sum(), None),
}


@pytest.mark.parametrize(("function", "bias"), ADDED.values(), ids=ADDED)
def test_a_parameter_that_is_added_is_the_bias(function: Function, bias: str | None) -> None:
    (found,) = projections_of(Product(function, 12, 7), 2, 5, 12)
    assert found.bias == bias
    assert (found.node is found.product) == (bias is None)


def test_a_projection_that_has_a_bias_takes_no_other() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.second = nn.Linear(12, 7), nn.Parameter(torch.empty(7))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.linear(x) + self.second
            return out

    (found,) = projections_of(Twice(), 2, 5, 12)
    assert found.bias == "linear.bias"
    assert found.node is found.product
