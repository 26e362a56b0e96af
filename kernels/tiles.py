"""Which tile each kernel uses: data, chosen from what the static report allows (docs/kernels.md).

Shape legend for a tile: m rows, n columns of the output, k the dimension that is summed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Tile:
    """The shape of a tile and how the compiler schedules it."""

    m: int
    n: int
    k: int
    warps: int
    stages: int
    group_m: int = 8


SAFE = {m: Tile(m, 64, 32, 4, 2) for m in (16, 32, 64, 128)}


def row_tile(pairs: int, experts: int) -> int:
    """Height of a tile of rows: the power of two from 16 to 128 that holds an expert's average share."""
    share = pairs // experts
    return next((m for m in (16, 32, 64) if m >= share), 128)


def choose(kernel: str, architecture: str, m: int, n: int, k: int, itemsize: int) -> Tile:
    """Return the tile of `kernel` for tiles of `m` rows, no wider than the matrix needs."""
    tile = SAFE[m]
    return replace(tile, n=min(tile.n, _at_least_16(n)), k=min(tile.k, _at_least_16(k)))


def _at_least_16(width: int) -> int:
    return max(16, 1 << (width - 1).bit_length())
