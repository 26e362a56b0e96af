from __future__ import annotations

import time
from itertools import count

from benchmarks.by_turns import cpu_milliseconds, samples


def test_the_first_round_does_not_count() -> None:
    values = iter([100.0, 1.0, 2.0, 3.0])
    assert samples({"a": lambda: next(values)}, rounds=3) == {"a": [1.0, 2.0, 3.0]}
    assert next(values, None) is None


def test_calls_take_turns_in_changing_order() -> None:
    order: list[str] = []

    def measure(name: str) -> float:
        order.append(name)
        return 0.0

    samples({name: (lambda name=name: measure(name)) for name in "abcd"}, rounds=30)  # type: ignore[misc]
    rounds = [order[start : start + 4] for start in range(0, len(order), 4)]
    assert all(set(one) == set("abcd") for one in rounds) and len({tuple(one) for one in rounds}) > 5


def test_rounds_go_on_until_the_time_is_over() -> None:
    start, calls = time.monotonic(), count()
    samples({"a": lambda: float(next(calls))}, rounds=1, seconds=0.05)
    assert time.monotonic() - start >= 0.05 and next(calls) > 2


def test_sleeping_costs_no_cpu_time() -> None:
    assert cpu_milliseconds(lambda: time.sleep(0.05)) < 25
    assert cpu_milliseconds(lambda: sum(range(300_000))) > 0.1
