"""The tile of a launch: one measured on this GPU where the environment variable MOEIFY_TILES names a file of them.

An environment variable, because nothing else gets here: the schema of an operator has no room for a table, and a
context variable does not reach the threads in which autograd runs the backward pass. The file is written by
`moeify doctor --tune FILE` and read once.
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

from moeify.kernels import tiles
from moeify.kernels.tiles import Tile
from moeify.kernels.triton_target import architecture

Table = Mapping[tuple[str, int, int], Tile]  # by kernel, height of a tile of rows, bytes of an element
KERNELS = {"up", "rows", "down_backward", "weights"}
_VARIABLE = "MOEIFY_TILES"
_trial: ContextVar[Tile | None] = ContextVar("trial", default=None)


def pick(kernel: str, m: int, n: int, k: int, itemsize: int) -> Tile:
    """Return the tile of one launch: that on trial, else the measured one, else that of `moeify.kernels.tiles`.

    Raises:
        ValueError: MOEIFY_TILES names a file that is not for this GPU and Triton, or a tile that cannot be used.
    """
    tile = _trial.get() or _measured(kernel, m, itemsize)
    return tiles.choose(kernel, architecture(), m, n, k, itemsize) if tile is None else tiles.fit(tile, n, k)


@contextmanager
def on_trial(tile: Tile) -> Iterator[None]:
    """Let every launch of this thread use one tile; for a caller that launches one kernel."""
    token = _trial.set(tile)
    try:
        yield
    finally:
        _trial.reset(token)


def text_of(table: Table) -> str:
    """The contents of a file of tiles measured here."""
    rows = [{"kernel": kernel, "itemsize": size, **asdict(tile)} for (kernel, _, size), tile in sorted(table.items())]
    about = {"architecture": architecture(), "triton": triton.__version__}
    return json.dumps({**about, "tiles": rows}, indent=1) + "\n"


@cache
def _measured(kernel: str, m: int, itemsize: int) -> Tile | None:
    """The tile in the file, compiled once to see that it may be used."""
    path = os.environ.get(_VARIABLE)
    tile = _read(path).get((kernel, m, itemsize)) if path else None
    if tile is not None:
        from moeify.kernels.static_report import tile_faults  # compiles: for those alone who have a file

        faults = tile_faults(kernel, architecture(), tile, itemsize)
        if faults:
            raise _refusal(str(path), f"holds a tile that cannot be used ({faults[0]})")
    return tile


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
    return table


def _tile(kernel: str, itemsize: int, **sides: int) -> Tile:
    """A tile of which every number is one that a compiler can take."""
    tile = Tile(**sides)
    heights = (128,) if kernel == "weights" else tiles.HEIGHTS
    powers = all(type(side) is int and side in (16, 32, 64, 128) for side in (tile.n, tile.k))
    schedule = tile.warps in (2, 4, 8) and tile.stages in range(1, 9) and tile.group_m in range(1, 65)
    if kernel not in KERNELS or itemsize not in (2, 4) or tile.m not in heights or not powers or not schedule:
        raise ValueError(f"no kernel {kernel!r} takes {tile} with {itemsize} bytes")
    return tile


def _refusal(path: str, what: str) -> ValueError:
    return ValueError(f"{_VARIABLE}={path} {what}: run `moeify doctor --tune` on this GPU, or unset {_VARIABLE}")
