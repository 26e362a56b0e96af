"""Large outputs on CPU of which most is never touched."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

MAPPED_IF_MOSTLY_UNUSED = 4 << 20


def room(shape: Sequence[int], dtype: torch.dtype, device: torch.device, unused: Sequence[slice]) -> Tensor:
    """Return a tensor to be written everywhere but in the `unused` ranges of its first dimension, which are zero.

    Where most of it is unused it comes as fresh pages of the system, which are zero and cost nothing until they are
    touched. They are not asked to be large ones: those are three times as cheap while memory is plenty, and five times
    as dear when the system must first move other pages out of the way.
    """
    size = prod(shape) * dtype.itemsize
    mostly_unused = 2 * sum(rows.stop - rows.start for rows in unused) > shape[0]
    if mostly_unused and size > MAPPED_IF_MOSTLY_UNUSED and device.type == "cpu" and hasattr(mmap, "MAP_ANONYMOUS"):
        pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        return torch.frombuffer(pages, dtype=dtype).view(shape)
    out = torch.empty(shape, dtype=dtype, device=device)
    for rows in unused:
        if rows.stop > rows.start:
            out[rows] = 0
    return out
