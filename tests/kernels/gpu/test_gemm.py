"""The masks of the inner loops, in each of the ways in which widths and tiles fit; `conftest` checks every address."""

from __future__ import annotations

import pytest
import torch

from moeify.kernels.gpu import experts, tuned_tiles
from moeify.kernels.gpu.tiles import Tile
from moeify.kernels.inputs import ExpertInputs, Kept
from moeify.kernels.layout import sort_by_expert
from moeify.kernels.ops import grouped_linear
from moeify.measure import TOLERANCE, relative_difference
from tests.kernels import oracle

TILE = Tile(16, 32, 16, 4, 2)
WIDTHS = [(32, 64), (32, 40), (24, 64), (24, 40)]  # summed, columns: whole tiles of 16 and 32, or not


@pytest.mark.parametrize(("depth", "columns"), WIDTHS)
@pytest.mark.parametrize("transposed", [True, False])
def test_rows(depth: int, columns: int, transposed: bool) -> None:
    x, offsets = torch.randn(40, depth), torch.tensor([0, 17, 17, 37], dtype=torch.int32)
    w = torch.randn(3, depth, columns) if transposed else torch.randn(3, columns, depth).transpose(1, 2)
    with tuned_tiles.on_trial(TILE):
        y = experts.launch_rows(x, w, None, offsets, fill=True)
    want = grouped_linear(x, w.transpose(1, 2), None, offsets, "reference")
    assert relative_difference(y, want) <= TOLERANCE["float32"]


@pytest.mark.parametrize(("hidden", "intermediate"), WIDTHS)
@pytest.mark.parametrize("gated", [True, False])
def test_up_down_backward_and_weights(hidden: int, intermediate: int, gated: bool) -> None:
    made = oracle.make_inputs(20, 2, hidden, intermediate, 3, gated=gated, bias=False, dtype=torch.float32)
    leaves = oracle.cast(made, torch.float64)
    inputs = ExpertInputs(*(*made.values(), "silu", gated))
    order, offsets = sort_by_expert(inputs.expert_ids_TK, 3)
    grad = torch.randn(20, hidden)
    with tuned_tiles.on_trial(TILE):
        z, a = experts.launch_up(inputs, order, offsets, keep=True)
        dz, weighted_a, ds = experts.launch_down_backward(grad, inputs, Kept(z, order, offsets))
        dup = experts.launch_weights(dz, inputs.x_TH, order, offsets, 2, gather="right")
        ddown = experts.launch_weights(grad, weighted_a, order, offsets, 2, gather="left")
    want = oracle.gradients(oracle.experts(leaves, "silu", gated), leaves, grad)
    weights = inputs.weights_TK.flatten()[order.long()]
    assert relative_difference(a * weights[:, None], weighted_a) <= TOLERANCE["float32"]
    assert relative_difference(ds, want["weights"].flatten()[order.long()]) <= TOLERANCE["float32"]
    assert relative_difference(dup, want["up"]) <= TOLERANCE["float32"]
    assert relative_difference(ddown, want["down"]) <= TOLERANCE["float32"]
