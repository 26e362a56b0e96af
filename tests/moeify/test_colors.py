from __future__ import annotations

from itertools import pairwise

import pytest

from moeify.colors import LEVELS, even_level, level, ramp


@pytest.mark.parametrize(("ratio", "step"), [(0, 0), (0.01, 0), (1 / 8, 0), (1, 12), (8, 23), (1000, 23)])
def test_the_fair_share_is_in_the_middle(ratio: float, step: int) -> None:
    assert level(ratio) == step
    assert level(ratio) <= level(ratio * 1.5)


def test_shares_are_even() -> None:
    assert [even_level(share) for share in (-1, 0, 0.5, 1, 2)] == [0, 0, 12, 23, 23]


@pytest.mark.parametrize(("dark", "sign"), [(False, -1), (True, 1)])
def test_colors_go_one_way_in_steps_that_differ(dark: bool, sign: int) -> None:
    """From the paper: light pages get darker, dark ones lighter; each step by about as much."""
    colors = ramp(dark=dark)
    assert len(set(colors)) == LEVELS and all(0 <= part <= 255 for color in colors for part in color)
    gray = [(0.299 * r + 0.587 * g + 0.114 * b) * sign for r, g, b in colors]
    steps = [after - before for before, after in pairwise(gray)]
    assert min(steps) > 0 and max(steps) < 3 * min(steps)
