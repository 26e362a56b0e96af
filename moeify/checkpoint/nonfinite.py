"""Counting NaN and Inf by their bits, at the speed of memory.

In every IEEE-like float the non-finite values have the exponent all ones, so as integers they are the largest: from
some threshold up among the positive (signed view), and from that threshold with the sign bit up among the negative
(unsigned view). Two maxima decide a chunk without a temporary; only a chunk that holds one is counted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from moeify.checkpoint.safetensors_file import read_exactly, tensor_bytes
from moeify.checkpoint.tensor_info import dtype_name

if TYPE_CHECKING:
    import torch

    from moeify.checkpoint.source import Source

# (bits, the smallest positive non-finite value as an integer)
_THRESHOLD = {
    "F64": (64, 0x7FF0_0000_0000_0000),
    "F32": (32, 0x7F80_0000),
    "C64": (32, 0x7F80_0000),
    "F16": (16, 0x7C00),
    "BF16": (16, 0x7F80),
    "F8_E5M2": (8, 0x7C),
    "F8_E4M3": (8, 0x7F),
}
_CHUNK = 1 << 20  # stays in the second-level cache between the two maxima


def count_nonfinite_bytes(raw: memoryview, dtype: str) -> int:
    """How many of the values in `raw` (a multiple of the itemsize) are NaN or Inf; 0 for integer dtypes."""
    import numpy as np

    if dtype not in _THRESHOLD:
        return 0
    bits, threshold = _THRESHOLD[dtype]
    signed = np.frombuffer(raw, dtype=f"<i{bits // 8}")
    unsigned = signed.view(f"<u{bits // 8}")
    sign = 1 << (bits - 1)
    found = 0
    step = _CHUNK * 8 // bits
    for start in range(0, len(signed), step):
        chunk, unsigned_chunk = signed[start : start + step], unsigned[start : start + step]
        if chunk.max() >= threshold or unsigned_chunk.max() >= sign + threshold:
            found += int(np.count_nonzero((unsigned_chunk & (sign - 1)) >= threshold))
    return found


def count_nonfinite_tensor(tensor: torch.Tensor) -> int:
    """How many values of a contiguous CPU tensor are NaN or Inf; 0 for integer dtypes."""
    return count_nonfinite_bytes(tensor_bytes(tensor), dtype_name(tensor.dtype) or "")


def count_nonfinite(source: Source, name: str) -> int:
    """How many values of one tensor of a checkpoint are NaN or Inf, with a fixed amount of memory where possible."""
    span = source.span(name)
    if span is None:
        return count_nonfinite_tensor(source.read(name))
    found = 0
    buffer = memoryview(bytearray(min(span.nbytes, 8 * _CHUNK)))
    with span.path.open("rb", buffering=0) as file:
        for start in range(0, span.nbytes, 8 * _CHUNK):
            chunk = buffer[: span.nbytes - start]
            read_exactly(file.fileno(), span.offset + start, chunk, span.path)
            found += count_nonfinite_bytes(chunk, source.tensors[name].dtype)
    return found
