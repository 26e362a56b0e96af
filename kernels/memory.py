"""Large outputs on CPU, in pages that cost little."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from contextlib import suppress
from math import prod
from pathlib import Path

import torch
from torch import Tensor

# Above this size glibc maps fresh pages for every allocation (DEFAULT_MMAP_THRESHOLD_MAX); below, it reuses them.
ALWAYS_MAPPED = 32 << 20
MAPPED_IF_MOSTLY_UNUSED = 4 << 20
LARGE_PAGE_ORDER = 9  # 2 MiB in pages of 4 KiB


def room(shape: Sequence[int], dtype: torch.dtype, device: torch.device, unused: Sequence[slice]) -> Tensor:
    """Return a tensor to be written everywhere but in the `unused` ranges of its first dimension, which are zero.

    Fresh pages cost nothing until they are touched, and then a fault each: several times the write itself, unless they
    are large ones. Those are asked for only while the system has many free: it would move other pages out of the way
    for them, which costs five times as much as small ones do.
    """
    size = prod(shape) * dtype.itemsize
    mostly_unused = 2 * sum(rows.stop - rows.start for rows in unused) > shape[0]
    mapped = size > (MAPPED_IF_MOSTLY_UNUSED if mostly_unused else ALWAYS_MAPPED)
    if mapped and device.type == "cpu" and hasattr(mmap, "MADV_HUGEPAGE"):
        large = free_in_large_blocks() > 2 * size
        if large or mostly_unused:
            pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            if large:
                with suppress(OSError):  # a kernel built without large pages
                    pages.madvise(mmap.MADV_HUGEPAGE)
            return torch.frombuffer(pages, dtype=dtype).view(shape)
    out = torch.empty(shape, dtype=dtype, device=device)
    for rows in unused:
        if rows.stop > rows.start:
            out[rows] = 0
    return out


def free_in_large_blocks(buddyinfo: Path = Path("/proc/buddyinfo")) -> int:
    """Return the bytes of memory that are free in blocks of a large page or more; 0 where the system does not say."""
    try:
        zones = buddyinfo.read_text().splitlines()
    except OSError:
        return 0
    pages = 0
    for zone in zones:  # "Node 0, zone   Normal   26 12 ...": how many blocks of 1, 2, 4, ... pages
        for order, blocks in enumerate(zone.split()[4:]):
            pages += (int(blocks) << order) if order >= LARGE_PAGE_ORDER else 0
    return pages * mmap.PAGESIZE
