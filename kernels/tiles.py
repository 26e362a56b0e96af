"""Which tile each kernel uses: data, from what the static report allows (`docs/kernels.md`).

In the table a tile spills no registers, fits shared memory and leaves room for a CTA; the report checks it. Among those
the order of preference is: tensor-core instructions of full width, then CTAs per SM, then stages. Nothing was timed.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from functools import cache


@dataclass(frozen=True)
class Tile:
    """The shape of a tile (rows m, columns n, summed k) and how the compiler schedules it."""

    m: int
    n: int
    k: int
    warps: int
    stages: int
    group_m: int = 8


Table = dict[str, dict[int, Tile]]

# By kernel, then by the height of a tile of rows; "weights" has no rows to fit.
_AMPERE: Table = {
    "up": {
        16: Tile(16, 64, 64, 4, 4),
        32: Tile(32, 64, 64, 4, 4),
        64: Tile(64, 64, 64, 4, 3),
        128: Tile(128, 64, 64, 8, 3),
    },
    "rows": {
        16: Tile(16, 64, 128, 4, 3),
        32: Tile(32, 128, 64, 4, 3),
        64: Tile(64, 128, 64, 4, 3),
        128: Tile(128, 128, 64, 8, 3),
    },
    "down_backward": {
        16: Tile(16, 64, 64, 4, 4),
        32: Tile(32, 64, 64, 4, 4),
        64: Tile(64, 64, 64, 4, 3),
        128: Tile(128, 64, 64, 8, 3),
    },
    "weights": {128: Tile(128, 128, 32, 8, 5)},
}
_SMALL_SHARED: Table = {  # 99 KB a block: sm_86, sm_89, sm_120
    "up": {
        16: Tile(16, 64, 64, 4, 4),
        32: Tile(32, 64, 64, 4, 3),
        64: Tile(64, 64, 64, 4, 2),
        128: Tile(128, 64, 32, 8, 3),
    },
    "rows": {
        16: Tile(16, 64, 128, 4, 3),
        32: Tile(32, 128, 64, 4, 3),
        64: Tile(64, 128, 32, 4, 3),
        128: Tile(128, 128, 32, 8, 3),
    },
    "down_backward": {
        16: Tile(16, 64, 64, 4, 4),
        32: Tile(32, 64, 64, 4, 3),
        64: Tile(64, 64, 64, 4, 2),
        128: Tile(128, 64, 32, 8, 3),
    },
    "weights": {128: Tile(128, 128, 32, 8, 4)},
}
_HOPPER: Table = {
    "up": {
        16: Tile(16, 64, 64, 4, 4),
        32: Tile(32, 64, 64, 4, 4),
        64: Tile(64, 64, 64, 4, 3),
        128: Tile(128, 128, 64, 8, 3),
    },
    "rows": {
        16: Tile(16, 64, 128, 4, 3),
        32: Tile(32, 128, 64, 4, 3),
        64: Tile(64, 128, 64, 4, 4),
        128: Tile(128, 128, 64, 8, 4),
    },
    "down_backward": {
        16: Tile(16, 64, 64, 4, 4),
        32: Tile(32, 64, 64, 4, 4),
        64: Tile(64, 64, 64, 4, 3),
        128: Tile(128, 64, 64, 8, 3),
    },
    "weights": {128: Tile(128, 128, 64, 8, 3)},
}
_CDNA3: Table = {  # 64 KB of LDS; the compiler pipelines loads through registers
    kernel: {m: Tile(m, 64, 64 if m < 128 else 32, 4 if m < 128 else 8, 2) for m in heights}
    for kernel, heights in {
        "up": (16, 32, 64, 128),
        "rows": (16, 32, 64, 128),
        "down_backward": (16, 32, 64, 128),
        "weights": (128,),
    }.items()
}
TILES: dict[str, Table] = {
    "sm_80": _AMPERE,
    "sm_86": _SMALL_SHARED,
    "sm_89": _SMALL_SHARED,
    "sm_90": _HOPPER,
    "sm_100": _HOPPER,
    "sm_120": _SMALL_SHARED,
    "gfx942": _CDNA3,
}
HEIGHTS = (16, 32, 64, 128)  # of a tile of rows
UNKNOWN = _SMALL_SHARED  # what an architecture that the table does not know gets: it fits everywhere


def row_tile(pairs: int, experts: int) -> int:
    """Height of a tile of rows, by an expert's average share of them.

    The last tile of an expert is on average half empty, so tall tiles are for experts with several of them; 16 and 32
    are for decoding, where reading the weights takes the time.
    """
    share = pairs // experts
    return 16 if share <= 16 else 32 if share <= 32 else 64 if share < 512 else 128


def choose(kernel: str, architecture: str, m: int, n: int, k: int, itemsize: int) -> Tile:
    """Return the tile of `kernel` for tiles of `m` rows, no wider than the matrix and no deeper than its type allows.

    The table is for types of two bytes. Four bytes halve the depth, for shared memory, and the width of the kernels
    that hold a gate beside the rest, for registers, of which products without tensor cores need more. The others' tiles
    of 32 rows spill unless they are shallower still.
    """
    tile = _table(architecture)[kernel][m]
    if itemsize > 2:
        if kernel in {"up", "down_backward"}:
            tile = replace(tile, n=tile.n // 2, k=tile.k // 2)
        else:
            tile = replace(tile, k=tile.k // (4 if m == 32 else 2))
    return fit(tile, n, k)


def fit(tile: Tile, n: int, k: int) -> Tile:
    """Return the tile no wider than a matrix of `n` columns and no deeper than `k` summed elements."""
    return replace(tile, n=min(tile.n, _power_of_two(n)), k=min(tile.k, _power_of_two(k)))


def block_tile(block: int, columns: int, itemsize: int) -> Tile:
    """Return the tile of a block-sparse product whose result has blocks of `block` rows: the same everywhere."""
    return Tile(block, columns, min(block, 32 if itemsize <= 2 else 16), 8 if columns > 64 else 4, 3)


@cache
def _table(architecture: str) -> Table:
    """Cached, so that a process hears once of an architecture that is not in the table."""
    if architecture not in TILES and architecture != "interpreter":
        warnings.warn(f"no tiles were chosen for {architecture}: using small ones that fit everywhere", stacklevel=3)
    return TILES.get(architecture, UNKNOWN)


def _power_of_two(width: int) -> int:
    return max(16, 1 << (width - 1).bit_length())
