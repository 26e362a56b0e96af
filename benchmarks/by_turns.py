"""Calls of this process that are timed by turns, so that a slow moment of the machine hits all of them alike."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping


def cpu_milliseconds(call: Callable[[], object]) -> float:
    """Return the CPU time that a call takes in this thread: a busy machine disturbs it less than wall time."""
    start = time.thread_time()
    call()
    return (time.thread_time() - start) * 1e3


def samples(timed: Mapping[str, Callable[[], float]], rounds: int, seconds: float = 0.0) -> dict[str, list[float]]:
    """Return what each call measured in each round.

    A round takes the calls in a random order, because the first finds the caches cold. The first round does not count.

    Args:
        timed: Calls that measure something and return it, by name.
        rounds: At least so many count.
        seconds: Further rounds are taken until so much time has passed.
    """
    found: dict[str, list[float]] = {name: [] for name in timed}
    deadline, taken = time.monotonic() + seconds, 0
    while taken <= rounds or time.monotonic() < deadline:
        for name, measure in random.sample([*timed.items()], len(timed)):
            found[name].append(measure())
        taken += 1
    return {name: values[1:] for name, values in found.items()}
