"""PyTorch's own format, `pytorch_model.bin`: read only when the caller allows pickles, and never with code in them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING

from moeify.checkpoint.folder import note_file
from moeify.checkpoint.tensor_info import TensorInfo, dtype_name
from moeify.errors import CheckpointError, first_line
from moeify.files.reading import check_size, check_unchanged, state_of

if TYPE_CHECKING:
    import torch


class PickleFiles:
    """The tensors of one or many pickled state dicts, mapped into memory and not read.

    Raises:
        CheckpointError: A file is not a pickled state dict of plain tensors, or two files hold the same name.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = tuple(files)
        self.header_bytes = b""
        self.tensors: dict[str, TensorInfo] = {}
        self.file_of: dict[str, Path] = {}
        self._values: dict[str, torch.Tensor] = {}
        self._states = {file: state_of(file) for file in files}
        for file in files:
            for name, value in _load(file).items():
                if not isinstance(name, str):
                    raise CheckpointError(f"{file} has the key {name!r}, not the name of a tensor: use safetensors")
                note_file(self.file_of, name, file)
                self.tensors[name], self._values[name] = _plain_tensor(file, name, value)

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor, in memory of its own."""
        import torch

        file = self.file_of[name]
        check_unchanged(file, self._states[file])
        return self._values[name].detach().clone(memory_format=torch.contiguous_format)

    def span(self, name: str) -> None:
        """Return None: a pickled tensor may be strided, so its bytes are not copied as they lie on disk."""

    def close(self) -> None:
        """Release the mapped files."""
        self._values.clear()


def _load(file: Path) -> dict[object, object]:
    import torch

    check_size(file, None)  # torch maps it
    try:
        try:
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # files from before torch 1.6 are not zip archives and cannot be mapped
            state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle raises whatever its opcodes lead to
        # torch's own words advise to let the code run.
        reason = "it is damaged, or asks to run code" if isinstance(error, UnpicklingError) else first_line(error)
        raise CheckpointError(f"{file} cannot be read as plain tensors ({reason}): use safetensors") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{file} holds a {type(state).__name__}, not a state dict: use safetensors")
    return state


def _plain_tensor(file: Path, name: str, value: object) -> tuple[TensorInfo, torch.Tensor]:
    import torch

    if isinstance(value, torch.Tensor) and value.layout == torch.strided and value.device.type == "cpu":
        dtype = dtype_name(value.dtype)
        if value.nbytes > value.untyped_storage().nbytes():
            raise CheckpointError(f"{file} holds {name} with repeated values ({value.nbytes:,} bytes): use safetensors")
        if dtype is not None:
            return TensorInfo(name, dtype, tuple(value.shape)), value
    raise CheckpointError(f"{file} holds {name}, which is not a plain tensor but {type(value).__name__}")
