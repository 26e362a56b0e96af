"""The tensors of other files, some of them computed as they are read: from quantized ones, or with an adapter."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from moeify.checkpoint.tensor_info import Span, TensorInfo, torch_dtype
from moeify.errors import CheckpointError, told_as

if TYPE_CHECKING:
    import torch


class Stored(Protocol):
    """The tensors of a checkpoint in any storage format."""

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that hold them."""
        ...

    @property
    def header_bytes(self) -> bytes:
        """What says where they lie."""
        ...

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """What is known of each, by name."""
        ...

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor, in memory of its own."""
        ...

    def span(self, name: str) -> Span | None:
        """Return where its bytes lie; None if they are not those of the tensor."""
        ...

    def close(self) -> None:
        """Release the files."""
        ...


@dataclass(frozen=True)
class Computed:
    """A tensor that no file holds as it is.

    Attributes:
        info: What it is.
        replaces: Stored tensors in whose place it stands.
        compute: Returns its values, in any dtype.
    """

    info: TensorInfo
    replaces: tuple[str, ...]
    compute: Callable[[], torch.Tensor]


class DerivedFiles:
    """The tensors of a checkpoint, some of them computed.

    Args:
        stored: The checkpoint.
        computed: What is computed, in place of what.
        beside: Other files that it is computed from.
    """

    def __init__(self, stored: Stored, computed: Iterable[Computed], beside: Stored | None = None) -> None:
        self._stored, self._beside = stored, beside
        self._computed = {tensor.info.name: tensor for tensor in computed}
        self.files = stored.files + (() if beside is None else beside.files)
        self.header_bytes = stored.header_bytes + (b"" if beside is None else beside.header_bytes)
        instead = {name: tensor.info for tensor in self._computed.values() for name in tensor.replaces}
        found = (instead.get(name, info) for name, info in stored.tensors.items())
        self.tensors = {info.name: info for info in found}

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor, in memory of its own.

        Raises:
            CheckpointError: What is stored of it does not fit together.
        """
        if name not in self._computed:
            return self._stored.read(name)
        info = self._computed[name].info
        with told_as(f"{name} cannot be computed from what {self.files[0].parent} holds", CheckpointError):
            values = self._computed[name].compute()
            if tuple(values.shape) != info.shape:
                raise ValueError(f"it has shape {list(values.shape)}, expected {list(info.shape)}")
            return values.to(torch_dtype(info.dtype)).contiguous()

    def span(self, name: str) -> Span | None:
        """Return where the tensor's bytes lie; None for one that is computed."""
        return None if name in self._computed else self._stored.span(name)

    def close(self) -> None:
        """Release the files."""
        self._stored.close()
        if self._beside is not None:
            self._beside.close()
