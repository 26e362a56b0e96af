"""The papers' formulas over Python floats."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moeify.measure import TOLERANCE


def close(actual: Tensor, expected: object, dtype: str = "float32") -> None:
    expected = torch.as_tensor(expected, dtype=torch.float64)
    assert actual.shape == expected.shape
    assert (actual.double() - expected).abs().max() <= TOLERANCE[dtype] * expected.abs().max()


def softmax(row: list[float]) -> list[float]:
    exps = [math.exp(value - max(row)) for value in row]
    return [value / sum(exps) for value in exps]


def best(row: list[float], k: int) -> list[int]:
    return sorted(range(len(row)), key=lambda i: -row[i])[:k]
