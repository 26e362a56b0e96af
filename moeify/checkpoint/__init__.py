"""Reading and writing checkpoints with bounded memory: nothing here knows what a mixture of experts is."""

from __future__ import annotations

from moeify.checkpoint.nonfinite import count_nonfinite
from moeify.checkpoint.source import Source, open_source
from moeify.checkpoint.tensor_info import Span, TensorInfo, dtype_name, torch_dtype

__all__ = ["Source", "Span", "TensorInfo", "count_nonfinite", "dtype_name", "open_source", "torch_dtype"]
