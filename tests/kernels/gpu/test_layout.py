from __future__ import annotations

import pytest
import torch

from moeify.kernels import layout
from moeify.kernels.gpu import layout as gpu_layout

SIZES = [(0, 2, 3), (1, 1, 1), (1, 8, 8), (5, 2, 16), (67, 3, 5), (19, 2, 130), (200, 1, 2)]  # tokens, top-k, experts


def routings(tokens: int, top_k: int, experts: int) -> list[torch.Tensor]:
    """At random, with ids outside; all to the first expert; all to none."""
    ids = torch.randint(-1, experts + 1, (tokens, top_k), generator=torch.Generator().manual_seed(tokens))
    return [ids, torch.zeros_like(ids), torch.full_like(ids, experts)]


@pytest.mark.parametrize(("tokens", "top_k", "experts"), SIZES)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_same_layout_as_the_reference(tokens: int, top_k: int, experts: int, dtype: torch.dtype) -> None:
    for ids in routings(tokens, top_k, experts):
        want, got = (module.routing_layout(ids.to(dtype), experts) for module in (layout, gpu_layout))
        assert torch.equal(got.order_S, want.order_S)
        assert torch.equal(got.inverse_S, want.inverse_S)
        assert torch.equal(got.offsets_E1, want.offsets_E1)


@pytest.mark.parametrize(("tokens", "top_k", "experts"), SIZES)
def test_one_launch_does_the_same_for_few_choices(tokens: int, top_k: int, experts: int) -> None:
    for ids in routings(tokens, top_k, experts):
        got, tiles = gpu_layout.route(ids, experts, 16)
        want = layout.routing_layout(ids, experts)
        cut = layout.tile_map(want.offsets_E1, tokens * top_k, 16)
        assert torch.equal(tiles.expert_L, cut.expert_L) and torch.equal(tiles.row_L, cut.row_L)
        for name in ("order_S", "inverse_S", "offsets_E1"):
            assert torch.equal(getattr(got, name), getattr(want, name)), name


@pytest.mark.parametrize(("tokens", "top_k", "experts"), SIZES)
def test_same_tiles_as_the_reference(tokens: int, top_k: int, experts: int) -> None:
    for ids, block_m in zip(routings(tokens, top_k, experts), (16, 64, 16), strict=True):
        offsets, pairs = layout.routing_layout(ids, experts).offsets_E1, tokens * top_k
        want, got = (module.tile_map(offsets, pairs, block_m) for module in (layout, gpu_layout))
        assert torch.equal(got.expert_L, want.expert_L) and torch.equal(got.row_L, want.row_L)
