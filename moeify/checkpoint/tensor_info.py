"""What is known of a stored tensor before it is read: name, dtype, shape, and where its bytes lie.

Dtypes are spelled as safetensors spells them (`"BF16"`), so that nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    import torch

_DTYPES = {  # safetensors name: torch name, bytes per value
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "C64": ("complex64", 8),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U64": ("uint64", 8),
    "U32": ("uint32", 4),
    "U16": ("uint16", 2),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
}
_SAFETENSORS_NAME = {torch_name: name for name, (torch_name, _) in _DTYPES.items()}

ITEMSIZE: dict[str, int] = {name: itemsize for name, (_, itemsize) in _DTYPES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a checkpoint.

    Attributes:
        name: Its key, as Hugging Face spells it.
        dtype: In safetensors spelling, a key of `ITEMSIZE`; for GGUF the dtype after dequantization.
        shape: In torch's order; `()` for a scalar.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the values, without padding."""
        return prod(self.shape) * ITEMSIZE[self.dtype]


@dataclass(frozen=True)
class Span:
    """A range of bytes in a file that holds the values of a tensor as they are: little endian, row major."""

    path: Path
    offset: int
    nbytes: int


def torch_dtype(name: str) -> torch.dtype:
    """Return the torch dtype of a safetensors dtype name."""
    import torch

    return cast("torch.dtype", getattr(torch, _DTYPES[name][0]))


def dtype_name(dtype: torch.dtype) -> str | None:
    """Return the safetensors name of a torch dtype, or None if safetensors cannot hold it."""
    return _SAFETENSORS_NAME.get(str(dtype).removeprefix("torch."))


def widest(dtypes: Collection[str]) -> str:
    """Return the floating-point dtype that holds the values of all of these, as closely as one of them does."""
    size = max(ITEMSIZE[dtype] for dtype in dtypes)
    largest = {dtype for dtype in dtypes if ITEMSIZE[dtype] == size}
    return largest.pop() if len(largest) == 1 else "F32"  # float16 and bfloat16: neither holds the other's values
