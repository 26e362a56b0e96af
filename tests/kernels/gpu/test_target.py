from __future__ import annotations

from typing import Any

import pytest
import torch

from moeify.kernels.gpu import target
from moeify.kernels.gpu.tiles import TILES


def test_the_interpreter_is_known() -> None:
    assert target.interpreted() and target.architecture() == "interpreter"


def test_the_shared_memory_of_every_architecture_with_tiles_is_known() -> None:
    assert set(TILES) <= set(target.SHARED_MEMORY)


@pytest.mark.parametrize(
    ("architecture", "setting", "dtype", "precision"),
    [
        ("sm_90", "tf32", torch.float32, "tf32"),
        ("sm_90", "ieee", torch.float32, "ieee"),
        ("sm_90", "tf32", torch.bfloat16, "ieee"),
        ("gfx942", "tf32", torch.float32, "ieee"),
    ],
)
def test_products_are_tf32_where_torch_is_told_so_and_the_hardware_has_it(
    architecture: str, setting: str, dtype: torch.dtype, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(target, "architecture", lambda: architecture)
    matmul: Any = torch.backends.cuda.matmul  # its settings are not attributes that monkeypatch could restore
    before, matmul.fp32_precision = matmul.fp32_precision, setting
    try:
        assert target.product_precision(dtype) == precision
    finally:
        matmul.fp32_precision = before
