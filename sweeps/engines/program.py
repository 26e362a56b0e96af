"""What every engine's program does: run checkpoints, and say how far their logits are from those beside them.

It imports numpy alone. A checkpoint that an engine refuses is an outcome, and the next one is run.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

MODEL, EXPECTED = "model", "expected.npy"  # the checkpoint, and the logits that it must give, in each folder
COUNT = 256
TOKENS = [3 + (7919 * place * place + 104_729 * place) % 49_000 for place in range(1, COUNT + 1)]
Array = Any


@dataclass(frozen=True)
class Told:
    """Logits that an engine gave, (positions, tokens); with ids it gave those of some tokens only."""

    values: Array
    ids: Array = None


def difference(told: Told, expected: Array) -> float | None:
    """Return the largest difference of a logit, relative to the largest logit; None if some are no numbers.

    Raises:
        ValueError: There are fewer positions or tokens than were asked for.
    """
    beside = expected if told.ids is None else np.take_along_axis(expected, told.ids, -1)
    if told.values.shape != beside.shape:
        raise ValueError(f"its logits have the shape {told.values.shape}, expected {beside.shape}")
    if not np.isfinite(told.values).all():
        return None
    return float(np.abs(told.values - beside).max() / np.abs(expected).max())


def compared(run: Callable[[Path], Told]) -> Callable[[Path], float | None]:
    """Return what runs the checkpoint in a folder, and returns the difference from the logits that lie beside it."""

    def measure(folder: Path) -> float | None:
        return difference(run(folder / MODEL), np.load(folder / EXPECTED, mmap_mode="r"))

    return measure


def outcome(measure: Callable[[Path], float | None], folder: Path) -> dict[str, object]:
    """Return what came of a folder."""
    try:
        return {"folder": str(folder), "difference": measure(folder)}
    except Exception as error:  # whatever stops an engine is the outcome
        return {"folder": str(folder), "error": said(error).replace(f"{folder}/", "")}


def said(error: Exception) -> str:
    """Return an error in one line, with the line of the package that raised it."""
    words = f"{type(error).__name__}: {' '.join(str(error).split())}"[:400]
    first: BaseException = error
    while first.__cause__ is not None:
        first = first.__cause__
    frame = traceback.extract_tb(first.__traceback__)[-1]
    _, installed, file = frame.filename.rpartition("site-packages/")
    return f"{words} ({file}:{frame.lineno})" if installed else words


def main(measure: Callable[[Path], float | None], version: str) -> None:
    """Measure every folder that is named, a line of JSON each."""
    for folder in sys.argv[1:]:
        print("\n" + json.dumps({"version": version, **outcome(measure, Path(folder))}), flush=True)
