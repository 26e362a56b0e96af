"""The header of a GGUF file, checked in one pass before the gguf library reads anything.

Keys with values, then the names, shapes, types and places of the tensors. The library believes every length and count
that it reads: one flipped bit makes it loop for hours, or lay one tensor over another.
"""

from __future__ import annotations

import mmap
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

from moeify.errors import CheckpointError
from moeify.files.limits import GGUF_ENTRIES, HEADS, LAYERS
from moeify.files.reading import opened

_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # of the scalar types, by number
_INTEGERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 10: "Q", 11: "q"}
_STRING, _ARRAY = 8, 9
_DIMENSIONS = 4
_ALIGNMENT = "general.alignment"
# Numbers that transformers divides by, or builds in a loop: by the ends of their keys, with the largest that is read.
_COUNTS = {".block_count": LAYERS, ".head_count": HEADS, ".head_count_kv": HEADS, ".rope.dimension_count": 2**20}
_LAYER = re.compile(r"(?:^|\.)blk\.(\d{1,9})\.")


@dataclass(frozen=True)
class Place:
    """Where a tensor lies.

    Attributes:
        name: As llama.cpp calls it.
        shape: In torch's order.
        begin: First byte, counted from the start of the data.
        end: The byte after the last.
    """

    name: str
    shape: tuple[int, ...]
    begin: int
    end: int


def check_header(file: Path, block_sizes: Mapping[int, tuple[int, int]]) -> dict[str, Place]:
    """Check a GGUF file.

    Args:
        file: The file.
        block_sizes: Values in a block and bytes of a block, by the number of the quantization type.

    Returns:
        The tensors by their names.

    Raises:
        CheckpointError: The file is truncated, or its header contradicts itself.
    """
    try:
        with opened(file) as opened_file, mmap.mmap(opened_file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _check(_Scanner(data), block_sizes)
    except (ValueError, struct.error) as error:  # struct: the file ends where a number should be
        raise CheckpointError(f"{file} cannot be read as GGUF, or is truncated ({error}): download it again") from error


def check_layers(file: Path, unused: Iterable[str], layers: int) -> None:
    """Refuse a file that holds more layers than the model that its metadata describes.

    Args:
        file: The file.
        unused: Names of the tensors that the model has no place for.
        layers: How many the model has.

    Raises:
        CheckpointError: A whole layer would be left out.
    """
    for name in unused:
        if (found := _LAYER.search(name)) and int(found[1]) >= layers:
            raise CheckpointError(f"{file} holds {name}, but its metadata says that there are {layers} layers")


class _Scanner:
    """A position in the file that only moves forward, and never past the end."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.position, self.order = data, 0, "<"

    def number(self, kind: str) -> int:
        layout = struct.Struct(self.order + kind)
        (value,) = layout.unpack_from(self.data, self.position)
        self.position += layout.size
        return int(value)

    def skip(self, nbytes: int) -> None:
        if nbytes > len(self.data) - self.position:
            raise ValueError(f"byte {self.position} announces {nbytes} bytes, the file ends at {len(self.data)}")
        self.position += nbytes

    def text(self) -> str:
        length = self.number("Q")
        start = self.position
        self.skip(length)
        return self.data[start : self.position].decode()

    def value(self, kind: int) -> int | None:
        """Pass over a value; return it if it is an integer."""
        if kind in _INTEGERS:
            return self.number(_INTEGERS[kind])
        if kind == _STRING:
            self.skip(self.number("Q"))
        elif kind == _ARRAY:
            self.array()
        elif kind in _BYTES:
            self.skip(_BYTES[kind])
        else:
            raise ValueError(f"byte {self.position}: there is no value type {kind}")
        return None

    def array(self) -> None:
        kind, length = self.number("I"), self.number("Q")
        if kind in _BYTES:
            self.skip(length * _BYTES[kind])
        elif kind == _STRING:
            if length > (len(self.data) - self.position) // 8:
                raise ValueError(f"byte {self.position} announces {length} texts, more than the file has room for")
            for _ in range(length):
                self.skip(self.number("Q"))
        else:
            raise ValueError(f"byte {self.position}: an array cannot hold values of type {kind}")


def _check(scan: _Scanner, block_sizes: Mapping[int, tuple[int, int]]) -> dict[str, Place]:
    if scan.data[:4] != b"GGUF":
        raise ValueError("it does not start with GGUF")
    scan.skip(4)
    version = scan.number("I")
    if version & 0xFFFF == 0:  # written on a machine with the other byte order
        scan.order, version = ">", version >> 24
    if version not in {2, 3}:
        raise ValueError(f"its version is {version}, expected 2 or 3")
    tensors, keys = scan.number("Q"), scan.number("Q")
    if max(tensors, keys) > GGUF_ENTRIES:
        raise ValueError(f"it announces {keys} keys and {tensors} tensors, expected at most {GGUF_ENTRIES} of each")
    alignment = _check_keys(scan, keys)
    places = [_place(scan, block_sizes, alignment) for _ in range(tensors)]
    start = -(-scan.position // alignment) * alignment
    position = 0
    for place in sorted(places, key=lambda place: (place.begin, place.end)):
        if place.begin < position:
            raise ValueError(f"{place.name} overlaps another tensor")
        position = place.end
    if places and start + position > len(scan.data):
        raise ValueError(f"the tensors end at byte {start + position}, the file at byte {len(scan.data)}")
    found = {place.name: place for place in places}
    if len(found) < len(places):
        raise ValueError("two tensors have the same name")
    return found


def _check_keys(scan: _Scanner, count: int) -> int:
    """Check the keys and their values; return the alignment of the tensors."""
    values: dict[str, int | None] = {}
    for _ in range(count):
        key = scan.text()
        if key in values:
            raise ValueError(f"the key {key!r} is there twice")
        values[key] = scan.value(scan.number("I"))
    for key, value in values.items():
        limit = next((limit for end, limit in _COUNTS.items() if key.endswith(end)), None)
        if limit is not None and value is not None and not 1 <= value <= limit:
            raise ValueError(f"{key} is {value}, expected 1 to {limit}")
    alignment = values.get(_ALIGNMENT, 32)
    if alignment is None or not 0 < alignment <= 2**20 or alignment.bit_count() > 1:
        raise ValueError(f"{_ALIGNMENT} is {alignment}, expected a power of 2")
    return alignment


def _place(scan: _Scanner, block_sizes: Mapping[int, tuple[int, int]], alignment: int) -> Place:
    name, count = scan.text(), scan.number("I")
    if count > _DIMENSIONS:
        raise ValueError(f"{name!r} has {count} dimensions, expected at most {_DIMENSIONS}")
    shape = tuple(scan.number("Q") for _ in range(count))[::-1]
    kind, begin = scan.number("I"), scan.number("Q")
    if kind not in block_sizes:
        raise ValueError(f"{name!r} has the quantization type {kind}, which the gguf package does not know")
    values, nbytes = block_sizes[kind]
    if not all(shape) or (shape[-1] if shape else 1) % values:
        raise ValueError(f"{name!r} has the shape {list(shape)}, which its blocks of {values} values do not fill")
    if begin % alignment:
        raise ValueError(f"{name!r} starts at byte {begin}, which is no multiple of {alignment}")
    return Place(name, shape, begin, begin + prod(shape) // values * nbytes)
