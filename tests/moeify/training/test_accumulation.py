"""The same rows in batches, micro-batches and ranks move the routers equally, in a script that knows no experts."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moeify.measure import TOLERANCE
from tests.moeify import tiny
from tests.moeify.training.accumulate import converted, native, router_updates

ROOT = Path(__file__).resolve().parents[3]


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, update in expected.items():
        assert update.abs().max() > 1e-6
        assert tiny.relative(found[name], update) <= 100 * TOLERANCE["float32"], name


@pytest.mark.parametrize(("make", "callback"), [(converted, False), (converted, True), (native, True)])
def test_micro_batches_and_a_short_last_accumulation(make: Callable[[], Any], callback: bool, tmp_path: Path) -> None:
    whole = router_updates(20, 16, 1, str(tmp_path), make=make, callback=make is native)
    for batch, steps in ((8, 2), (4, 4)):  # the second step has fewer
        assert_equal(router_updates(20, batch, steps, str(tmp_path), callback=callback, make=make), whole)


def test_the_callback_balances_native_models(tmp_path: Path) -> None:
    plain, balanced = (router_updates(16, 16, 1, str(tmp_path), callback=c, make=native) for c in (False, True))
    assert any(not torch.equal(balanced[name], update) for name, update in plain.items())


def test_two_ranks(tmp_path: Path) -> None:
    expected = router_updates(16, 16, 1, str(tmp_path))
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(20000 + os.getpid() % 20000), "WORLD_SIZE": "2"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.moeify.training.accumulate", str(tmp_path)],
            env={**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank), "ACCELERATE_USE_CPU": "true"},
            cwd=ROOT,
        )
        for rank in range(2)
    ]
    assert [rank.wait(timeout=300) for rank in ranks] == [0, 0]
    for rank in range(2):
        assert_equal(torch.load(tmp_path / f"{rank}.pt"), expected)
