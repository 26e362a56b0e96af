from __future__ import annotations

import re
from collections.abc import Callable
from operator import attrgetter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

from moeify.passes.find_ffn import Inspection, find_ffns_in
from moeify.tracing.stand_in import standing_in
from moeify.tracing.trace import trace

HIDDEN, INNER, TOKENS = 10, 23, 5


class Block(nn.Module):
    """A residual block whose region between the projections is given."""

    def __init__(self, region: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.region = region
        self.up, self.down = nn.Linear(HIDDEN, INNER), nn.Linear(INNER, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.down(self.region(self.up(x), x))
        return out


def reasons(model: nn.Module) -> dict[str, str]:
    found: Inspection = find_ffns_in(trace(model, torch.zeros(2, TOKENS, HIDDEN)))
    return {refusal.name: refusal.reason for refusal in found.refused}


REGIONS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], str]] = {
    "an input of the model": (
        lambda z, x: z.relu() + x[..., :1].tanh(),
        "it reads an input of the model, `x`, not only projections",
    ),
    "groups of neurons": (
        lambda z, x: torch.stack([z, z], -1).flatten(-2).relu()[..., :INNER],
        "`flatten` groups or joins the features of a position (heads of an attention?)",
    ),
    "a softmax among groups": (
        lambda z, x: torch.cat([(z[..., 2:].view(*z.shape[:-1], 7, 3).softmax(-1) / 2).flatten(-2), z[..., :2]], -1),
        "a softmax among groups of its intermediate values: codes, or classes",
    ),
    "a norm over positions": (
        lambda z, x: z.relu() * z.norm(dim=1, keepdim=True),
        "`linalg_vector_norm` is taken over another dimension than the features (positions, groups or experts)",
    ),
    "slopes for positions": (
        lambda z, x: F.prelu(z, torch.ones(TOKENS, device=z.device)),
        "`prelu` has a slope for each position, not for each feature",
    ),
    "a convolution": (
        lambda z, x: F.conv1d(z, torch.ones(TOKENS, TOKENS, 3), padding=1).relu(),
        "it is computed from `conv1d`, which mixes neighboring positions",
    ),
    "swapped dimensions": (
        lambda z, x: z.mT.relu().mT,
        "`m_t_1` moves dimensions (features with positions, or heads)",
    ),
    "a product of activations": (
        lambda z, x: (z @ z.mT).relu() @ z,
        "it is computed from `matmul_1`, a product of two activations: an attention",
    ),
    "an attention": (
        lambda z, x: F.scaled_dot_product_attention(z, z, z),
        "it is the output projection of an attention, `scaled_dot_product_attention`",
    ),
    "what nobody knows": (lambda z, x: z.roll(1, 1).relu(), "it is computed from `roll`, which is not position-wise"),
}


