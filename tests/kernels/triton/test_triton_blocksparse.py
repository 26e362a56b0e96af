from __future__ import annotations

import pytest
import torch

from moeify.kernels.reference import to_blocks, to_dense
from moeify.kernels.topology import block_topology
from moeify.kernels.triton_blocksparse import dds, dsd, sdd
from moeify.tolerances import TOLERANCE
from tests.kernels import oracle

CASES = {
    "ragged": ([20, 0, 3, 33], 21, 16, 19),
    "whole blocks": ([32, 64], 64, 32, 64),
    "one row": ([1], 5, 16, 7),
    "all on one expert": ([0, 40, 0], 33, 16, 17),
    "no rows": ([0, 0], 16, 16, 5),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_against_dense_ones(case: str, dtype: torch.dtype) -> None:
    counts, columns, block, inner = CASES[case]
    rows, width = sum(counts) + 2, len(counts) * columns
    offsets = torch.tensor([0, *counts], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    topology = block_topology(offsets, rows, columns, block)
    g = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g).to(dtype)

    def close(got: torch.Tensor, want: torch.Tensor) -> bool:
        return oracle.difference(got, want) <= TOLERANCE[str(dtype).removeprefix("torch.")]

    a, b = randn(rows, inner), randn(inner, width)
    data = sdd(a, b, topology)
    assert close(data, to_blocks(a.double() @ b.double(), topology))
    assert torch.equal(sdd(a.t().contiguous().t(), b.t().contiguous().t(), topology), data)
    sparse = to_dense(data, topology).double()
    assert close(dsd(data, d := randn(width, inner), topology), sparse @ d.double())
    assert close(dsd(data, d := randn(rows, inner), topology, transpose=True), sparse.t() @ d.double())
    assert close(dds(d := randn(inner, rows), data, topology), d.double() @ sparse)
    assert close(dds(d := randn(width, inner).t(), data, topology, transpose=True), d.double() @ sparse.t())


def test_a_wrong_shape_is_named() -> None:
    topology = block_topology(torch.tensor([0, 3], dtype=torch.int32), 3, 4, 16)
    with pytest.raises(ValueError, match="b has shape"):
        sdd(torch.zeros(3, 5), torch.zeros(5, 8), topology)
