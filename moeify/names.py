"""Names and numbers for people: those of repeated layers are one, and large numbers are short."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import pairwise

_NUMBER = re.compile(r"(?<![^.])(\d+)(?![^.])")  # a whole step of a path


def fold(names: Iterable[str]) -> list[str]:
    """Return names, with one for all that differ in a number: `model.layers.{0..29}.mlp`.

    Each of the names, and nothing else, is in what is returned. Steps are written as a shell writes them: `{0..8..2}`.

    Args:
        names: Paths whose steps are separated by dots.
    """
    rows = list(dict.fromkeys(tuple(_NUMBER.split(name)) for name in names))
    for place in range(max((len(row) for row in rows), default=0) - 2, 0, -2):
        alike: dict[tuple[tuple[str, ...], tuple[str, ...] | None], list[str]] = {}
        for row in rows:
            has = place < len(row)
            key = (row[:place], row[place + 1 :]) if has else (row, None)
            alike.setdefault(key, []).append(row[place] if has else "")
        rows = [before if after is None else (*before, _span(numbers), *after)
                for (before, after), numbers in alike.items()]  # fmt: skip
    return ["".join(row) for row in rows]


def folded(names: Iterable[str]) -> str:
    """Return names as one line."""
    return ", ".join(fold(names))


def short_names(paths: Sequence[str]) -> list[str]:
    """Return short names of layers: their numbers, with the stack before it where numbers alone do not tell them apart.

    Args:
        paths: Of the layers; those without a number keep their paths.
    """
    found = [_NUMBER.search(path) for path in paths]
    numbers = [number[1] if number else "" for number in found]
    stacks = [f"{path.partition('.')[0]} {number}" for path, number in zip(paths, numbers, strict=True)]
    for names in (numbers, stacks):
        if "" not in numbers and len(set(names)) == len(names):
            return names
    return [path or "the model itself" for path in paths]


def _span(numbers: Sequence[str]) -> str:
    if len(numbers) == 1:
        return numbers[0]
    values = sorted(map(int, numbers))
    steps = {after - before for before, after in pairwise(values)}
    if steps == {1}:
        return f"{{{values[0]}..{values[-1]}}}"
    if len(steps) == 1 and len(values) > 2:
        return f"{{{values[0]}..{values[-1]}..{steps.pop()}}}"
    runs: list[list[int]] = []
    for value in values:
        if runs and value == runs[-1][-1] + 1:
            runs[-1].append(value)
        else:
            runs.append([value])
    return "{" + ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}..{run[-1]}" for run in runs) + "}"


def left_out(names: Sequence[str]) -> str:
    """Return a note on stored tensors that the dense model has no place for."""
    which = f"{folded(names)}; it is" if len(names) == 1 else f"{len(names)} tensors ({folded(names)}); they are"
    return f"note: the dense model has no place for {which} left out"


def quantity(number: float, unit: str = "") -> str:
    """Return 134,515,008 as 134.5M; with a unit, 538060032 as 538.1 MB."""
    for limit, letter in ((1e12, "T"), (1e9, "G" if unit else "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= limit:
            return f"{number / limit:.1f}{' ' * bool(unit)}{letter}{unit}"
    return f"{number:.0f}{' ' * bool(unit)}{unit}"
