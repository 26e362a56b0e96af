from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.moeify.checkpoint.quantized.make import Tensors, assert_reads, numbers, packed, refusal, scales, write

IN, OUT, GROUP = 48, 24, 16
ORDER = [0, 2, 4, 6, 1, 3, 5, 7]  # which of eight outputs the numbers in a word belong to
SETTINGS = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True}


def words(values: Tensor) -> Tensor:
    shuffled = torch.stack([values[:, 8 * (o // 8) + ORDER[o % 8]] for o in range(OUT)], 1)
    return packed(shuffled, 4, 1)


def tensors() -> tuple[Tensors, Tensor]:
    q, zeros = numbers(IN, OUT, below=16), numbers(IN // GROUP, OUT, below=16, seed=1)
    scale = scales(IN // GROUP, OUT, dtype=torch.float16)
    values = torch.zeros(OUT, IN, dtype=torch.float64)
    for i in range(IN):
        for o in range(OUT):
            values[o, i] = float(scale[i // GROUP, o]) * (int(q[i, o]) - int(zeros[i // GROUP, o]))
    return {"qweight": words(q), "qzeros": words(zeros), "scales": scale}, values


def test_integers_less_zero_points_times_scales(tmp_path: Path) -> None:
    stored, expected = tensors()
    assert_reads(write(tmp_path, stored, SETTINGS), expected)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"bits": 8}, "bits = 8, expected one of 4"),
        ({"version": "gemv"}, "version = 'gemv'"),
        ({"group_size": 24}, "scales has shape [3, 24], expected [2, 24]"),
        ({"group_size": 17}, "48 inputs are not whole groups of 17"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes: dict[str, object], said: str, tmp_path: Path) -> None:
    assert said in refusal(write(tmp_path, tensors()[0], {**SETTINGS, **changes}))
