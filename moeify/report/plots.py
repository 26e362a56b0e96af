"""Plots as small SVG: heat maps of one path for each color, and lines. Words stay outside, in HTML, to be legible.

A plot carries the numbers that it shows, for the table behind it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from moeify.colors import even_level, level

_MANY = 40  # columns or rows: above it cells touch
_GAP = 0.0025  # of a cell, for each column
_TALL, _LOW = 14, 10  # pixels of a row, of few rows and of many


@dataclass(frozen=True)
class Heat:
    """A heat map.

    Attributes:
        title: What is shown, for those who do not see it.
        rows: Labels, and what a row is.
        columns: Likewise.
        cells: The numbers, as text.
        paths: The SVG inside.
        marks: Labels above the map, and how many columns each stands over.
        height: Pixels.
    """

    title: str
    rows: tuple[str, Sequence[str]]
    columns: tuple[str, Sequence[str]]
    cells: Sequence[Sequence[str]]
    paths: Markup
    marks: Sequence[tuple[str, int]]
    height: int


@dataclass(frozen=True)
class Line:
    """A curve.

    Attributes:
        title: What it shows.
        path: Of the SVG, 100 wide and 100 high.
        low: The smallest number, as text.
        high: The largest.
        last: The last.
        first_step: Of the first point.
        last_step: Of the last point.
    """

    title: str
    path: str
    low: str
    high: str
    last: str
    first_step: int
    last_step: int


def load_heat(title: str, rows: tuple[str, Sequence[str]], columns: tuple[str, Sequence[str]],
              values: Sequence[Sequence[float]]) -> Heat:  # fmt: skip
    """Return a map of loads in multiples of the fair share; a cross marks those that are 0."""
    return _heat(title, rows, columns, values, level, "{:.2f}".format, crosses=True)


def share_heat(title: str, rows: tuple[str, Sequence[str]], columns: tuple[str, Sequence[str]],
               values: Sequence[Sequence[float]], whole: float = 1.0) -> Heat:  # fmt: skip
    """Return a map of numbers between 0 and `whole`."""
    scale = whole or 1.0
    return _heat(title, rows, columns, values, lambda value: even_level(value / scale), "{:.3g}".format)


def _heat(
    title: str,
    rows: tuple[str, Sequence[str]],
    columns: tuple[str, Sequence[str]],
    values: Sequence[Sequence[float]],
    step: Callable[[float], int],
    text: Callable[[float], str],
    *,
    crosses: bool = False,
) -> Heat:
    wide, high = max(map(len, values), default=0), len(values)
    square = wide == high
    across = 1.0 if wide > _MANY else 0.94 if square else 1 - _GAP * wide
    down, half = 1.0 if high > _MANY else 0.94, min(0.3, 0.006 * wide)
    at: dict[int, list[str]] = {}
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            at.setdefault(step(value), []).append(f"M{x} {y}h{across:g}v{down:g}h-{across:g}z")
    paths = [f'<path class="q{key}" d="{"".join(cells)}"/>' for key, cells in sorted(at.items())]
    zeros = [(x, y) for y, row in enumerate(values) for x, value in enumerate(row) if crosses and value == 0]
    stroke = f"l{2 * half:g} .34m0-.34l-{2 * half:g} .34"
    empty = [f"M{x + 0.48 - half:.5g} {y + 0.3:.5g}{stroke}" for x, y in zeros]
    paths += [f'<path class="idle" d="{"".join(empty)}"/>'] if empty else []
    cells = [[text(value) for value in row] for row in values]
    every = next(n for n in (1, 2, 4, 8, 16, 32, 64, wide or 1) if wide / n <= 12 or n >= wide)
    marks = [(columns[1][place], min(every, wide - place)) for place in range(0, wide, every)]
    height = high * (_TALL if high <= _MANY else _LOW)
    return Heat(title, rows, columns, cells, Markup("".join(paths)), marks, height)


def line(title: str, steps: Sequence[int], values: Sequence[float | None]) -> Line | None:
    """Return a curve; None without two points."""
    points = [(s, v) for s, v in zip(steps, values, strict=True) if v is not None and math.isfinite(v)]
    if len(points) < 2:
        return None
    found = [value for _, value in points]
    low, high, (start, _), (end, last) = min(found), max(found), points[0], points[-1]
    wide, tall = (end - start) or 1, (high - low) or 1
    places = [f"{100 * (step - start) / wide:.4g} {100 - 100 * (value - low) / tall:.4g}" for step, value in points]
    return Line(title, f"M{'L'.join(places)}", f"{low:.3g}", f"{high:.3g}", f"{last:.4g}", start, end)
