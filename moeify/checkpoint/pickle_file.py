"""PyTorch's own format, `pytorch_model.bin`: read only when the caller allows pickles, and never with code in them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

from moeify.checkpoint.tensor_info import Span, TensorInfo, dtype_name
from moeify.errors import CheckpointError

if TYPE_CHECKING:
    import torch


class PickleFiles:
    """The tensors of one or many pickled state dicts, mapped into memory rather than read.

    Raises:
        CheckpointError: a file is not a pickled state dict of plain tensors, or two files hold the same name.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = tuple(files)
        self.header_bytes = b""
        self.tensors: dict[str, TensorInfo] = {}
        self.file_of: dict[str, Path] = {}
        self._values: dict[str, torch.Tensor] = {}
        for file in files:
            for name, value in _load(file).items():
                if name in self.tensors:
                    first = self.file_of[name].name
                    raise CheckpointError(f"{name} is in both {first} and {file.name}: keep one of them.")
                self.tensors[name] = _describe(file, name, value)
                self.file_of[name] = file
                self._values[name] = value

    def read(self, name: str) -> torch.Tensor:
        """One tensor, in memory of its own."""
        import torch

        return self._values[name].detach().clone(memory_format=torch.contiguous_format)

    def span(self, name: str) -> Span | None:
        """None: a pickled tensor may be strided, so its bytes are not taken from disk as they lie."""
        return None

    def close(self) -> None:
        """Lets go of the mapped files."""
        self._values.clear()


def _load(file: Path) -> dict[str, Any]:
    import torch

    try:
        try:
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # files from before torch 1.6 are not zip archives and cannot be mapped
            state = torch.load(file, map_location="cpu", weights_only=True)
    except (RuntimeError, UnpicklingError, EOFError, ValueError, KeyError, OSError) as error:
        reason = str(error).strip().split("\n")[0]
        raise CheckpointError(
            f"{file} cannot be read as plain tensors ({reason}): use a safetensors version."
        ) from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{file} holds a {type(state).__name__}, not a state dict.")
    return state


def _describe(file: Path, name: str, value: Any) -> TensorInfo:
    import torch

    dtype = dtype_name(value.dtype) if isinstance(value, torch.Tensor) and value.layout == torch.strided else None
    if dtype is None:
        raise CheckpointError(f"{file} holds {name}, which is not a plain tensor but {type(value).__name__}.")
    return TensorInfo(name, dtype, tuple(value.shape))
