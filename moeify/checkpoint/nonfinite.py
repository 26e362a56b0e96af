"""Looking for NaN and Inf by their bits, at the speed of memory.

In every IEEE-like float the exponent of a non-finite value is all ones. Read as integers, the non-finite values are
therefore the largest: from a threshold up among the positive values (signed view), and from that threshold with the
sign bit up among the negative ones (unsigned view). Two maxima decide a chunk without a temporary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from moeify.checkpoint.safetensors_file import read_exactly, tensor_bytes
from moeify.checkpoint.tensor_info import dtype_name
from moeify.files.reading import opened

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
_CHUNK = 1 << 20  # bytes that stay in the second-level cache between the two maxima
BUFFER = 8 * _CHUNK  # bytes of a file that are read at a time


def bytes_hold_nonfinite(raw: memoryview, dtype: str) -> bool:
    """Return whether a value in `raw` (a multiple of the itemsize) is NaN or Inf; integers never are."""
    import numpy as np

    if dtype not in _THRESHOLD:
        return False
    bits, threshold = _THRESHOLD[dtype]
    signed = np.frombuffer(raw, dtype=f"<i{bits // 8}")
    unsigned = signed.view(f"<u{bits // 8}")
    step = _CHUNK * 8 // bits
    chunks = (slice(start, start + step) for start in range(0, len(signed), step))
    sign = 1 << (bits - 1)
    return any(signed[c].max() >= threshold or unsigned[c].max() >= sign + threshold for c in chunks)


def tensor_holds_nonfinite(tensor: torch.Tensor) -> bool:
    """Return whether a value of a contiguous CPU tensor is NaN or Inf."""
    return bytes_hold_nonfinite(tensor_bytes(tensor), dtype_name(tensor.dtype) or "")


def holds_nonfinite(source: Source, name: str) -> bool:
    """Return whether a value of a checkpoint's tensor is NaN or Inf, in a fixed amount of memory where possible."""
    span = source.span(name)
    if span is None:
        return tensor_holds_nonfinite(source.read(name))
    buffer = memoryview(bytearray(min(span.nbytes, BUFFER)))
    with opened(span.path) as file:
        for start in range(0, span.nbytes, BUFFER):
            chunk = buffer[: span.nbytes - start]
            read_exactly(file.fileno(), span.offset + start, chunk, span.path)
            if bytes_hold_nonfinite(chunk, source.tensors[name].dtype):
                return True
    return False
