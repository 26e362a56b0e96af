"""The page of what other tools do with converted models, from its record."""

from __future__ import annotations

from sweeps.ecosystem.check import FAILS, WITH_A_LINE, WORKS, Row


def table(rows: list[Row]) -> str:
    return ""
