from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moeify.kernels.layout import max_tiles, tile_map
from moeify.kernels.reference import to_blocks, to_dense
from moeify.kernels.topology import BlockTopology, block_topology

COUNTS = st.lists(st.integers(0, 70), min_size=1, max_size=6)


def offsets_of(counts: list[int]) -> torch.Tensor:
    return torch.tensor([0, *counts], dtype=torch.int32).cumsum(0, dtype=torch.int32)


@given(COUNTS, st.integers(0, 5), st.sampled_from([16, 32, 64]))
def test_tiles_cover_every_valid_row_once(counts: list[int], skipped: int, block_m: int) -> None:
    tiles = tile_map(offsets_of(counts), sum(counts) + skipped, block_m)
    expected = [(e, r) for e, n in enumerate(counts) for r in range(sum(counts[:e]), sum(counts[:e]) + n, block_m)]
    live = list(zip(tiles.expert_L.tolist(), tiles.row_L.tolist(), strict=True))
    assert live[: len(expected)] == expected
    assert all(dead == (-1, 0) for dead in live[len(expected) :])


def test_the_bound_on_tiles_is_reached_by_the_worst_routing() -> None:
    for pairs, experts, block in ((100, 4, 16), (5, 8, 16), (64, 1, 64), (129, 3, 128), (0, 4, 16)):
        worst = [1] * min(experts - 1, pairs)
        worst.append(pairs - len(worst))
        assert max_tiles(pairs, experts, block) == sum(-(-n // block) for n in worst)


@given(COUNTS, st.integers(1, 50), st.sampled_from([16, 32]))
def test_topology_by_rows_and_by_columns(counts: list[int], columns: int, block: int) -> None:
    topology = block_topology(offsets_of(counts), sum(counts) + 3, columns, block)
    group = -(-columns // block)
    block_rows = [e for e, n in enumerate(counts) for _ in range(-(-n // block))]
    by_row = [(row, e * group + j) for row, e in enumerate(block_rows) for j in range(group)]
    found = list(zip(topology.row_N.tolist(), topology.column_N.tolist(), strict=True))
    assert found[: len(by_row)] == by_row and set(found[len(by_row) :]) <= {(-1, -1)}
    by_column = sorted(range(len(by_row)), key=lambda n: (by_row[n][1], by_row[n][0]))
    assert topology.block_N.tolist()[: len(by_column)] == by_column
    assert set(topology.block_N.tolist()[len(by_column) :]) <= {-1}
    expected = [sum(c < column for _, c in by_row) for column in range(len(counts) * group + 1)]
    assert topology.offsets_C1.tolist() == expected


def test_blocks_of_a_dense_matrix_and_back() -> None:
    topology: BlockTopology = block_topology(offsets_of([20, 0, 3]), 25, 21, 16)
    mask = torch.zeros(25, 63, dtype=torch.bool)
    mask[:20, :21] = True
    mask[20:23, 42:] = True
    dense = torch.randn(25, 63)
    assert torch.equal(to_dense(to_blocks(dense, topology), topology), dense * mask)


@pytest.mark.parametrize("block", [8, 48])
def test_block_sizes_that_hardware_cannot_multiply(block: int) -> None:
    with pytest.raises(ValueError, match="expected a power of two"):
        block_topology(offsets_of([3]), 3, 4, block)
