from __future__ import annotations

import pytest
import torch

from moeify.kernels.activations import ACTIVATIONS, find_activation
from moeify.measure import TOLERANCE, probe, relative_difference
from tests.kernels import oracle


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_values_and_derivatives_are_those_of_the_definition(name: str) -> None:
    x = probe(2, 64).requires_grad_()
    grad = probe(2, 64, seed=1)
    expected = oracle.ACTIVATIONS[name](x)
    (derivative,) = torch.autograd.grad(expected, x, grad)
    activation = find_activation(name)
    assert relative_difference(activation.forward(x), expected) <= TOLERANCE["float64"]
    assert relative_difference(activation.backward(grad, x.detach()), derivative) <= TOLERANCE["float64"]


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_what_is_not_a_number_stays_so(name: str) -> None:
    assert find_activation(name).forward(torch.tensor([torch.nan])).isnan().all()


def test_an_unknown_name_lists_the_known_and_says_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"^unknown activation 'mish': expected one of silu, .*; compose any other"):
        find_activation("mish")
