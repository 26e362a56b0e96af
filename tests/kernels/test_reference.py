from __future__ import annotations

import pytest
import torch

from moeify.kernels import reference
from moeify.kernels.topology import block_topology
from moeify.measure import TOLERANCE, relative_difference
from tests.kernels import oracle


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_experts_against_one_choice_at_a_time(gated: bool, bias: bool) -> None:
    ids = torch.tensor([[0, -1], [4, 2], [3, 3], [9, 1]])
    inputs = oracle.make_inputs(4, 2, 6, 7, 5, gated=gated, bias=bias, ids=ids)
    got = reference.experts(*(*inputs.values(), "gelu", gated))
    assert relative_difference(got, oracle.experts(inputs, "gelu", gated)) <= TOLERANCE["float64"]


def test_grouped_linear_row_by_row() -> None:
    x, w, b = (torch.randn(*size, dtype=torch.float64) for size in ((6, 4), (3, 5, 4), (3, 5)))
    y = reference.grouped_linear(x, w, b, torch.tensor([0, 2, 2, 5], dtype=torch.int32))
    for row, expert in enumerate([0, 0, 2, 2, 2]):
        assert relative_difference(y[row], w[expert] @ x[row] + b[expert]) <= TOLERANCE["float64"]
    assert (y[5] == 0).all()


def test_blocks_keep_what_is_inside_an_experts_rows_and_columns() -> None:
    topology = block_topology(torch.tensor([0, 2, 19], dtype=torch.int32), 20, 3, 16)
    dense = torch.arange(1.0, 20 * 6 + 1).reshape(20, 6)
    blocks = reference.to_blocks(dense, topology)
    assert torch.equal(blocks[0, :2, :3], dense[:2, :3]) and torch.equal(blocks[2, :1, :3], dense[18:19, 3:])
    assert torch.count_nonzero(blocks) == 2 * 3 + 17 * 3
    inside = torch.zeros(20, 6)
    inside[:2, :3] = inside[2:19, 3:] = 1
    assert torch.equal(reference.to_dense(blocks, topology), dense * inside)
