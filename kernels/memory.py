"""Large outputs on CPU, in pages that cost little."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from contextlib import suppress
from math import prod

import torch
from torch import Tensor

# Above this size glibc maps fresh pages for every allocation (DEFAULT_MMAP_THRESHOLD_MAX); below, it reuses them.
ALWAYS_MAPPED = 32 << 20
MAPPED_IF_MOSTLY_UNUSED = 4 << 20


def room(shape: Sequence[int], dtype: torch.dtype, device: torch.device, unused: Sequence[slice]) -> Tensor:
    """Return a tensor to be written everywhere but in the `unused` ranges of its first dimension, which are zero.

    Fresh memory on CPU comes in large pages where the system offers them: one page fault per 2 MiB instead of one per
    4 KiB, which costs several times as much as the write itself. Ranges that nobody touches cost nothing.
    """
    size = prod(shape) * dtype.itemsize
    mostly_unused = 2 * sum(rows.stop - rows.start for rows in unused) > shape[0]
    mapped = size > (MAPPED_IF_MOSTLY_UNUSED if mostly_unused else ALWAYS_MAPPED)
    if mapped and device.type == "cpu" and hasattr(mmap, "MADV_HUGEPAGE"):
        pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with suppress(OSError):  # a kernel built without large pages
            pages.madvise(mmap.MADV_HUGEPAGE)
        return torch.frombuffer(pages, dtype=dtype).view(shape)
    out = torch.empty(shape, dtype=dtype, device=device)
    for rows in unused:
        if rows.stop > rows.start:
            out[rows] = 0
    return out
