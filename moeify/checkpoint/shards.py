"""What a checkpoint to be written consists of, and how it is cut into files; nothing here touches the disk.

A tensor is a sequence of parts along its first dimension. A part is rows of a source tensor, whose bytes are copied as
they are, or a function that computes the values. E stacked copies of an FFN are the same two parts, E times.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from moeify.checkpoint.folder import SAFETENSORS
from moeify.checkpoint.tensor_info import ITEMSIZE, TensorInfo

if TYPE_CHECKING:
    import torch

Compute: TypeAlias = "Callable[[], torch.Tensor]"


@dataclass(frozen=True)
class SourceRows:
    """A whole tensor of the source, or the rows `[start, stop)` of it, as they are."""

    source_name: str
    rows: tuple[int, int] | None = None


@dataclass(frozen=True)
class OutTensor:
    """A tensor to write.

    Attributes:
        name: Its key in the output.
        dtype: In safetensors spelling. Rows of the source must have it already: a cast is a computed part.
        shape: Of the whole tensor.
        parts: What it consists of, in order. A function that is repeated is called once for a run of repeats.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    parts: tuple[SourceRows | Compute, ...]

    @classmethod
    def copy(cls, info: TensorInfo, name: str | None = None) -> OutTensor:
        """Return a source tensor as it is, under its own name or another."""
        return cls(name or info.name, info.dtype, info.shape, (SourceRows(info.name),))

    @property
    def info(self) -> TensorInfo:
        """What a reader of the output will see."""
        return TensorInfo(self.name, self.dtype, self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the values."""
        return self.info.nbytes


@dataclass(frozen=True)
class Shard:
    """One file of the output, with its tensors in the order of the file."""

    name: str
    tensors: tuple[OutTensor, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the values, without the header."""
        return sum(tensor.nbytes for tensor in self.tensors)


def plan_shards(tensors: Sequence[OutTensor], shard_size: int) -> list[Shard]:
    """Cut tensors into files of at most `shard_size` bytes of values; a larger tensor gets a file of its own.

    Tensors keep their order over the files. Within a file, wider dtypes come first, so that every tensor is aligned.

    Raises:
        ValueError: Two tensors have the same name.
    """
    names = {tensor.name for tensor in tensors}
    if len(names) < len(tensors):
        raise ValueError("two output tensors have the same name")
    groups: list[list[OutTensor]] = [[]]
    filled = 0
    for tensor in tensors:
        if groups[-1] and filled + tensor.nbytes > shard_size:
            groups.append([])
            filled = 0
        groups[-1].append(tensor)
        filled += tensor.nbytes
    count = len(groups)
    return [
        Shard(
            SAFETENSORS if count == 1 else f"model-{number:05}-of-{count:05}.safetensors",
            tuple(sorted(group, key=lambda tensor: -ITEMSIZE[tensor.dtype])),
        )
        for number, group in enumerate(groups, 1)
    ]
