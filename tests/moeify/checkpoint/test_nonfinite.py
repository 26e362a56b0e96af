from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from moeify.checkpoint.nonfinite import BUFFER, bytes_hold_nonfinite, holds_nonfinite, tensor_holds_nonfinite
from moeify.checkpoint.safetensors_file import tensor_bytes
from moeify.checkpoint.source import open_source
from moeify.checkpoint.tensor_info import ITEMSIZE, torch_dtype

FLOATS = ["F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"]


def nonfinite(value: float) -> bool:
    return value != value or abs(value) == float("inf")


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F8_E4M3", "F8_E5M2"])
def test_every_bit_pattern(dtype: str) -> None:
    bits = 8 * ITEMSIZE[dtype]
    integer = {8: torch.uint8, 16: torch.int16}[bits]
    patterns = torch.arange(1 << bits).to(integer).view(torch_dtype(dtype))
    raw = tensor_bytes(patterns)
    step = ITEMSIZE[dtype]
    for index, value in enumerate(patterns.to(torch.float64).tolist()):
        assert bytes_hold_nonfinite(raw[index * step : index * step + step], dtype) == nonfinite(value)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2])
def test_the_largest_finite_value_and_infinity(dtype: torch.dtype, sign: int) -> None:
    assert not tensor_holds_nonfinite(torch.tensor([sign * torch.finfo(dtype).max], dtype=torch.float64).to(dtype))
    assert tensor_holds_nonfinite(torch.tensor([sign * float("inf")]).to(dtype))


@given(st.binary(min_size=0, max_size=400), st.sampled_from(FLOATS))
@settings(max_examples=200, deadline=None)
def test_random_bits(raw: bytes, dtype: str) -> None:
    raw = raw[: len(raw) // 8 * 8]
    if not raw:
        assert not bytes_hold_nonfinite(memoryview(raw), dtype)
        return
    tensor = torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(torch_dtype(dtype))
    assert tensor_holds_nonfinite(tensor) == any(map(nonfinite, tensor.to(torch.float64).tolist()))


@pytest.mark.parametrize("value", [complex(1, float("nan")), complex(float("-inf"), 2), complex(3, 4)])
def test_both_halves_of_a_complex_number(value: complex) -> None:
    assert tensor_holds_nonfinite(torch.tensor([1j, value])) == (value != complex(3, 4))


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool])
def test_integers_are_finite(dtype: torch.dtype) -> None:
    assert not tensor_holds_nonfinite(torch.full((9,), -1).to(dtype))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), -float("nan")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_one_at_any_place_of_a_file_longer_than_the_buffer(tmp_path: Path, value: float, dtype: torch.dtype) -> None:
    size = BUFFER // dtype.itemsize + 101
    tensor = torch.full((size,), torch.finfo(dtype).max, dtype=dtype)
    tensor[::2] = torch.finfo(dtype).min
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    for place in (0, size // 3, size - 1):
        spoiled = tensor.clone()
        spoiled[place] = value
        save_file({"good": tensor, "spoiled": spoiled}, tmp_path / "model.safetensors")
        with open_source(tmp_path) as source:
            assert not holds_nonfinite(source, "good")
            assert holds_nonfinite(source, "spoiled")
