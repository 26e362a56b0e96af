from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from moeify.passes.matching.projection import Projection, find_projections
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


OTHER: dict[str, tuple[Function, tuple[int, ...]]] = {
    "a product of two activations": (lambda x, w, b: x @ x.transpose(1, 2), (1,)),
    "a product over positions": (lambda x, w, b: w @ x, (3, 5)),
    "a sum over two dimensions": (lambda x, w, b: torch.einsum("btd,td->b", x, w), (5, 12)),
    "a scaled addmm": (lambda x, w, b: torch.addmm(b, x.reshape(10, 12), w, beta=2), (12, 7)),
    "a computed weight": (lambda x, w, b: F.linear(x, w / w.norm()), (7, 12)),
    "a weight for each batch": (lambda x, w, b: x @ w, (2, 12, 7)),
}
CONV: dict[str, Function] = {
    "a convolution over neighbours": lambda x, w, b: F.conv1d(x, w.expand(7, 12, 3)),
    "a strided convolution": lambda x, w, b: F.conv1d(x, w, stride=2),
    "a padded convolution": lambda x, w, b: F.conv1d(x, w, padding=1),
    "a grouped convolution": lambda x, w, b: F.conv1d(x, w[:6, :6], groups=2),
}


@pytest.mark.parametrize(("function", "weight_shape"), OTHER.values(), ids=OTHER)
def test_what_is_no_projection(function: Function, weight_shape: tuple[int, ...]) -> None:
    assert projections_of(Product(function, *weight_shape), 2, 5, 12) == []


@pytest.mark.parametrize("function", CONV.values(), ids=CONV)
def test_a_convolution_that_sees_more_than_one_position_is_no_projection(function: Function) -> None:
    assert projections_of(Product(function, 7, 12, 1), 2, 12, 5) == []


def test_a_sum_with_something_wider_is_no_bias() -> None:
    (found,) = projections_of(Product(lambda x, w, b: x @ w + b.expand(5, 7), 12, 7), 2, 5, 12)
    assert found.bias is None
