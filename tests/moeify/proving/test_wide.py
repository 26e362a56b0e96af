from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moeify.proving.wide import exact_weights, first_tensor, in_float64

X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(4, 3)


def test_weights_are_widened_and_stay_what_they_are() -> None:
    layer = linear()
    y, narrowed = in_float64(layer, X)
    assert y is not None and y.equal(F.linear(X.double(), layer.weight.double(), layer.bias.double())) and not narrowed
    assert layer.weight.dtype == torch.float32


class Casting(nn.Module):
    """Casts to the dtype of its weights, as T5 does."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = linear()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x.to(self.inner.weight.dtype))
        return y


class Narrow(Casting):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x.float())
        return y.to(x.dtype)


class Failing(Casting):
    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("no kernel for this dtype")


def test_a_module_that_casts_to_the_dtype_of_its_weights_gets_wide_ones() -> None:
    y, narrowed = in_float64(Casting(), X)
    assert y is not None and not narrowed
    assert y.equal(F.linear(X.double(), linear().weight.double(), linear().bias.double()))


def test_what_computes_in_less_is_known() -> None:
    y, narrowed = in_float64(Narrow(), X)
    assert y is not None and y.dtype == torch.float64 and narrowed
    assert in_float64(Failing(), X)[0] is None


class Layer(nn.Module):
    """Holds experts that give the weights they were called with."""

    class Experts(nn.Module):
        def forward(self, x: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
            return top_k_weights

    def __init__(self) -> None:
        super().__init__()
        self.experts = self.Experts()


def test_the_rounding_of_a_sum_is_taken_out_and_a_wrong_sum_is_not() -> None:
    layer, ids = Layer(), torch.zeros(2, 3, dtype=torch.long)
    third, off = torch.full((2, 3), 1 / 3), torch.full((2, 3), 0.3)
    assert third.double().sum(-1).sub(1).abs().min() > 1e-9
    with exact_weights(layer) as seen:
        for call in (layer.experts(X, ids, third), layer.experts(X, ids, top_k_weights=third)):
            assert (call.sum(-1) - 1).abs().max() < 1e-15 and call.dtype == torch.float64
        assert (layer.experts(X, ids, 2.5 * third).sum(-1) - 2.5).abs().max() < 1e-15
        assert (layer.experts(X, ids, off).sum(-1) - 0.9).abs().max() < 1e-6
    assert len(seen) == 4
    assert layer.experts(X, ids, third) is third


def test_what_stands_beside_an_output_is_left_out() -> None:
    assert first_tensor((X, 1)) is X and first_tensor(X) is X
    assert first_tensor(()) is None and first_tensor("x") is None
