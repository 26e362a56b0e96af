from __future__ import annotations

from typing import Any

import pytest
import torch

from moeify.kernels.gpu.blocksparse import dds, dsd, sdd
from moeify.kernels.reference import to_blocks, to_dense
from moeify.kernels.topology import BlockTopology, block_topology
from moeify.measure import TOLERANCE, relative_difference, tolerance_of

CASES = {
    "ragged": ([20, 0, 3, 33], 21, 16, 19),
    "whole blocks": ([32, 64], 64, 32, 64),
    "ragged, few": ([17, 0, 3], 19, 16, 7),
    "one row": ([1], 5, 16, 7),
    "all on one expert": ([0, 40, 0], 33, 16, 17),
    "no rows": ([0, 0], 16, 16, 5),
}


@pytest.mark.parametrize("case", [case for case in CASES if case != "ragged, few"])
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
        return relative_difference(got, want) <= tolerance_of(dtype)

    a, b = randn(rows, inner), randn(inner, width)
    data = sdd(a, b, topology)
    assert close(data, to_blocks(a.double() @ b.double(), topology))
    assert torch.equal(sdd(a.t().contiguous().t(), b.t().contiguous().t(), topology), data)
    sparse = to_dense(data, topology).double()
    assert close(dsd(data, d := randn(width, inner), topology), sparse @ d.double())
    assert close(dsd(data, d := randn(rows, inner), topology, transpose=True), sparse.t() @ d.double())
    assert close(dds(d := randn(inner, rows), data, topology), d.double() @ sparse)
    assert close(dds(d := randn(width, inner).t(), data, topology, transpose=True), d.double() @ sparse.t())


def products(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, d: torch.Tensor, *rest: Any) -> list[torch.Tensor]:
    topology, *functions = rest
    multiply, times_dense, dense_times = functions or (sdd, dsd, dds)
    data = multiply(a, b, topology)
    return [
        data,
        times_dense(data, c, topology),
        times_dense(data, a, topology, transpose=True),
        dense_times(d, data, topology),
        dense_times(b, data, topology, transpose=True),
    ]


def dense_dsd(data: torch.Tensor, d: torch.Tensor, topology: BlockTopology, transpose: bool = False) -> torch.Tensor:
    sparse = to_dense(data, topology)
    return (sparse.t() if transpose else sparse) @ d


def dense_dds(d: torch.Tensor, data: torch.Tensor, topology: BlockTopology, transpose: bool = False) -> torch.Tensor:
    sparse = to_dense(data, topology)
    return d @ (sparse.t() if transpose else sparse)


def dense_sdd(a: torch.Tensor, b: torch.Tensor, topology: BlockTopology) -> torch.Tensor:
    return to_blocks(a @ b, topology)


@pytest.mark.parametrize("case", ["ragged, few", "one row", "no rows"])
def test_gradients_and_their_gradients_against_dense_ones(case: str) -> None:
    counts, columns, block, inner = CASES[case]
    rows, width = sum(counts) + 2, len(counts) * columns
    offsets = torch.tensor([0, *counts], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    topology = block_topology(offsets, rows, columns, block)
    g = torch.Generator().manual_seed(0)
    shapes = ((rows, inner), (inner, width), (width, 6), (3, rows))
    exact = [(torch.randn(s, generator=g, dtype=torch.float64) * inner**-0.5).requires_grad_() for s in shapes]
    ours = [t.detach().float().requires_grad_() for t in exact]
    results = []
    for leaves, functions in ((ours, ()), (exact, (dense_sdd, dense_dsd, dense_dds))):
        outputs = products(*leaves, topology, *functions)
        first = torch.autograd.grad(
            torch.stack([(o.sin() + o).sum() for o in outputs]).sum(), leaves, create_graph=True
        )
        second = torch.autograd.grad(torch.stack([t.square().sum() for t in first]).sum(), leaves)
        results.append([*first, *second])
    for got, want in zip(*results, strict=True):
        assert got.dtype == torch.float32 and relative_difference(got, want) <= TOLERANCE["float32"]


def test_what_lies_outside_rows_and_columns_is_not_read() -> None:
    topology = block_topology(torch.tensor([0, 5, 21], dtype=torch.int32), 22, 19, 16)
    inside = to_blocks(torch.ones(22, 38), topology)
    data = torch.where(inside > 0, inside, torch.nan).requires_grad_()
    out = dsd(data, torch.ones(38, 3), topology).sum() + dsd(data, torch.ones(22, 3), topology, transpose=True).sum()
    assert out == 2 * 3 * 19 * 21
    assert torch.equal(torch.autograd.grad(out, data)[0], 6 * inside)


BAD = {
    "b has shape": lambda t: sdd(torch.zeros(3, 5), torch.zeros(5, 8), t),
    "a has shape": lambda t: sdd(torch.zeros(3), torch.zeros(5, 4), t),
    "dense has shape": lambda t: dds(torch.zeros(2, 2), torch.zeros(t.blocks, 16, 16), t),
    "data has shape": lambda t: dsd(torch.zeros(t.blocks, 16), torch.zeros(4, 5), t),
    "b has dtype": lambda t: sdd(torch.zeros(3, 5), torch.zeros(5, 4).half(), t),
    "a has dtype": lambda t: sdd(torch.zeros(3, 5).double(), torch.zeros(5, 4).double(), t),
}


@pytest.mark.parametrize("message", BAD)
def test_a_wrong_argument_is_named(message: str) -> None:
    topology = block_topology(torch.tensor([0, 3], dtype=torch.int32), 3, 4, 16)
    with pytest.raises(ValueError, match=message) as error:
        BAD[message](topology)
    assert "\n" not in str(error.value)
