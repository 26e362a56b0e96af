from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.moeify.checkpoint.quantized.make import Tensors, assert_reads, numbers, refusal, scales, write

ROWS, COLUMNS, BLOCK, NESTED = 6, 50, 64, 2
STATE = "weight.quant_state.bitsandbytes__nf4"
FOUR = {"quant_method": "bitsandbytes", "load_in_4bit": True}


def state(**changes: object) -> Tensor:
    entries = {"quant_type": "nf4", "blocksize": BLOCK, "dtype": "bfloat16", "shape": [ROWS, COLUMNS],
               "nested_blocksize": NESTED, "nested_dtype": "float32", "nested_offset": 0.25}  # fmt: skip
    return torch.tensor(list(json.dumps({**entries, **changes}).encode()), dtype=torch.uint8)


def four_bits(*, nested: bool) -> tuple[Tensors, Tensor]:
    count, table = ROWS * COLUMNS, scales(16) - 0.5
    places = numbers(count, below=16).tolist()
    blocks = -(-count // BLOCK)
    tensors: Tensors = {"weight.quant_map": table, STATE: state()}
    if nested:
        inner, inner_scales, of = scales(256), scales(-(-blocks // NESTED)) * 3, numbers(blocks, below=256, seed=1)
        tensors |= {"weight.absmax": of.to(torch.uint8), "weight.nested_quant_map": inner}
        tensors["weight.nested_absmax"] = inner_scales
        absmax = [float(inner[of[b]]) * float(inner_scales[b // NESTED]) + 0.25 for b in range(blocks)]
    else:
        tensors["weight.absmax"] = scales(blocks)
        absmax = tensors["weight.absmax"].tolist()
    values = [float(table[place]) * absmax[i // BLOCK] for i, place in enumerate(places)]
    bytes_ = [(places[i] << 4) + places[i + 1] for i in range(0, count, 2)]
    tensors["weight"] = torch.tensor(bytes_, dtype=torch.uint8)[:, None]
    return tensors, torch.tensor(values, dtype=torch.float64).reshape(ROWS, COLUMNS)


@pytest.mark.parametrize("nested", [False, True])
def test_four_bits_are_places_in_a_table_times_the_scale_of_their_block(nested: bool, tmp_path: Path) -> None:
    tensors, expected = four_bits(nested=nested)
    assert_reads(write(tmp_path, tensors, FOUR), expected)


def test_eight_bits_times_the_largest_of_their_row(tmp_path: Path) -> None:
    q, largest = (numbers(ROWS, COLUMNS, below=255) - 127).to(torch.int8), scales(ROWS)
    expected = torch.tensor([[int(q[i, j]) * float(largest[i]) / 127 for j in range(COLUMNS)] for i in range(ROWS)])
    tensors = {"weight": q, "SCB": largest, "weight_format": torch.zeros((), dtype=torch.uint8)}
    settings = {"load_in_8bit": True}  # older ones name no method
    assert_reads(write(tmp_path, tensors, settings), expected.double())
    tensors["weight_format"] += 1
    assert "weight_format is not 0" in refusal(write(tmp_path, tensors, settings))
    assert "SCB has shape [5], expected [6]" in refusal(write(tmp_path, {"weight": q, "SCB": scales(5)}, settings))


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({STATE: state(shape=[ROWS, 2 * COLUMNS])}, "absmax has shape [5], expected [10]"),
        ({STATE: state(blocksize=0)}, "neither blocksize nor the shape"),
        ({STATE: state(nested_blocksize=0)}, "nested_blocksize and nested_offset"),
        ({STATE: torch.zeros(9, dtype=torch.uint8)}, "cannot be dequantized"),
        ({"weight": torch.zeros(7, 1, dtype=torch.uint8)}, "weight holds 7 bytes"),
        ({"weight.nested_quant_map": scales(255)}, "nested_quant_map has shape [255]"),
        ({"weight.nested_absmax": scales(1)}, "nested_absmax has shape [1], expected [3]"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(changed: Tensors, words: str, tmp_path: Path) -> None:
    tensors, _ = four_bits(nested=True)
    assert words in refusal(write(tmp_path, {**tensors, **changed}, FOUR))
