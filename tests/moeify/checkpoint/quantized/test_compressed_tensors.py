from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.moeify.checkpoint.quantized.make import Tensors, assert_reads, numbers, packed, refusal, scales, write

ROWS, COLUMNS, GROUP = 20, 36, 12


def settings(bits: int, **weights: object) -> dict[str, object]:
    group = {"weights": {"num_bits": bits, **weights}, "targets": ["Linear"]}
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}}


def expected(q: Tensor, scale: Tensor, zeros: Tensor | None = None, of: list[int] | None = None) -> Tensor:
    result = torch.zeros(q.shape, dtype=torch.float64)
    for i in range(ROWS):
        for j in range(COLUMNS):
            group = j * scale.shape[1] // COLUMNS if of is None else of[j]
            row = i * len(scale) // ROWS
            zero = 0 if zeros is None else int(zeros[row, group])
            result[i, j] = (float(q[i, j]) - zero) * float(scale[row, group])
    return result


@pytest.mark.parametrize("grid", [(ROWS, 1), (1, 1), (ROWS, COLUMNS // GROUP)])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_values_times_the_scales_of_rows_groups_or_all(
    grid: tuple[int, int], dtype: torch.dtype, tmp_path: Path
) -> None:
    q, scale = (numbers(ROWS, COLUMNS, below=31) - 15).to(dtype), scales(*grid)
    zeros = (numbers(*grid, below=5, seed=1) - 2).to(torch.int8) if dtype == torch.int8 else None
    tensors = {"weight": q, "weight_scale": scale, **({} if zeros is None else {"weight_zero_point": zeros})}
    assert_reads(write(tmp_path, tensors, settings(8)), expected(q, scale, zeros))


def test_blocks_whose_last_ones_are_cut(tmp_path: Path) -> None:
    q, scale = (numbers(ROWS, COLUMNS, below=31) - 15).to(torch.float8_e4m3fn), scales(2, 3)
    values = torch.tensor([[float(q[i, j]) * float(scale[i // 16, j // 16]) for j in range(COLUMNS)]
                           for i in range(ROWS)]).double()  # fmt: skip
    assert_reads(write(tmp_path, {"weight": q, "weight_scale": scale}, settings(8, block_structure=[16, 16])), values)


def packed_weight(bits: int, of: list[int] | None = None) -> tuple[Tensors, Tensor]:
    half, groups = 1 << (bits - 1), COLUMNS // GROUP
    q, zeros = numbers(ROWS, COLUMNS, below=2 * half) - half, numbers(ROWS, groups, below=2 * half, seed=1) - half
    scale = scales(ROWS, groups, dtype=torch.bfloat16)
    tensors = {
        "weight_packed": packed(q + half, bits, 1),
        "weight_scale": scale,
        "weight_shape": torch.tensor([ROWS, COLUMNS]),
        "weight_zero_point": packed(zeros + half, bits, 0),
        **({} if of is None else {"weight_g_idx": torch.tensor(of, dtype=torch.int32)}),
    }
    return tensors, expected(q, scale, zeros, of)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("shuffled", [False, True])
def test_packed_integers(bits: int, shuffled: bool, tmp_path: Path) -> None:
    tensors, values = packed_weight(bits, [j % (COLUMNS // GROUP) for j in range(COLUMNS)] if shuffled else None)
    assert_reads(write(tmp_path, tensors, settings(bits)), values)


@pytest.mark.parametrize(
    ("changed", "bits", "words"),
    [
        ({}, 8, "num_bits [8], and 5 words do not hold 36"),
        ({}, 9, "num_bits = 9"),
        ({"weight_shape": torch.tensor([ROWS, 99])}, 4, "do not hold 99"),
        ({"weight_shape": torch.tensor([19, COLUMNS])}, 4, "which is not 4 bits of [19, 36]"),
        ({"weight_scale": scales(ROWS, 5)}, 4, "weight_scale has shape [20, 5]"),
        ({"weight_zero_point": torch.zeros(2, 3, dtype=torch.int32)}, 4, "weight_zero_point has shape [2, 3]"),
        ({"weight_packed": torch.zeros(ROWS, 18, dtype=torch.uint8)}, 4, "only integers in words of 32 bits"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(changed: Tensors, bits: int, words: str, tmp_path: Path) -> None:
    assert words in refusal(write(tmp_path, {**packed_weight(4)[0], **changed}, settings(bits)))
