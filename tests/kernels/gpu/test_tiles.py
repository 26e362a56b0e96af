from __future__ import annotations

import pytest

from moeify.kernels.gpu.tiles import TILES, choose, row_tile


@pytest.mark.parametrize(
    ("share", "height"), [(0, 16), (16, 16), (17, 32), (40, 64), (191, 64), (192, 128), (9000, 128)]
)
def test_height_follows_an_experts_share(share: int, height: int) -> None:
    assert row_tile(share * 8, 8) == height


@pytest.mark.parametrize("architecture", [*TILES, "interpreter"])
def test_every_architecture_has_every_tile(architecture: str) -> None:
    for kernel, heights in {
        "up": (16, 32, 64, 128),
        "rows": (16, 128),
        "down_backward": (64,),
        "weights": (128,),
    }.items():
        for m in heights:
            tile = choose(kernel, architecture, m, 768, 2048, 2)
            assert tile.m == m and tile.n * tile.k * tile.warps * tile.stages > 0
            narrow = choose(kernel, architecture, m, 20, 5, 4)
            assert (narrow.n, narrow.k) == (32, 16)
            depth = 4 if tile.n == 256 and kernel == "weights" else 2
            deepest = 16 if kernel in {"up", "down_backward"} and m >= 64 else 64
            assert choose(kernel, architecture, m, 768, 2048, 4).k == min(tile.k // depth, deepest)


def test_an_unknown_architecture_gets_tiles_that_fit_everywhere_and_one_warning() -> None:
    with pytest.warns(UserWarning, match="no tiles were chosen for sm_75") as warned:
        for _ in range(3):
            assert choose("up", "sm_75", 64, 768, 2048, 2) == choose("up", "sm_86", 64, 768, 2048, 2)
    assert len(warned) == 1
