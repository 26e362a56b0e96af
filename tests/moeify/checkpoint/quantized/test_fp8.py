from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.moeify.checkpoint.quantized.make import Tensors, assert_reads, refusal, scales, write

F8 = torch.float8_e4m3fn
ROWS, COLUMNS = 10, 14


def values() -> Tensor:
    return torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0)).to(F8)


def expected(scale: Tensor, rows: int, columns: int) -> Tensor:
    """Each value times the scale of its block."""
    result = torch.zeros(ROWS, COLUMNS, dtype=torch.float64)
    for i in range(ROWS):
        for j in range(COLUMNS):
            result[i, j] = float(values()[i, j]) * float(scale[i // rows, j // columns])
    return result


@pytest.mark.parametrize(
    ("settings", "name", "grid", "block"),
    [
        ({"weight_block_size": [4, 6]}, "weight_scale_inv", (3, 3), (4, 6)),  # the last blocks are cut
        ({}, "weight_scale_inv", (2, 7), (5, 2)),
        ({"weight_block_size": [4, 6]}, "weight_scale", (ROWS, 1), (1, COLUMNS)),
        ({"weight_block_size": None}, "weight_scale", (1, 1), (ROWS, COLUMNS)),
    ],
)
def test_each_value_is_multiplied_by_the_scale_of_its_block(
    settings: dict[str, object], name: str, grid: tuple[int, int], block: tuple[int, int], tmp_path: Path
) -> None:
    scale = scales(*grid)
    forms = [scale, *([scale[:, 0]] if grid[1] == 1 else []), *([scale[0, 0]] if grid == (1, 1) else [])]
    for form in forms:
        tensors: Tensors = {"weight": values(), name: form, "input_scale": torch.ones(())}
        folder = write(tmp_path / "src", tensors, {"quant_method": "fp8", **settings})
        assert_reads(folder, expected(scale, *block))


@pytest.mark.parametrize(
    ("scale", "settings", "words"),
    [
        (scales(2, 3), {"weight_block_size": [4, 6]}, "not one value for each of the blocks of [4, 6]"),
        (scales(3, 3), {}, "not one value for each of the equal blocks"),
        (scales(3, 3), {"weight_block_size": [4]}, "blocks of [4], expected two whole numbers"),
        (scales(2, 2, 2), {}, "not one value for each"),
    ],
)
def test_scales_that_do_not_fit_are_refused(
    scale: Tensor, settings: dict[str, object], words: str, tmp_path: Path
) -> None:
    folder = write(tmp_path, {"weight": values(), "weight_scale_inv": scale}, {"quant_method": "fp8", **settings})
    assert words in refusal(folder)
