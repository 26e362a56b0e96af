"""Numbers for people."""

from __future__ import annotations


def quantity(number: float, unit: str = "") -> str:
    """Return 134,515,008 as 134.5M; with a unit, 538060032 as 538.1 MB."""
    for limit, letter in ((1e12, "T"), (1e9, "G" if unit else "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= limit:
            return f"{number / limit:.1f}{' ' * bool(unit)}{letter}{unit}"
    return f"{number:.0f}{' ' * bool(unit)}{unit}"
