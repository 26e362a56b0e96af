from __future__ import annotations

import pytest

from moeify.numbers import quantity


@pytest.mark.parametrize(
    ("number", "unit", "text"),
    [(0, "", "0"), (999, "B", "999 B"), (134_515_008, "", "134.5M"), (692e9, "", "692.0B"), (2.77e9, "B", "2.8 GB")],
)
def test_quantities_are_short(number: float, unit: str, text: str) -> None:
    assert quantity(number, unit) == text
