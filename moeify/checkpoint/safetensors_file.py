"""The safetensors format: eight bytes of header length, a JSON header, then the tensors' bytes without gaps.

The whole header is checked before any byte of data is used, so a damaged file is found when it is opened.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from moeify.checkpoint.folder import note_file
from moeify.checkpoint.tensor_info import ITEMSIZE, Span, TensorInfo, torch_dtype
from moeify.errors import CheckpointError
from moeify.files.json_text import parse_json
from moeify.files.limits import HEADER_BYTES, TENSOR_DIMENSIONS
from moeify.files.reading import opened

if TYPE_CHECKING:
    import torch

_TOO_LARGE = 2**63  # torch and the safetensors library count in 64 bits
_ALIGNMENT = 8


def _read_header(path: Path) -> tuple[bytes, dict[TensorInfo, Span]]:
    """Read and check the header of a safetensors file.

    Returns:
        The header as it is, and each tensor with its place, in the order of the data.

    Raises:
        CheckpointError: The file is truncated, is not safetensors, or its header contradicts itself.
    """
    with opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > HEADER_BYTES:
            _refuse(path, "it does not start with a safetensors header")
        if 8 + length > size:
            _refuse(path, f"truncated: the header ends at byte {8 + length}, the file at byte {size}")
        raw = file.read(length)
    try:
        header = parse_json(raw, constants=False)
    except ValueError as error:
        _refuse(path, f"its header is not valid JSON ({error})")
    if not isinstance(header, dict):
        _refuse(path, "its header is not a JSON object")
    _check_metadata(path, header.pop("__metadata__", None))
    start = 8 + length
    entries = sorted((_read_entry(path, name, entry) for name, entry in header.items()), key=lambda item: item[1:])
    _check_layout(path, entries, size - start)
    return raw, {info: Span(path, start + begin, end - begin) for info, begin, end in entries}


def _check_metadata(path: Path, metadata: object) -> None:
    if not isinstance(metadata, dict | None) or not all(isinstance(text, str) for text in (metadata or {}).values()):
        _refuse(path, "its __metadata__ is not a map from texts to texts")


def _read_entry(path: Path, name: str, entry: object) -> tuple[TensorInfo, int, int]:
    """Return what a header says of one tensor: the tensor, and where its data begin and end."""
    match entry:
        case {"dtype": dtype, "shape": [*lengths], "data_offsets": [begin, end]}:
            pass
        case _:
            _refuse(path, f"the entry of {name} has no dtype, shape and two data_offsets")
    if not isinstance(dtype, str) or dtype not in ITEMSIZE:
        _refuse(path, f"{name} has the unknown dtype {dtype!r} (known: {', '.join(ITEMSIZE)})")
    if len(lengths) > TENSOR_DIMENSIONS:
        _refuse(path, f"{name} has {len(lengths)} dimensions, expected at most {TENSOR_DIMENSIONS}")
    whole = all(type(n) is int and 0 <= n < _TOO_LARGE for n in (*lengths, begin, end))
    if not whole or end < begin or prod(filter(None, lengths)) >= _TOO_LARGE:
        _refuse(path, f"{name} has an impossible shape {lengths} or data_offsets {[begin, end]}")
    info = TensorInfo(name, dtype, tuple(lengths))
    if end - begin != info.nbytes:
        _refuse(path, f"{name} takes {end - begin} bytes where {dtype}{lengths} needs {info.nbytes}")
    return info, begin, end


def _check_layout(path: Path, entries: Sequence[tuple[TensorInfo, int, int]], data_size: int) -> None:
    position = 0
    for info, begin, end in entries:
        if begin != position:
            problem = "overlaps the tensor before it" if begin < position else "leaves a gap before it"
            _refuse(path, f"{info.name} {problem} (starts at byte {begin} of the data, expected {position})")
        position = end
    if position > data_size:
        _refuse(path, f"truncated: the tensors need {position} bytes, the file holds {data_size}")
    if position < data_size:
        _refuse(path, f"{data_size - position} bytes follow the last tensor")


def _refuse(path: Path, problem: str) -> NoReturn:
    raise CheckpointError(f"{path} cannot be read: {problem}; download or copy the file again")


def encode_header(tensors: Iterable[TensorInfo]) -> bytes:
    """Return the bytes before the data of a file that holds `tensors` in this order, with the length field."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for info in tensors:
        end = position + info.nbytes
        header[info.name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": [position, end]}
        position = end
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % _ALIGNMENT)
    return len(raw).to_bytes(8, "little") + raw


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """Return the values of a CPU tensor as bytes, row major; the memory is that of a contiguous tensor."""
    import torch

    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data


def read_exactly(fd: int, offset: int, buffer: memoryview, path: Path) -> None:
    """Fill `buffer` from `offset` of an open file.

    Raises:
        CheckpointError: The file ends before the buffer is full.
    """
    filled = 0
    while filled < len(buffer):
        count = os.preadv(fd, [buffer[filled:]], offset + filled)
        if count == 0:
            raise CheckpointError(f"{path} became shorter while it was read: leave the source alone and run again")
        filled += count


class SafetensorsFiles:
    """The tensors of one or many safetensors files.

    Raises:
        CheckpointError: A file is damaged, or two files hold a tensor of the same name.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = tuple(files)
        self.header_bytes = b""
        self.tensors: dict[str, TensorInfo] = {}
        self.file_of: dict[str, Path] = {}
        self._spans: dict[str, Span] = {}
        for file in files:
            raw, spans = _read_header(file)
            self.header_bytes += raw
            for info, span in spans.items():
                note_file(self.file_of, info.name, file)
                self.tensors[info.name] = info
                self._spans[info.name] = span

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor, in memory of its own."""
        import torch

        info, span = self.tensors[name], self._spans[name]
        raw = torch.empty(span.nbytes, dtype=torch.uint8)
        with opened(span.path) as file:
            read_exactly(file.fileno(), span.offset, raw.numpy().data, span.path)
        return raw.view(torch_dtype(info.dtype)).reshape(info.shape)

    def span(self, name: str) -> Span:
        """Return where the tensor's bytes lie."""
        return self._spans[name]

    def close(self) -> None:
        """Do nothing: files are opened for each read, so that there may be any number of shards."""
