"""The yardstick itself: what is 0, what is NaN, which functions are told apart."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moeify.measure import (
    TOLERANCE,
    WHOLE_TOLERANCE,
    fill,
    fill_inputs,
    probe,
    recognize,
    relative_difference,
    row_difference,
    same_values,
    tolerance_of,
    top1_agreement,
    without_shared_nan,
)

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("result", "expected", "difference"),
    [
        ([1.0, -4.0], [2.0, -4.0], 0.25),
        ([1.0, 4.0], [2.0, -4.0], 2.0),  # by the largest value, not by the one beside it
        ([0.0], [0.0], 0.0),
        ([3.0], [0.0], 3.0),
        ([], [], 0.0),
        ([INF, 0.0], [1.0, 0.0], INF),
    ],
)
def test_the_difference_is_relative_to_the_largest_value(
    result: list[float], expected: list[float], difference: float
) -> None:
    assert relative_difference(torch.tensor(result), torch.tensor(expected)) == difference


@pytest.mark.parametrize(
    ("result", "expected"), [([NAN, 1.0], [1.0, 1.0]), ([1.0], [NAN]), ([NAN], [0.0]), ([INF], [INF])]
)
def test_what_is_not_a_number_never_passes(result: list[float], expected: list[float]) -> None:
    difference = relative_difference(torch.tensor(result), torch.tensor(expected))
    assert math.isnan(difference)
    assert not difference <= TOLERANCE["float32"]


def test_the_difference_is_computed_in_float64_and_without_a_gradient() -> None:
    result = torch.tensor([1.0, 2.0], dtype=torch.bfloat16, requires_grad=True)
    assert relative_difference(result, torch.tensor([1.0, 2.0 + 1e-9], dtype=torch.float64)) == pytest.approx(5e-10)


def test_tensors_of_different_shapes_are_not_compared() -> None:
    with pytest.raises(ValueError, match=r"shape \(2,\) with \(2, 1\)"):
        relative_difference(torch.ones(2), torch.ones(2, 1))


def test_a_row_is_measured_by_its_own_largest_value_unless_it_cancels_out() -> None:
    expected = torch.tensor([[1000.0, 0.0], [2.0, -4.0], [0.5, 0.0]])
    off = torch.tensor([[0.0, 0.1], [1.0, 0.0], [0.0, 0.0]])
    assert row_difference(expected + off, expected) == 0.25
    assert row_difference(expected + torch.tensor([[0.0], [0.0], [1.0]]), expected) == 1.0  # 1000 * 1e-3, not 0.5
    assert row_difference(torch.full((2, 2), 3.0), torch.zeros(2, 2)) == 3.0
    assert row_difference(torch.zeros(0, 2), torch.zeros(0, 2)) == 0.0
    assert math.isnan(row_difference(expected * NAN, expected))


def test_what_is_nan_or_infinite_in_both_does_not_count() -> None:
    result, expected = torch.tensor([NAN, INF, INF, NAN, 1.0]), torch.tensor([NAN, INF, -INF, 1.0, NAN])
    found, wanted = without_shared_nan(result, expected)
    assert found[:2].tolist() == wanted[:2].tolist() == [0.0, 0.0]
    assert [math.isfinite(value) for value in (found - wanted)[2:]] == [False] * 3


def test_top1_counts_rows() -> None:
    expected = torch.eye(4).reshape(2, 2, 4)
    result = expected.clone()
    result[0, 1, 3] = 5.0
    assert top1_agreement(2 * expected, expected) == 1
    assert top1_agreement(result, expected) == 0.75


@pytest.mark.parametrize("name", TOLERANCE)
def test_every_dtype_has_a_tolerance(name: str) -> None:
    assert tolerance_of(getattr(torch, name)) == TOLERANCE[name] < WHOLE_TOLERANCE[name]


def test_probes_fill_the_range_and_differ_by_seed() -> None:
    first, second = probe(2, 500), probe(2, 500, seed=1)
    for points in (first, second, probe(1000, reach=40.0) * 0.3):
        assert -12 <= points.min() < -11.9
        assert 11.9 < points.max() <= 12
        assert len(set(points.flatten().tolist())) == 1000
    assert not torch.equal(first, second)


TABLE: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (lambda x: x * torch.sigmoid(x), "silu"),
        (lambda x: F.silu(x.float()).double(), "silu"),
        (lambda x: 0.5 * x * (1 + torch.tanh(0.79788456 * (x + 0.044715 * x**3))), "gelu_tanh"),
        (lambda x: F.gelu(x).clamp(max=10.0), None),
        (lambda x: x * torch.sigmoid(1.001 * x), None),
        (lambda x: F.relu(x)[..., :-1], None),
        (lambda x: F.relu(x) + NAN, None),
    ],
)
def test_functions_are_recognized_by_their_values(function: Callable[[Tensor], Tensor], name: str | None) -> None:
    points = probe(64)
    assert recognize(function(points), TABLE, points) == name


def test_functions_of_two_inputs_are_recognized() -> None:
    gate, up = probe(2, 16), probe(2, 16, seed=1)
    table = {"product": lambda g, u: g * u, "silu": lambda g, u: F.silu(g) * u}
    assert recognize(F.silu(gate) * up, table, gate, up) == "silu"
    assert recognize(F.silu(up) * gate, table, gate, up) is None


def test_same_values_allows_rounding_to_float32() -> None:
    values = torch.tensor([1000.0, 1e-9])
    assert same_values(values * (1 + 1e-6), values)
    assert not same_values(values * (1 + 1e-5), values)


def test_inputs_are_filled_by_dtype_and_name() -> None:
    examples = {
        "pixel_values": torch.empty(2, 3, dtype=torch.bfloat16, device="meta"),
        "input_ids": torch.empty(4, 50, dtype=torch.int32, device="meta"),
        "token_type_ids": torch.empty(4, 50, dtype=torch.long, device="meta"),
        "attention_mask": torch.empty(64, 6, dtype=torch.long, device="meta"),
        "hidden": torch.empty(2, 2, dtype=torch.bool, device="meta"),
        "given": torch.arange(3),
        "use_cache": False,
    }
    filled = fill_inputs(examples, torch.Generator().manual_seed(0), range(5, 90))
    for name, example in examples.items():
        value = filled[name]
        if isinstance(value, Tensor) and isinstance(example, Tensor):
            assert (value.shape, value.dtype, value.device.type) == (example.shape, example.dtype, "cpu")
    ids, segments, mask = (filled[n] for n in ("input_ids", "token_type_ids", "attention_mask"))
    assert isinstance(ids, Tensor) and isinstance(segments, Tensor) and isinstance(mask, Tensor)
    assert (int(ids.min()), int(ids.max())) == (5, 89)
    assert set(segments.flatten().tolist()) == {0, 1}
    assert set(mask.sum(-1).tolist()) == {1, 2, 3, 4, 5, 6}
    assert torch.equal(mask, mask.cummin(-1).values), "padding comes last"
    assert filled["given"] is examples["given"] and filled["use_cache"] is False


def test_filled_values_follow_from_the_seed() -> None:
    first, second, other = (fill(torch.empty(5), torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_the_table_is_read_without_torch() -> None:
    program = "import sys, moeify.measure; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def test_points_have_values_also_while_a_model_is_built_on_the_meta_device() -> None:
    with torch.device("meta"):
        assert probe(2, 3).device.type == "cpu"
