"""Tiles on trial: each is launched, held against the first, and timed, until the time is up."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import cast

from torch import Tensor

from moeify.kernels.gpu import tuned_tiles
from moeify.kernels.gpu.tiles import Tile

Launch = Callable[[], object]


@dataclass(frozen=True)
class Trial:
    """What became of one tile: its milliseconds, or why it has none."""

    tile: Tile
    milliseconds: float | None
    fault: str = ""


def try_tiles(
    launch: Launch,
    tried: Iterable[Tile],
    timer: Callable[[Launch], float],
    until: float = float("inf"),
    wrong: Callable[[Tensor, Tensor], str] | None = None,
) -> Iterator[Trial]:
    """Time the launches of a kernel with one tile after the other.

    Args:
        launch: Returns what the kernel wrote.
        tried: The first is the one that the others are held against; tiles are asked for one by one.
        timer: Returns the milliseconds of a launch.
        until: When to stop, by `time.time()`.
        wrong: Says what is wrong with a result beside that of the first tile, "" if nothing is; None checks nothing.

    Yields:
        Every tile that was tried: one that does not fit, does not compile or is wrong has no time.
    """
    want: tuple[Tensor, ...] | None = None
    for tile in tried:
        if time.time() > until:
            return
        try:
            with tuned_tiles.on_trial(tile):
                if wrong is not None:
                    got = _results(launch())
                    want = got if want is None else want
                    fault = next(filter(None, map(wrong, got, want)), "")
                    if fault:
                        yield Trial(tile, None, fault)
                        continue
                yield Trial(tile, timer(launch))
        except Exception as error:  # whatever a compiler or a driver says of this tile
            yield Trial(tile, None, f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}")


def _results(launched: object) -> tuple[Tensor, ...]:
    """Return what a launch wrote: one tensor, or several."""
    return launched if isinstance(launched, tuple) else (cast(Tensor, launched),)
