"""Reading and writing checkpoints with bounded memory: nothing here knows what a mixture of experts is."""

from __future__ import annotations

from moeify.checkpoint.nonfinite import count_nonfinite
from moeify.checkpoint.shards import OutTensor, Part, Shard, plan_shards
from moeify.checkpoint.source import Source, open_source
from moeify.checkpoint.staging import staged
from moeify.checkpoint.tensor_info import Span, TensorInfo, dtype_name, torch_dtype
from moeify.checkpoint.writer import write_checkpoint

__all__ = [
    "OutTensor",
    "Part",
    "Shard",
    "Source",
    "Span",
    "TensorInfo",
    "count_nonfinite",
    "dtype_name",
    "open_source",
    "plan_shards",
    "staged",
    "torch_dtype",
    "write_checkpoint",
]
