"""What the ranks of a distributed run wrote: safetensors files that each hold a part of every tensor.

`save_pretrained(…, distributed_checkpoint=True)` of transformers writes them, with torch's `HuggingFaceStorageWriter`:
one file or more for each rank, and in a header's metadata where each part begins in its tensor.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from moeify.checkpoint.folder import leads_outside
from moeify.checkpoint.safetensors_file import SafetensorsFiles
from moeify.checkpoint.tensor_info import Span, TensorInfo, torch_dtype
from moeify.errors import CheckpointError
from moeify.files.json_text import parse_json
from moeify.files.reading import is_file, list_folder

if TYPE_CHECKING:
    import torch

_NAME = re.compile(r"shard-(\d{5})-model-(\d{5})-of-(\d{5})\.safetensors")
_OFFSETS = "DCP_SHARDING_INFO"
_TOO_LARGE = 2**62  # torch counts in 64 bits


@dataclass(frozen=True)
class _Part:
    """A block of a tensor.

    Attributes:
        file: That holds it.
        info: Its name, dtype and shape.
        start: Where it begins in the tensor, by dimension.
    """

    file: SafetensorsFiles
    info: TensorInfo
    start: tuple[int, ...]

    @property
    def place(self) -> tuple[slice, ...]:
        """The elements of the tensor that it holds."""
        return tuple(slice(start, start + size) for start, size in zip(self.start, self.info.shape, strict=True))

    def meets(self, other: _Part) -> bool:
        """Return whether an element is in both."""
        return all(a.start < b.stop and b.start < a.stop for a, b in zip(self.place, other.place, strict=True))


def find_parts(folder: Path) -> tuple[Path, ...]:
    """Return the files that ranks wrote into a folder, in the order of ranks; none if it holds others.

    Raises:
        CheckpointError: One is missing between others.
    """
    found = {match.groups(): path for path in list_folder(folder) if (match := _NAME.fullmatch(path.name))}
    for path in found.values():
        if leads_outside(path, folder):
            raise CheckpointError(f"{path} is a link that leads outside the folder: it is not opened")
    ranks = {int(rank): int(count) for rank, _, count in found}
    for rank in range(1, max(ranks, default=0) + 1):
        for number in range(1, ranks.get(rank, 1) + 1):
            if not any(key[:2] == (f"{rank:05}", f"{number:05}") and is_file(path) for key, path in found.items()):
                raise CheckpointError(
                    f"{folder} has no shard-{rank:05}-model-{number:05}-of-… beside the parts of other ranks: copy the "
                    "files of all ranks into one folder"
                )
    return tuple(found.values())


class PartFiles:
    """The tensors of the files of all ranks.

    Raises:
        CheckpointError: A file is damaged, or a tensor has parts that are missing, overlap or differ in dtype.
    """

    unused = ()

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = tuple(files)
        self.header_bytes = b""
        self._parts: dict[str, list[_Part]] = {}
        for path in files:
            file = SafetensorsFiles((path,))
            self.header_bytes += file.header_bytes
            starts = _starts(path, file)
            for name, info in file.tensors.items():
                self._parts.setdefault(name, []).append(_Part(file, info, starts[name]))
        self.tensors = {name: _whole(parts) for name, parts in self._parts.items()}

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor, in memory of its own."""
        import torch

        first, *others = self._parts[name]
        if not others:
            return first.file.read(name)
        info = self.tensors[name]
        whole = torch.empty(info.shape, dtype=torch_dtype(info.dtype))
        for part in (first, *others):
            whole[part.place] = part.file.read(name)
        return whole

    def span(self, name: str) -> Span | None:
        """Return where the tensor's bytes lie; None if it is in several parts."""
        first, *others = self._parts[name]
        return None if others else first.file.span(name)

    def close(self) -> None:
        """Do nothing: files are opened for each read."""


def _starts(path: Path, file: SafetensorsFiles) -> dict[str, tuple[int, ...]]:
    """Return where the parts in a file begin, by the names of their tensors."""
    offsets = _inside(_inside(parse_json(file.header_bytes, constants=False), "__metadata__"), _OFFSETS)
    try:
        places = parse_json(offsets) if isinstance(offsets, str) else None
    except ValueError:
        places = None
    starts: dict[str, tuple[int, ...]] = {}
    for name, info in file.tensors.items():
        start = _inside(_inside(places, name), "saved_offsets")
        if not isinstance(start, list) or len(start) != len(info.shape) or not all(map(_is_offset, start)):
            raise CheckpointError(f"{path} does not say where its part of {name} begins ({_OFFSETS}): copy it again")
        starts[name] = tuple(start)
    return starts


def _is_offset(number: object) -> bool:
    return type(number) is int and 0 <= number < _TOO_LARGE


def _inside(entries: object, name: str) -> object:
    return entries.get(name) if isinstance(entries, dict) else None


def _whole(parts: list[_Part]) -> TensorInfo:
    """Return the tensor that parts make up: they must fill it, and have no element twice."""
    first = parts[0].info
    for part in parts[1:]:
        if (part.info.dtype, len(part.info.shape)) != (first.dtype, len(first.shape)):
            raise CheckpointError(
                f"{first.name} is {first.dtype}{list(first.shape)} in {parts[0].file.files[0].name} and "
                f"{part.info.dtype}{list(part.info.shape)} in {part.file.files[0].name}: they are of different runs"
            )
    shape = tuple(max(place.stop for place in places) for places in zip(*(part.place for part in parts), strict=True))
    for one, other in combinations(parts, 2):
        if one.meets(other):
            names = f"{one.file.files[0].name} and {other.file.files[0].name}"
            raise CheckpointError(f"{names} hold the same elements of {first.name}: they are of different runs")
    held = sum(prod(part.info.shape) for part in parts)
    if held != prod(shape):
        raise CheckpointError(
            f"{first.name} has {held:,} of its {prod(shape):,} elements in {parts[0].file.files[0].parent}: a file of "
            "parts is missing; copy the files of all ranks into one folder"
        )
    return TensorInfo(first.name, first.dtype, shape)
