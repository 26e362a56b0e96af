"""The experts by every implementation that transformers has, forward and gradients, against ours."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moeify.contract.stock_experts import offer_stock_experts
from moeify.errors import RefusedError
from moeify.layers import Experts
from moeify.layers.implementations import compute
from moeify.measure import TOLERANCE, relative_difference

HIDDEN, INTERMEDIATE, COUNT, TOKENS = 12, 20, 5, 17  # grouped_mm wants rows of whole 16 bytes
FORMS: dict[str, dict[str, Any]] = {
    "glu": {"activation": "silu", "gated": True},
    "glu with biases": {"activation": "gelu", "gated": True, "up_bias": True, "down_bias": True},
    "mlp": {"activation": "relu", "gated": False},
    "mlp with biases": {"activation": "gelu_tanh", "gated": False, "up_bias": True, "down_bias": True},
    "custom": {"activation": "custom", "gated": False},
}


class Product(nn.Module):
    """An activation of its own, with a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(0.7))

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        return torch.sin(first) * second * self.slope


def experts(form: str) -> Experts:
    options = dict(FORMS[form])
    rows = 2 * INTERMEDIATE if options["gated"] or form == "custom" else INTERMEDIATE
    if form == "custom":
        options |= {"region": Product(), "region_widths": (INTERMEDIATE, INTERMEDIATE)}
    made = Experts(HIDDEN, INTERMEDIATE, num_experts=COUNT, up_rows=rows, **options)
    torch.manual_seed(0)
    for parameter in made.parameters():
        if parameter.dim():
            nn.init.normal_(parameter, std=0.5)
    return made


def run(made: Experts, name: str, ids: Tensor) -> dict[str, Tensor]:
    """The output and every gradient."""
    torch.manual_seed(1)
    made.config = SimpleNamespace(_experts_implementation=name)
    x, weights = torch.randn(TOKENS, HIDDEN, requires_grad=True), torch.rand(TOKENS, 2, requires_grad=True)
    made.zero_grad()
    out = made(x, ids, weights)
    out.square().sum().backward()
    grads = {name: p.grad for name, p in made.named_parameters()} | {"x": x.grad, "weights": weights.grad}
    return {"out": out.detach(), **{name: grad for name, grad in grads.items() if grad is not None}}


@pytest.mark.parametrize("name", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dropped", [False, True])
def test_every_implementation_computes_what_ours_does(form: str, name: str, dropped: bool) -> None:
    made = experts(form)
    ids = torch.stack([torch.randperm(COUNT - 1)[:2] for _ in range(TOKENS)])  # the last expert has no token
    if dropped:
        ids[3, 1], ids[5], ids[6, 0] = COUNT, COUNT, -1
    expected, found = run(made, "moeify", ids), run(made, name, ids)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert relative_difference(found[key], value) <= TOLERANCE["float32"], key


def test_the_loop_adds_up_in_the_dtype_of_the_weights() -> None:
    """What bfloat16 would lose one by one, 1 + 2^-9 four times, is not lost."""
    made = Experts(HIDDEN, INTERMEDIATE, num_experts=COUNT, up_rows=INTERMEDIATE, activation="relu", gated=False,
                   up_bias=True, down_bias=True).bfloat16()  # fmt: skip
    for name, parameter in made.named_parameters():
        nn.init.constant_(parameter, float(name == "down_proj_bias"))
    ids, weights = torch.arange(COUNT)[None], torch.tensor([[1.0, *[2.0**-9] * 4]])
    out = compute(made, "eager", torch.ones(1, HIDDEN, dtype=torch.bfloat16), ids, weights)
    assert out.dtype == torch.bfloat16 and out.tolist() == [[1 + 2.0**-7] * HIDDEN]


def test_the_attributes_are_those_of_transformers_experts() -> None:
    made = experts("glu with biases")
    named = {"num_experts": COUNT, "hidden_dim": HIDDEN, "intermediate_dim": INTERMEDIATE, "has_gate": True,
             "has_bias": True, "is_transposed": False, "is_concatenated": True}  # fmt: skip
    assert {name: getattr(made, name) for name in named} == named
    x = torch.randn(3, INTERMEDIATE)
    assert torch.equal(made.act_fn(x), nn.functional.gelu(x))


def test_an_implementation_that_nobody_knows_is_refused() -> None:
    offer_stock_experts()
    with pytest.raises(RefusedError, match="'fast' is no implementation of experts: choose one of batched_mm"):
        run(experts("glu"), "fast", torch.zeros(TOKENS, 2, dtype=torch.long))


def test_what_an_implementation_cannot_compute_is_said_with_what_can() -> None:
    ids = torch.zeros(TOKENS, 2, dtype=torch.long)
    half = Experts(HIDDEN, INTERMEDIATE, num_experts=COUNT, up_rows=INTERMEDIATE, activation="relu", gated=False,
                   up_bias=True)  # fmt: skip
    with pytest.raises(RefusedError, match="one projection has a bias and the other has none: call set_experts"):
        run(half, "batched_mm", ids)
    assert run(half, "eager", ids).keys() == run(half, "moeify", ids).keys()
    odd = Experts(HIDDEN, 19, num_experts=COUNT, up_rows=19, activation="relu", gated=False)
    with pytest.raises(RefusedError, match=r"'grouped_mm' cannot compute these experts \(.*16 bytes.*'moeify'"):
        run(odd, "grouped_mm", ids)
