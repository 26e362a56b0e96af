"""Device code inside a shared library: containers of entries, one for each kernel file and architecture.

`slim` leaves what one architecture runs, in place: the kept entries move to the front of their container and its header
gives their size, as if the library had been compiled for this architecture alone; zeros follow. Nothing else moves. A
container with nothing to keep gets a copy of the smallest entry for another architecture, so that launching one of its
kernels is an error (no kernel image for this device) and not a crash.
"""

# mypy: disable-error-code="import-not-found"

from __future__ import annotations

import re
import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby

MAGIC, VERSION = 0xBA55ED50, 1
ELF, ZSTD = 2, 0x8000
SECTIONS = (".nv_fatbin", "__nv_relfatbin")
# Kernels for what moeify never writes: MXFP4 weights, and flash attention of heads other than 64 and 128.
UNUSED = re.compile(r"12float_e2m1_t|5flash\w*?traitsILi(?:32|96|160|192|224|256)E|11EmptyKernel")
EMPTY = re.compile(r"11EmptyKernel")


@dataclass(frozen=True)
class Entry:
    """One entry: where it is in the library, and its header's fields."""

    container: int
    start: int
    stop: int
    kind: int
    header: int
    architecture: int
    flags: int
    compressed: int
    raw: int


@dataclass
class Report:
    """What was kept and dropped: entries and bytes, by architecture."""

    kept: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    containers: int = 0
    emptied: int = 0


def sections(data: bytes | bytearray) -> dict[str, tuple[int, int]]:
    """Return the offset and the size of each section of an ELF file."""
    (table,) = struct.unpack_from("<Q", data, 0x28)
    size, count, names = struct.unpack_from("<HHH", data, 0x3A)
    heads = [struct.unpack_from("<IIQQQQIIQQ", data, table + number * size) for number in range(count)]
    found = {}
    for head in heads:
        start = heads[names][4] + head[0]
        found[bytes(data[start : data.index(b"\0", start)]).decode()] = (head[4], head[5])
    return found


def entries(data: bytes | bytearray) -> Iterator[Entry]:
    """Yield the entries of a library, container by container.

    Raises:
        ValueError: A container is not laid out as expected.
    """
    found = sections(data)
    for start, size in (found[name] for name in SECTIONS if name in found):
        place = start
        while place + 16 <= start + size:
            magic, version, header, content = struct.unpack_from("<IHHQ", data, place)
            if magic != MAGIC:
                place += 8  # padding between containers
                continue
            if version != VERSION:
                raise ValueError(f"the container at {place:#x} has version {version}, expected {VERSION}")
            yield from _inside(data, place, place + header, place + header + content)
            place += header + content


def _inside(data: bytes | bytearray, container: int, place: int, stop: int) -> Iterator[Entry]:
    while place < stop:
        kind, _, header, padded = struct.unpack_from("<HHIQ", data, place)
        compressed, _, _, _, architecture, _, _, flags, _, raw = struct.unpack_from("<IIHHIIIQQQ", data, place + 16)
        end = place + header + padded
        yield Entry(container, place, end, kind, header, architecture, flags, compressed, raw)
        place = end
    if place != stop:
        raise ValueError(f"the container at {container:#x} does not end with its last entry")


def kernel_names(data: bytes | bytearray, entry: Entry) -> list[str]:
    """Return the names of the kernels in an entry; ["?"] where they cannot be read."""
    start = entry.start + entry.header
    if not entry.compressed:
        image = bytes(data[start : entry.stop])
    elif entry.flags & ZSTD:
        import zstandard  # only `prepare.sh` installs it

        packed = bytes(data[start : start + entry.compressed])
        image = zstandard.ZstdDecompressor().decompress(packed, max_output_size=entry.raw)
    else:
        return ["?"]
    return sorted({name.decode() for name in re.findall(rb"\.text\.([\w$]+)", image)}) or ["?"]


def slim(data: bytearray, architecture: int, *, keep_unused: bool = False) -> Report:
    """Leave in every container what an architecture runs, in place.

    Args:
        data: The library, which is changed.
        architecture: 90 stands for sm_90.
        keep_unused: Whether kernels that moeify's exports never call are kept, too.

    Raises:
        ValueError: The library is not laid out as expected.
    """
    report, listed = Report(), list(entries(data))
    others = [entry for entry in listed if entry.architecture != architecture and entry.kind == ELF]
    smallest = min(others, key=lambda entry: entry.stop - entry.start)
    filler = bytes(data[smallest.start : smallest.stop])
    for container, group in groupby(listed, key=lambda entry: entry.container):
        inside, kept = list(group), []
        for entry in inside:
            wanted = _is_wanted(data, entry, architecture, keep_unused)
            side = report.kept if wanted else report.dropped
            side[f"sm_{entry.architecture}"] += entry.stop - entry.start
            if wanted:
                kept.append(bytes(data[entry.start : entry.stop]))
        report.containers += 1
        report.emptied += not kept
        _replace(data, container, inside[0].start, inside[-1].stop, b"".join(kept) or filler)
    return report


def _is_wanted(data: bytearray, entry: Entry, architecture: int, keep_unused: bool) -> bool:
    if entry.architecture != architecture or entry.kind != ELF:
        return False
    names = kernel_names(data, entry)
    return keep_unused or not all(map(UNUSED.search, names)) or all(map(EMPTY.search, names))


def _replace(data: bytearray, container: int, first: int, last: int, body: bytes) -> None:
    if len(body) > last - first:
        raise ValueError(f"the container at {container:#x} is too small for the filler")
    data[first:last] = body + bytes(last - first - len(body))
    struct.pack_into("<Q", data, container + 8, len(body))
