"""Checkpoints of one quantized weight, written number by number as the formats are described, and what they mean."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from moeify.checkpoint.source import open_source
from moeify.errors import CheckpointError

Tensors = dict[str, Tensor]
NAME = "model.layers.0.mlp.up_proj"


def numbers(*shape: int, below: int, seed: int = 0) -> Tensor:
    """Whole numbers from 0."""
    return torch.randint(0, below, shape, generator=torch.Generator().manual_seed(seed))


def scales(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Scales of both orders of magnitude and all different."""
    return (torch.rand(shape, generator=torch.Generator().manual_seed(7)) + 0.1).to(dtype)


def stream(values: Sequence[int], bits: int) -> list[int]:
    """Numbers one after the other in words of 32 bits, the lowest bits first, as signed integers."""
    whole = sum(int(value) << (bits * place) for place, value in enumerate(values))
    count = -(-len(values) * bits // 32)
    words = [(whole >> (32 * word)) & 0xFFFFFFFF for word in range(count)]
    return [word - (1 << 32) if word >= 1 << 31 else word for word in words]


def packed(values: Tensor, bits: int, axis: int) -> Tensor:
    """A matrix of whole numbers, packed along an axis."""
    lines = values.tolist() if axis else values.t().tolist()
    words = torch.tensor([stream(line, bits) for line in lines], dtype=torch.int32)
    return (words if axis else words.t()).contiguous()


def write(folder: Path, tensors: Mapping[str, Tensor], settings: object, dtype: str | None = "float32") -> Path:
    """A checkpoint of one module, beside a tensor that is not quantized."""
    folder.mkdir(exist_ok=True)
    config = {"model_type": "llama", "quantization_config": settings, **({} if dtype is None else {"dtype": dtype})}
    (folder / "config.json").write_text(json.dumps(config))
    named = {f"{NAME}.{name}": tensor.contiguous() for name, tensor in tensors.items()}
    save_file({**named, "model.norm.weight": torch.ones(3)}, folder / "model.safetensors")
    return folder


def assert_reads(folder: Path, expected: Tensor, tolerance: float = 1e-6) -> None:
    """The weight is the only tensor of its module, and has the expected values in float64."""
    with open_source(folder, dequantize=True) as source:
        assert set(source.tensors) == {f"{NAME}.weight", "model.norm.weight"}
        assert "quantization_config" not in source.config
        found = source.read(f"{NAME}.weight")
    assert found.dtype == torch.float32 and found.shape == expected.shape
    assert float((found.double() - expected).abs().max()) <= tolerance * float(expected.abs().max())


def refusal(folder: Path) -> str:
    """What is said of a checkpoint whose tensors do not fit together, when it is opened or read."""
    with pytest.raises(CheckpointError) as caught, open_source(folder, dequantize=True) as source:
        source.read(f"{NAME}.weight")
    assert "\n" not in str(caught.value)
    return str(caught.value)
