"""The tile of a launch: from the file that MOEIFY_TILES names, if it is set, else from `moeify.kernels.gpu.tiles`.

It is an environment variable because the schema of an operator has no room for a table, and a context variable does not
reach the threads in which autograd runs the backward pass. `moeify doctor --tune FILE` writes the file.
"""

# mypy: disable-error-code="import-untyped"

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict
from functools import cache
from pathlib import Path

import triton

from moeify.kernels.gpu import tiles
from moeify.kernels.gpu.target import SHARED_MEMORY, architecture
from moeify.kernels.gpu.tiles import Tile

Table = Mapping[tuple[str, int, int], Tile]  # by kernel, height of a tile of rows, bytes of an element
KERNELS = {"up", "rows", "short_rows", "down_backward", "weights"}
_VARIABLE = "MOEIFY_TILES"
_trial: ContextVar[Tile | None] = ContextVar("trial", default=None)


def pick(kernel: str, m: int, n: int, k: int, itemsize: int) -> Tile:
    """Return the tile of one launch: the one on trial, else the measured one, else that of `moeify.kernels.gpu.tiles`.

    Raises:
        ValueError: MOEIFY_TILES names a file that is not for this GPU and Triton, or that holds an unusable tile.
    """
    file = os.environ.get(_VARIABLE)
    tile = _trial.get() or (_read(file).get((tiles.entry(kernel, k), m, itemsize)) if file else None)
    return tiles.choose(kernel, architecture(), m, n, k, itemsize) if tile is None else tiles.fit(tile, n, k)


@contextmanager
def on_trial(tile: Tile) -> Iterator[None]:
    """Let every launch of this thread use one tile; for tuning, which launches one kernel at a time."""
    token = _trial.set(tile)
    try:
        yield
    finally:
        _trial.reset(token)


def text_of(table: Table) -> str:
    """Return the contents of a file of tiles measured on this GPU."""
    rows = [{"kernel": kernel, "itemsize": size, **asdict(tile)} for (kernel, _, size), tile in sorted(table.items())]
    about = {"architecture": architecture(), "triton": triton.__version__}
    return json.dumps({**about, "tiles": rows}, indent=1) + "\n"


@cache
def _read(path: str) -> Table:
    here = {"architecture": architecture(), "triton": triton.__version__}
    try:
        content = json.loads(Path(path).read_text())
        about = {name: content[name] for name in here}
        table = {}
        for row in content["tiles"]:
            kernel, itemsize = row.pop("kernel"), row.pop("itemsize")
            table[kernel, row["m"], itemsize] = _tile(kernel, itemsize, **row)
    except OSError as error:
        raise _refusal(path, f"cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _refusal(path, f"is not a file of tiles ({type(error).__name__}: {error})") from error
    if about != here:
        measured, now = (f"{a['architecture']} with Triton {a['triton']}" for a in (about, here))
        raise _refusal(path, f"was measured on {measured}, this is {now}")
    room = SHARED_MEMORY.get(architecture())
    for (kernel, _, itemsize), tile in table.items():
        needed = tiles.least_shared(kernel, tile, itemsize)
        if room is not None and needed > room:
            raise _refusal(path, f"holds a tile that cannot be used ({tile} needs {needed} bytes of shared memory)")
    return table


def _tile(kernel: str, itemsize: int, tma: bool = False, persistent: bool = False, **sides: int) -> Tile:
    """Return a tile; ValueError if the compiler cannot take one of its numbers."""
    tile = Tile(**sides, tma=tma, persistent=persistent)
    heights = (128,) if kernel == "weights" else tiles.HEIGHTS
    powers = all(type(side) is int and side in (16, 32, 64, 128, 256) for side in (tile.n, tile.k))
    flags = type(tma) is bool and (persistent is False or (persistent is True and tma and kernel.endswith("rows")))
    schedule = tile.warps in (2, 4, 8) and tile.stages in range(1, 9) and tile.group_m in range(1, 65) and flags
    if kernel not in KERNELS or itemsize not in (2, 4) or tile.m not in heights or not powers or not schedule:
        raise ValueError(f"no kernel {kernel!r} takes {tile} with {itemsize} bytes")
    return tile


def _refusal(path: str, what: str) -> ValueError:
    return ValueError(f"{_VARIABLE}={path} {what}: run `moeify doctor --tune` on this GPU, or unset {_VARIABLE}")