class Layers(Block):
    """Such a block, with layers that the region may call."""

    def __init__(self, inside: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__(lambda z, x: z)
        self.inside, self.norm, self.table = inside, nn.BatchNorm1d(INNER), nn.Embedding(7, INNER)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.down(self.inside(self, self.up(x)))
        return out


LAYERS: dict[str, tuple[Callable[[Any, Tensor], Tensor], str]] = {
    "a batch norm": (
        lambda m, z: m.norm(z.flatten(0, 1)).relu().view_as(z),
        "`batch_norm` normalizes over positions in training",
    ),
    "a table": (
        lambda m, z: z.relu() * m.table(z.argmax(-1)),
        "it reads rows of a table, `embedding`, not only projections",
    ),
    "a part of several": (lambda m, z: z.relu() * z.max(1, keepdim=True)[0], "it is computed from `max_1`, which"),
}


@pytest.mark.parametrize(("region", "reason"), LAYERS.values(), ids=LAYERS)
def test_what_layers_stand_between_the_projections(region: Callable[[Any, Tensor], Tensor], reason: str) -> None:
    assert reasons(Layers(region))["down"].startswith(reason)


def test_what_could_not_be_traced() -> None:
    model = Layers(lambda m, z: m.table(z))
    with standing_in([model.table], lambda x: x):
        assert reasons(model)["down"] == "it is computed from a module that could not be traced"


@pytest.mark.parametrize(("region", "reason"), REGIONS.values(), ids=REGIONS)
def test_what_stands_between_the_projections(region: Callable[[Tensor, Tensor], Tensor], reason: str) -> None:
    assert reasons(Block(region))["down"] == reason


def twice(layer: nn.Module, name: str) -> None:
    class Twice(nn.Module):
        def forward(self, value: Tensor) -> Tensor:
            return 2 * value

    nn.utils.parametrize.register_parametrization(layer, name, Twice())


COMPUTED: dict[str, Callable[[Any], object]] = {
    "weight_norm": lambda layer: nn.utils.parametrizations.weight_norm(layer),
    "orthogonal": lambda layer: nn.utils.parametrizations.orthogonal(layer),
    "another parametrization": lambda layer: twice(layer, "weight"),
    "a bias": lambda layer: twice(layer, "bias"),
    "old weight_norm": lambda layer: nn.utils.weight_norm(layer),
    "old spectral_norm": lambda layer: nn.utils.spectral_norm(layer),
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", 0.3),  # type: ignore[no-untyped-call]
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize("compute", COMPUTED.values(), ids=COMPUTED)
def test_a_computed_weight_is_a_plain_one_after_what_the_reason_says(compute: Callable[[Any], object]) -> None:
    model, x = Block(lambda z, x: z.relu()).eval(), torch.randn(2, TOKENS, HIDDEN)
    compute(model.down)
    expected = model(x)
    said = re.search(
        r"a computed (?:weight|bias): fold it in with torch\.(.*)\(module, '(\w+)'\)", reasons(model)["down"]
    )
    assert said is not None
    attrgetter(said[1])(torch)(model.down, said[2])
    torch.testing.assert_close(model(x), expected)
    found = find_ffns_in(trace(model, x))
    assert len(found.ffns) == 1 and not found.refused


def test_a_weight_that_is_computed_otherwise() -> None:
    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight / 2, self.bias)

    model = Block(lambda z, x: z.relu())
    model.down = Scaled(INNER, HIDDEN)
    assert reasons(model)["down"] == "`linear_1` multiplies by a computed weight (a parametrization? merge it first)"


def test_a_weight_that_is_no_matrix() -> None:
    class Stacked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Parameter(torch.zeros(1, HIDDEN, INNER))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.up

    assert reasons(Stacked())[""] == "`matmul` multiplies by up of shape (1, 10, 23), which is not one matrix"


def test_another_width_at_the_end_is_a_head() -> None:
    head = nn.Sequential(nn.Linear(HIDDEN, INNER), nn.ReLU(), nn.Linear(INNER, 7), nn.Softmax(-1))
    assert reasons(head)["2"] == "it projects to 7 features, not back to the hidden size 10: a head"


def test_another_width_before_a_product_of_activations_is_an_attention() -> None:
    class Scores(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.narrow, self.wide = nn.Linear(HIDDEN, 6), nn.Linear(6, 14)

        def forward(self, x: Tensor) -> Tensor:
            wide: Tensor = self.wide(self.narrow(x).tanh())
            return wide @ wide.mT

    assert (
        reasons(Scores())["wide"] == "it projects to 14 features, not back to the hidden size 10: part of an attention"
    )


def test_another_size_in_the_middle_of_a_model_is_no_ffn() -> None:
    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.narrow, self.wide, self.last = nn.Linear(HIDDEN, 6), nn.Linear(6, 14), nn.Linear(14, 3)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.last(self.wide(self.narrow(x).tanh()).tanh())
            return out

    assert reasons(Joined())["wide"] == "it projects to 14 features, not back to the hidden size 10: no FFN"
