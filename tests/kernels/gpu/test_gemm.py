"""The masks of the inner loops, in each of the ways in which widths and tiles fit; `conftest` checks every address."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from moeify.kernels.gpu import experts, tuned_tiles
from moeify.kernels.gpu.tiles import Tile
from moeify.kernels.inputs import ExpertInputs, Kept
from moeify.kernels.layout import sort_by_expert, tile_map
from moeify.kernels.ops import grouped_linear
from moeify.measure import TOLERANCE, relative_difference
from tests.kernels import oracle

NARROW = Tile(16, 32, 16, 4, 2)
WIDE = Tile(16, 128, 16, 4, 2, tma=True)  # by descriptor, and with the backward pass of the activation in four parts
WIDTHS = [(32, 64), (32, 40), (24, 64), (24, 40)]  # summed, columns: whole tiles of 16 and 32, or not


@pytest.mark.parametrize(("depth", "columns"), WIDTHS)
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("tile", [NARROW, WIDE, replace(WIDE, n=16, persistent=True)])
def test_rows(depth: int, columns: int, transposed: bool, tile: Tile) -> None:
    x, offsets = torch.randn(40, depth), torch.tensor([0, 17, 17, 37], dtype=torch.int32)
    w = torch.randn(3, depth, columns) if transposed else torch.randn(3, columns, depth).transpose(1, 2)
    with tuned_tiles.on_trial(tile):
        y = experts.launch_rows(x, w, None, offsets, tile_map(offsets, 40, tile.m), fill=True)
    want = grouped_linear(x, w.transpose(1, 2), None, offsets, "reference")
    assert relative_difference(y, want) <= TOLERANCE["float32"]


@pytest.mark.parametrize(("hidden", "intermediate"), WIDTHS)
@pytest.mark.parametrize(("gated", "tile"), [(True, NARROW), (False, NARROW), (True, WIDE)])
def test_up_down_backward_and_weights(hidden: int, intermediate: int, gated: bool, tile: Tile) -> None:
    made = oracle.make_inputs(20, 2, hidden, intermediate, 3, gated=gated, bias=False, dtype=torch.float32)
    leaves = oracle.cast(made, torch.float64)
    inputs = ExpertInputs(*(*made.values(), "silu", gated))
    order, offsets = sort_by_expert(inputs.expert_ids_TK, 3)
    grad = torch.randn(20, hidden)
    tiles = tile_map(offsets, 40, tile.m)
    with tuned_tiles.on_trial(tile):
        z, a = experts.launch_up(inputs, order, offsets, tiles, keep=True)
        dz, weighted_a, ds = experts.launch_down_backward(grad, inputs, Kept(z, order, offsets), tiles)
        dup = experts.launch_weights(dz, experts.launch_gather(inputs.x_TH, order, offsets, 2), offsets)
        ddown = experts.launch_weights(experts.launch_gather(grad, order, offsets, 2), weighted_a, offsets)
    want = oracle.gradients(oracle.experts(leaves, "silu", gated), leaves, grad)
    weights = inputs.weights_TK.flatten()[order.long()]
    assert relative_difference(a * weights[:, None], weighted_a) <= TOLERANCE["float32"]
    assert relative_difference(ds, want["weights"].flatten()[order.long()]) <= TOLERANCE["float32"]
    assert relative_difference(dup, want["up"]) <= TOLERANCE["float32"]
    assert relative_difference(ddown, want["down"]) <= TOLERANCE["float32"]
