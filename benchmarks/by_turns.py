"""Calls of this process that are timed by turns, so that a slow moment of the machine hits all of them alike."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from statistics import median


def cpu_milliseconds(call: Callable[[], object]) -> float:
    """Return the CPU time that a call takes in this thread: a busy machine disturbs it less than wall time."""
    start = time.thread_time()
    call()
    return (time.thread_time() - start) * 1e3


def medians(timed: Mapping[str, Callable[[], float]], rounds: int, seconds: float = 0.0) -> dict[str, float]:
    """Return the median of what each call measured.

    A round takes the calls in a random order, because the first finds the caches cold. The first round does not count.

    Args:
        timed: Calls that measure something and return it, by name.
        rounds: At least so many count.
        seconds: Further rounds are taken until so much time has passed.
    """
    samples: dict[str, list[float]] = {name: [] for name in timed}
    deadline, taken = time.monotonic() + seconds, 0
    while taken <= rounds or time.monotonic() < deadline:
        for name, measure in random.sample([*timed.items()], len(timed)):
            samples[name].append(measure())
        taken += 1
    return {name: median(values[1:]) for name, values in samples.items()}
