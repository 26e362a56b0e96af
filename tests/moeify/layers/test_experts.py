from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moeify.kernels import reference
from moeify.layers import Experts
from moeify.measure import TOLERANCE
from tests.moeify.layers.make import HIDDEN, INTERMEDIATE, inputs

IDS = torch.tensor([[0, 3], [2, 2], [4, 5], [1, 0], [5, 5], [3, 4], [0, 1]])  # 5 is none of 5 experts
WEIGHTS = torch.linspace(0.1, 1.4, 14, dtype=torch.float64).view(7, 2)


def stack(gated: bool = True, bias: bool = False, **options: Any) -> Experts:
    rows = 2 * INTERMEDIATE if gated else INTERMEDIATE
    made = Experts(HIDDEN, INTERMEDIATE, num_experts=5, activation="silu", gated=gated, up_rows=rows, up_bias=bias,
                   down_bias=bias, dtype=torch.float64, **options)  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    for parameter in made.parameters():
        nn.init.normal_(parameter, generator=generator)
    return made


def expected(experts: Experts, x: Tensor) -> Tensor:
    return reference.experts(x, IDS, WEIGHTS, experts.up, experts.down_proj, experts.up_bias, experts.down_proj_bias,
                             "silu", experts.has_gate)  # fmt: skip


class Silu(nn.Module):
    """What a captured activation is: a module of the up projections."""

    def forward(self, gate: Tensor, up: Tensor | None = None) -> Tensor:
        activated = nn.functional.silu(gate)
        return activated if up is None else activated * up


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("way", ["operator", "region", "dropout of nothing"])
def test_every_way_to_run_gives_the_weighted_sum(way: str, bias: bool, gated: bool) -> None:
    widths = (INTERMEDIATE,) * (2 if gated else 1)
    options: dict[str, dict[str, Any]] = {
        "region": {"region": Silu(), "region_widths": widths},
        "dropout of nothing": {"dropout": 1e-30},
    }
    experts, x = stack(gated, bias, **options.get(way, {})), inputs(7, dtype=torch.float64)
    found, wanted = experts(x, IDS, WEIGHTS), expected(experts, x)
    assert (found - wanted).abs().max() <= TOLERANCE["float64"] * wanted.abs().max()
    assert found[4].eq(0).all()  # no expert


def test_dropout_is_for_training() -> None:
    experts, x = stack(dropout=0.5), inputs(7, dtype=torch.float64)
    torch.testing.assert_close(experts.eval()(x, IDS, WEIGHTS), expected(experts, x))
    assert not torch.allclose(experts.train()(x, IDS, WEIGHTS), expected(experts, x))


def test_names_of_the_parameters_and_repr() -> None:
    assert [name for name, _ in stack(bias=True).named_parameters()] == [
        "gate_up_proj", "down_proj", "gate_up_proj_bias", "down_proj_bias"
    ]  # fmt: skip
    assert [name for name, _ in stack(gated=False).named_parameters()] == ["up_proj", "down_proj"]
    assert repr(stack()) == "Experts(5 x silu GLU 13 → 17 → 13)"
    assert repr(stack(gated=False)) == "Experts(5 x silu MLP 13 → 17 → 13)"
