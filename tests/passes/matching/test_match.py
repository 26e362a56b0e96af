"""Each refusal starts from a model whose FFN is found, changes one thing, and asks for the reason."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.passes.blocks import HIDDEN, INTERMEDIATE, TOKENS, Function, Mlp, Model, find, only_reason, residual

Region = Callable[[Model, Tensor, Tensor], Tensor]


class Between(nn.Module):
    """x + down(region(up(x))): the region is given the model, the projected values and x; `mlps[1]` is a projection."""

    def __init__(self, region: Region) -> None:
        super().__init__()
        self.model = Model(
            lambda m, x: x + m.mlps[0].down(region(m, m.mlps[0].up(x), x)), Mlp(), nn.Linear(HIDDEN, INTERMEDIATE)
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.model(x)
        return out


def reason_for(region: Region) -> str:
    found = find(Between(region))
    assert found.ffns == ()
    return only_reason(found, "model.mlps.0.down")


ACCEPTED: dict[str, Region] = {
    "an activation": lambda m, z, x: z.relu(),
    "a product with another projection": lambda m, z, x: z.relu() * m.mlps[1](x),
    "a choice among the neurons": lambda m, z, x: z.relu() * (z >= z.topk(5, -1).values[..., -1:]),
    "a norm over the neurons": lambda m, z, x: z.relu() / z.norm(dim=-1, keepdim=True),
    "a cast and dropout": lambda m, z, x: F.dropout(z.double().relu().float(), 0.1, False),
}


@pytest.mark.parametrize("region", ACCEPTED.values(), ids=ACCEPTED)
def test_what_an_ffn_may_compute_between_its_projections(region: Region) -> None:
    assert len(find(Between(region)).ffns) == 1


REFUSED: dict[str, tuple[Region, str]] = {
    "nothing": (lambda m, z, x: z, "no nonlinearity between the projections: a low-rank factor"),
    "sums and scalings": (lambda m, z, x: 2 * z - z / 3 + 1, "no nonlinearity between the projections"),
    "a softmax": (
        lambda m, z, x: z.softmax(-1),
        "a softmax over its intermediate values: classes fed back, or attention to a memory",
    ),
    "a choice among something else": (
        lambda m, z, x: z.relu() * z[..., :4].topk(1, -1).values,
        "`topk` chooses, but not among its intermediate values: a router",
    ),
    "a projection of something else": (
        lambda m, z, x: z.relu() * m.mlps[1](x.roll(1, 1)),
        "the projections before it read different activations: model.mlps.0.up and model.mlps.1",
    ),
    "an adapter beside the up projection": (
        lambda m, z, x: (z + m.mlps[1](m.other(x))).relu(),
        "the projections before it read different activations: model.mlps.0.up and model.mlps.1 "
        "(an adapter? merge it first)",
    ),
    "a sum over earlier positions": (
        lambda m, z, x: z.relu().cumsum(1) * z,
        "`cumsum` is taken over another dimension than the features (positions, groups or experts)",
    ),
    "a sum over positions": (
        lambda m, z, x: z.relu() * z.sum(1, keepdim=True),
        "`sum_1` is taken over another dimension than the features (positions, groups or experts)",
    ),
}


@pytest.mark.parametrize(("region", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_an_ffn_may_not_compute_between_its_projections(region: Region, reason: str) -> None:
    assert reason_for(region).startswith(reason)


AROUND: dict[str, tuple[Function, str]] = {
    "a value that is used twice": (
        lambda m, x: x + m.mlps[0].down(u := m.mlps[0].up(x).relu()) + u.sum(),
        "its intermediate value `relu` is also used by `sum_1`",
    ),
    "projected values that are used twice": (
        lambda m, x: x + m.mlps[0].down((z := m.mlps[0].up(x)).relu()) + z.sum(),
        "its intermediate value `linear` is also used by `sum_1`",
    ),
    "an adapter beside the down projection": (
        lambda m, x: x + m.mlps[0].down(u := m.mlps[0].up(x).relu()) + m.mlps[1].down(u),
        "mlps.1.down projects its intermediate value too (an adapter? merge it first)",
    ),
    "no residual connection": (
        lambda m, x: m.mlps[0](m.norm(x)).tanh(),
        "its result does not join the residual stream: a head, pooler or gate",
    ),
    "another hidden size": (
        lambda m, x: x + m.mlps[1].down(m.mlps[0].up(x).relu()).sum(-1, keepdim=True),
        "it projects to 7 features, not back to the hidden size 10: a head",
    ),
}


@pytest.mark.parametrize(("function", "reason"), AROUND.values(), ids=AROUND)
def test_what_may_not_stand_around_an_ffn(function: Function, reason: str) -> None:
    other = Mlp()
    refused = "mlps.0.down"
    if "7 features" in reason:
        other.down, refused = nn.Linear(INTERMEDIATE, 7), "mlps.1.down"
    found = find(Model(function, Mlp(), other))
    assert found.ffns == ()
    assert only_reason(found, refused) == reason


class Glu(nn.Module):
    def __init__(self, hidden: int, intermediate: int) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(hidden, intermediate), nn.Linear(hidden, intermediate)
        self.down = nn.Linear(intermediate, hidden)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return out


class Wide(nn.Module):
    def __init__(self, ffn: nn.Module) -> None:
        super().__init__()
        self.ffn = ffn

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.ffn(x)
        return out


@pytest.mark.parametrize(
    ("kind", "hidden", "smallest"), [(Mlp, 40, 11), (Mlp, 41, 11), (Mlp, 44, 12), (Glu, 64, 5), (Glu, 65, 5)]
)
def test_the_smallest_intermediate_size(kind: Callable[[int, int], nn.Module], hidden: int, smallest: int) -> None:
    assert [ffn.intermediate for ffn in find(Wide(kind(hidden, smallest)), 2, TOKENS, hidden).ffns] == [smallest]
    found = find(Wide(kind(hidden, smallest - 1)), 2, TOKENS, hidden)
    assert found.ffns == ()
    size = f"({smallest - 1})"
    expected = f"its intermediate size {size} is a bottleneck beside the hidden size {hidden}: an adapter"
    assert only_reason(found, "ffn.down") == expected


def test_a_walk_that_followed_the_residual_stream_is_no_near_miss() -> None:
    """A head on the sum of the layers' results looks back at projections that read different activations."""
    model = residual(Mlp())
    head = nn.Sequential(model, nn.Linear(HIDDEN, HIDDEN))
    found = find(head)
    assert [ffn.name for ffn in found.ffns] == ["0.mlps.0"]
    assert found.refused == ()


def test_without_any_ffn_every_projection_is_listed() -> None:
    found = find(nn.Sequential(nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, HIDDEN)))
    assert [(refusal.name, refusal.reason) for refusal in found.refused] == [
        ("1", "it reads an input of the model, `input_1`, not only projections")
    ]


def test_a_projection_of_a_parameter_has_nothing_before_it() -> None:
    found = find(Model(lambda m, x: m.norm(x) + F.linear(m.norm.weight[None], m.other.weight)))
    assert [refusal.reason for refusal in found.refused] == ["nothing is projected before it"]


def test_a_computed_weight_is_refused_and_a_constant_is_no_weight() -> None:
    def run(m: Model, x: Tensor) -> Tensor:
        turned = F.linear(x, torch.eye(HIDDEN, device=x.device))
        out: Tensor = x + F.linear(turned, m.other.weight / 2) + m.mlps[0](x)
        return out

    found = find(Model(run, Mlp()))
    assert [ffn.name for ffn in found.ffns] == ["mlps.0"]
    assert [refusal.reason for refusal in found.refused] == [
        "`linear_1` multiplies by a computed weight (a parametrization? merge it first)"
    ]
