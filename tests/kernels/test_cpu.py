"""What is particular to the CPU path: chunks of slices, and gradients of which most experts have none."""

from __future__ import annotations

import pytest
import torch

from moeify.kernels import cpu
from moeify.kernels.ops import experts, grouped_linear
from moeify.measure import TOLERANCE, relative_difference
from tests.kernels import oracle


@pytest.mark.parametrize("fresh", [0, 1 << 40])
@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("unused", [[], [slice(1, 2)], [slice(0, 1), slice(2, 3)], [slice(0, 3)]])
def test_unused_ranges_are_zero_and_the_rest_can_be_written(
    monkeypatch: pytest.MonkeyPatch, fresh: int, again: bool, unused: list[slice]
) -> None:
    monkeypatch.setattr(cpu, "LARGE", fresh)
    used_before = cpu._room((3, 5), torch.float32, torch.device("cpu"), [], again=again).fill_(7)
    del used_before
    out = cpu._room((3, 5), torch.float32, torch.device("cpu"), unused, again=again)
    assert out.shape == (3, 5) and out.is_contiguous()
    assert all((out[rows] == 0).all() for rows in unused)
    out.fill_(1)
    assert out.sum() == 15


def test_fresh_pages_live_as_long_as_the_tensor() -> None:
    size = cpu.LARGE + 1
    out = cpu._room((size,), torch.uint8, torch.device("cpu"), [slice(0, size)])
    view = out[-10:]
    del out
    assert view.tolist() == [0] * 10


def test_no_rows() -> None:
    assert cpu._room((0, 4), torch.float32, torch.device("cpu"), [slice(0, 0)]).shape == (0, 4)


@pytest.mark.parametrize("fresh", [0, 1 << 40])
@pytest.mark.parametrize("chunk", [1, 4, 1 << 20])
def test_results_do_not_depend_on_chunks_and_pages(monkeypatch: pytest.MonkeyPatch, fresh: int, chunk: int) -> None:
    monkeypatch.setattr(cpu, "LARGE", fresh)
    monkeypatch.setattr(cpu, "MOSTLY", 2)
    monkeypatch.setattr(cpu, "CHUNK_ROWS", chunk)
    ids = torch.tensor([[1, 9], [1, -1], [8, 1], [20, 1], [9, 9]])  # 4 of 12 experts have rows
    inputs = oracle.make_inputs(5, 2, 6, 7, 12, gated=True, bias=True, ids=ids)
    ours, exact = oracle.cast(inputs, torch.float64), oracle.cast(inputs, torch.float64)
    out, expected = experts(*ours.values(), activation="silu", gated=True), oracle.experts(exact, "silu", True)
    assert relative_difference(out, expected) <= TOLERANCE["float64"]
    grad = torch.ones_like(expected)
    got, want = oracle.gradients(out, ours, grad), oracle.gradients(expected, exact, grad)
    for name in want:
        assert relative_difference(got[name], want[name]) <= TOLERANCE["float64"], name


def test_more_choices_than_are_sorted_as_a_list() -> None:
    inputs = oracle.make_inputs(cpu.FEW_CHOICES, 3, 6, 7, 5, gated=True, bias=True)
    few = {n: t[:4] if n in {"x", "ids", "weights"} else t for n, t in inputs.items()}
    many_out = experts(*inputs.values(), activation="gelu", gated=True)
    assert relative_difference(many_out[:4], experts(*few.values(), activation="gelu", gated=True)) <= 1e-12


def test_rows_past_the_last_offset_are_zero() -> None:
    offsets = torch.tensor([0, 1, 1], dtype=torch.int32)
    y = grouped_linear(torch.randn(5, 4), torch.randn(2, 3, 4), None, offsets)
    assert y[0].abs().sum() > 0 and (y[1:] == 0).all()


@pytest.mark.parametrize(
    ("dtype", "ids", "grouped"),
    [
        (torch.bfloat16, [[0, 2], [2, 4], [4, 0]], True),
        (torch.float32, [[0, 2], [4, 1]], True),
        (torch.float32, [[0, 2], [4, 0]], False),  # two rows of one expert: the weight on the left
        (torch.float32, [[0, 2], [5, 1]], False),  # a choice of no expert
        (torch.bfloat16, [[0, 2], [2, 0]], False),  # most experts are idle
        (torch.float64, [[0, 2], [4, 1]], False),
    ],
)
def test_few_choices_of_most_experts_take_one_product_for_all(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, ids: list[list[int]], grouped: bool
) -> None:
    calls, product = list[int](), torch._grouped_mm

    def counted(x: torch.Tensor, w: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        calls.append(len(x))
        return product(x, w, ends)

    monkeypatch.setattr(cpu, "_GROUPED", counted)
    inputs = oracle.make_inputs(len(ids), 2, 16, 24, 5, gated=True, bias=False, ids=torch.tensor(ids))
    expected = oracle.experts(oracle.cast(inputs, torch.float64), "silu", True)
    with torch.no_grad():
        out = experts(*oracle.cast(inputs, dtype).values(), activation="silu", gated=True)
    assert relative_difference(out, expected) <= TOLERANCE[str(dtype).removeprefix("torch.")]
    assert len(calls) == 2 * grouped
    odd = oracle.make_inputs(len(ids), 2, 15, 24, 5, gated=True, bias=False, ids=torch.tensor(ids))
    with torch.no_grad():
        experts(*oracle.cast(odd, dtype).values(), activation="silu", gated=True)
    assert len(calls) == 2 * grouped, "rows that are no steps of 16 bytes"
