"""What a checkpoint to be written consists of, and how it is cut into files. Nothing here touches the disk.

A tensor is a sequence of parts, laid one after the other along its first dimension: rows of a source tensor, whose
bytes are copied as they are, or a function that computes a piece. Stacking copies of an FFN for E experts is the
same two parts E times over.
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
class Part:
    """A source tensor, or the rows `[start, stop)` of it, verbatim."""

    source_name: str
    rows: tuple[int, int] | None = None


@dataclass(frozen=True)
class OutTensor:
    """A tensor to write.

    Attributes:
        name: its key in the output.
        dtype: safetensors spelling; source parts must already have it (a cast is a computed part).
        shape: of the whole.
        parts: what it is made of, in order. A function that is repeated is called once for a run of repeats.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    parts: tuple[Part | Compute, ...]

    @classmethod
    def copy(cls, info: TensorInfo, name: str | None = None) -> OutTensor:
        """A source tensor as it is, under its own name or another."""
        return cls(name or info.name, info.dtype, info.shape, (Part(info.name),))

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
    """One file of the output; its tensors are in the order in which they lie in the file."""

    name: str
    tensors: tuple[OutTensor, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the values, without the header."""
        return sum(tensor.nbytes for tensor in self.tensors)


def plan_shards(tensors: Sequence[OutTensor], shard_size: int) -> list[Shard]:
    """Cuts tensors into files of at most `shard_size` bytes of values (a larger tensor gets a file of its own).

    The order is kept, but for this: within a file wider dtypes come first, so that every tensor is aligned.

    Raises:
        ValueError: two tensors have the same name.
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
