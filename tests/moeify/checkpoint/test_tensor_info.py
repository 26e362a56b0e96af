from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save

from moeify.checkpoint.tensor_info import ITEMSIZE, TensorInfo, dtype_name, torch_dtype, widest


@pytest.mark.parametrize("name", ITEMSIZE)
def test_dtypes_are_spelled_as_the_library_spells_them(name: str) -> None:
    written = save({"t": torch.zeros(3, dtype=torch_dtype(name))})
    assert json.loads(written[8 : 8 + int.from_bytes(written[:8], "little")])["t"]["dtype"] == name
    assert torch_dtype(name).itemsize == ITEMSIZE[name]
    assert dtype_name(torch_dtype(name)) == name


def test_a_dtype_that_safetensors_does_not_have() -> None:
    assert dtype_name(torch.complex128) is None


@pytest.mark.parametrize(("shape", "nbytes"), [((), 2), ((0, 3), 0), ((5, 7), 70)])
def test_nbytes(shape: tuple[int, ...], nbytes: int) -> None:
    assert TensorInfo("t", "BF16", shape).nbytes == nbytes


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        (["F16"], "F16"),
        (["BF16", "F32", "F16"], "F32"),
        (["F8_E4M3", "BF16"], "BF16"),
        (["F64", "F32"], "F64"),
        (["F16", "BF16"], "F32"),
        (["F16", "F16"], "F16"),
    ],
)
def test_the_widest_dtype_holds_the_values_of_all(dtypes: list[str], expected: str) -> None:
    assert widest(dtypes) == widest(dtypes[::-1]) == expected
    for dtype in dtypes:
        value = torch.tensor(1 + torch.finfo(torch_dtype(dtype)).eps, dtype=torch.float64)
        assert value.to(torch_dtype(dtype)).to(torch_dtype(expected)).double() == value
