"""Memory that large gradients use again, so that the system does not have to find and zero pages in every step.

A gradient is freed before each backward pass and made anew in it. malloc gives large blocks back to the system, and
fresh pages are zeroed one by one when they are first written: a tenth of a training step. Huge pages are so few that it
costs nothing to offer them to the system in between.
"""

from __future__ import annotations

import ctypes
import mmap
import weakref
from collections.abc import Sequence
from contextlib import suppress
from math import prod

import torch
from torch import Tensor

AVAILABLE = hasattr(mmap, "MAP_ANONYMOUS")  # not on Windows


def fresh_pages(size: int) -> mmap.mmap:
    """Return pages of the system: they are zero, and cost nothing until they are written."""
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


class Pages:
    """Blocks of pages by size. What is not in use the system may take back, and a size that is new ends the others."""

    def __init__(self) -> None:
        self._free: dict[int, list[mmap.mmap]] = {}

    def tensor(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return a CPU tensor of any values; its pages come back when its memory is freed."""
        size = prod(shape) * dtype.itemsize
        try:
            pages = self._free[size].pop()
        except (KeyError, IndexError):
            self._free.clear()
            pages = fresh_pages(size)
            if hasattr(mmap, "MADV_HUGEPAGE"):
                with suppress(OSError):  # of a kernel that has none
                    pages.madvise(mmap.MADV_HUGEPAGE)
        lent = (ctypes.c_char * size).from_buffer(pages)  # the tensor holds it, and a weak reference can watch it
        weakref.finalize(lent, self._take_back, size, pages).atexit = False
        return torch.frombuffer(lent, dtype=dtype).view(*shape)

    def _take_back(self, size: int, pages: mmap.mmap) -> None:
        if hasattr(mmap, "MADV_FREE"):
            pages.madvise(mmap.MADV_FREE)
        self._free.setdefault(size, []).append(pages)
