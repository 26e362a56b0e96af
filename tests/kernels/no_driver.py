"""Launches of Triton kernels, seen and compiled and not made, on an sm_90 that is not there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from typing import Any

import pytest

from benchmarks.gpu.no_driver import compile_only


@contextmanager
def no_driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, int, Any]]]:
    """What is launched meanwhile: kernel, programs, compiled code."""
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # else Triton 3.9 warns that its default will change
    seen: list[tuple[str, int, Any]] = []
    with compile_only(launched=lambda name, grid, compiled: seen.append((name, prod(grid), compiled))):
        yield seen
