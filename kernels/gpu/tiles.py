"""The table of tiles: one for each kernel, architecture and height of a tile of rows.

Each tile spills no registers, fits shared memory and leaves room for a CTA; the static report checks it
(`docs/kernels.md`). Among such tiles the order of preference is: tensor-core instructions of full width, then CTAs per
SM, then stages. Nothing was timed.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field, replace
from functools import cache


@dataclass(frozen=True)
class Tile:
    """The shape of a tile (rows m, columns n, summed k) and how the compiler schedules it.

    With `tma`, weights and dense rows are read by tensor descriptor where their strides allow it. With `persistent`
    too, as many programs as there are multiprocessors take the tiles of "rows" by turns; no table has it.
    """

    m: int
    n: int
    k: int
    warps: int
    stages: int
    group_m: int = 8
    tma: bool = field(default=False, kw_only=True)
    persistent: bool = field(default=False, kw_only=True)


Table = dict[str, dict[int, Tile]]  # by kernel, then by height; "weights" has one height, as it has no rows to fit


def _tiles(*rows: str) -> dict[int, Tile]:
    """Read tiles written as rows x columns x summed, warps, stages, and "tma" where it is to be used."""
    written = ((row.removesuffix(" tma").replace("x", " ").split(), row.endswith(" tma")) for row in rows)
    found = (Tile(*map(int, numbers), tma=tma) for numbers, tma in written)
    return {tile.m: tile for tile in found}


_AMPERE: Table = {
    "up": _tiles("16x64x64 4 4", "32x64x64 4 4", "64x64x64 4 3", "128x64x64 8 3"),
    "rows": _tiles("16x64x128 4 3", "32x128x64 4 3", "64x128x64 4 3", "128x128x64 8 3"),
    "down_backward": _tiles("16x64x64 4 4", "32x64x64 4 4", "64x64x64 4 3", "128x64x64 8 3"),
    "weights": _tiles("128x128x32 8 5"),
}
_SMALL_SHARED: Table = {  # 99 KB a block: sm_86, sm_89, sm_120
    "up": _tiles("16x64x64 4 4", "32x64x64 4 3", "64x64x64 4 3", "128x64x32 8 3"),
    "rows": _tiles("16x64x128 4 3", "32x128x64 4 3", "64x128x32 4 3", "128x128x32 8 3"),
    "down_backward": _tiles("16x64x64 4 4", "32x64x64 4 3", "64x64x64 4 3", "128x64x32 8 3"),
    "weights": _tiles("128x128x32 8 4"),
}
_HOPPER: Table = {
    "up": _tiles("16x64x64 4 4", "32x64x64 4 4", "64x64x64 4 3", "128x128x64 8 3"),
    "rows": _tiles("16x64x128 4 3", "32x128x64 4 3", "64x128x64 4 4", "128x256x64 8 4 tma"),
    "short_rows": _tiles("128x128x64 8 3 tma"),  # two blocks on each SM: one multiplies while the other stores
    "down_backward": _tiles("16x64x64 4 4", "32x64x64 4 4", "64x64x64 4 3", "128x128x64 8 4"),
    "weights": _tiles("128x256x64 8 4 tma"),
}
_CDNA3: Table = {  # 64 KB of LDS; the compiler pipelines loads through registers
    **dict.fromkeys(
        ("up", "rows", "down_backward"), _tiles("16x64x64 4 2", "32x64x64 4 2", "64x64x64 4 2", "128x64x32 8 2")
    ),
    "weights": _tiles("128x64x32 8 2"),
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
TALL = 192  # rows of an expert from which the tallest tiles, which multiply twice as fast, are worth their empty part
SHORT = 1024  # summed elements of "rows" up to which "short_rows" has tiles of its own
UNKNOWN = _SMALL_SHARED  # for an architecture that the table does not have: these fit everywhere


def row_tile(choices: int, experts: int) -> int:
    """Return the height of a tile of rows, by how many rows an expert has on average.

    The last tile of an expert is on average half empty, so tall tiles are for experts that fill several of them; 16 and
    32 are for decoding, where reading the weights takes the time.
    """
    share = choices // experts
    return 16 if share <= 16 else 32 if share <= 32 else 64 if share < TALL else 128


def entry(kernel: str, k: int) -> str:
    """Return the name in a table of tiles of `kernel` where `k` elements are summed."""
    return "short_rows" if kernel == "rows" and k <= SHORT else kernel


@cache
def choose(kernel: str, architecture: str, m: int, n: int, k: int, itemsize: int) -> Tile:
    """Return the tile of `kernel` for tiles of `m` rows, no wider than the matrix and no deeper than its type allows.

    The table is for types of two bytes. Four bytes halve the depth, for shared memory, and the widest tiles and those
    of the kernels that hold a gate beside the rest, for registers, of which products without tensor cores need more.
    The others' tiles of 32 rows, the widest of the weights, and those of a gate with 64 rows or more spill unless they
    are shallower still (Triton 3.6 or 3.9).
    """
    table = _table(architecture)
    tile = table.get(entry(kernel, k), {}).get(m) or table[kernel][m]
    if itemsize > 2:
        gate = kernel in {"up", "down_backward"}
        depth = 4 if (m == 32 and not gate) or (kernel == "weights" and tile.n > 128) else 2
        tile = replace(
            tile, n=min(tile.n // 2, 32) if gate else min(tile.n, 128), k=tile.k // depth, tma=False, persistent=False
        )
        if gate and m >= 64:
            tile = replace(tile, k=min(tile.k, 16), warps=8)
    return fit(tile, n, k)


def fit(tile: Tile, n: int, k: int) -> Tile:
    """Return the tile no wider than a matrix of `n` columns and no deeper than `k` summed elements."""
    return replace(tile, n=min(tile.n, _power_of_two(n)), k=min(tile.k, _power_of_two(k)))


def least_shared(kernel: str, tile: Tile, itemsize: int) -> int:
    """Return a lower bound of the bytes of shared memory that `kernel` needs, whatever the compiler does.

    The compiler keeps at least one buffer less than there are stages.
    """
    columns = 2 * tile.n if kernel == "up" else tile.n
    return (tile.m + columns) * tile.k * itemsize * max(tile.stages - 1, 1)


def block_tile(block: int, columns: int, itemsize: int, halved: bool = False) -> Tile:
    """Return the tile of a block-sparse product whose result has blocks of `block` rows: the same everywhere.

    With `halved` a result of four bytes has half the columns where there are fewer than rows, for registers.
    """
    if halved and itemsize > 2 and block > columns:
        columns //= 2
    return Tile(block, columns, min(block, 32 if itemsize <= 2 else 16), 8 if columns > 64 else 4, 3)


def quantized_tile(m: int, itemsize: int) -> Tile:
    """Return the tile of a product with quantized weights, for rows of `itemsize` bytes: the same everywhere."""
    return Tile(m, 64, 128 // itemsize, 8 if m in {32, 128} else 4, 3)


@cache
def _table(architecture: str) -> Table:
    """Return the tiles of an architecture; cached, so that a process warns once of an unknown one."""
    if architecture not in TILES and architecture != "interpreter":
        warnings.warn(f"no tiles were chosen for {architecture}: using small ones that fit everywhere", stacklevel=3)
    return TILES.get(architecture, UNKNOWN)


def _power_of_two(width: int) -> int:
    return max(16, 1 << (width - 1).bit_length())
