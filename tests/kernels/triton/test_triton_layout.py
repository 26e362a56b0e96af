from __future__ import annotations

import pytest
import torch

from moeify.kernels import layout, triton_layout


@pytest.mark.parametrize(
    ("tokens", "top_k", "experts"), [(0, 2, 3), (1, 1, 1), (1, 8, 8), (5, 2, 16), (67, 3, 5), (19, 2, 130), (200, 1, 2)]
)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_same_layout_and_tiles_as_the_reference(tokens: int, top_k: int, experts: int, dtype: torch.dtype) -> None:
    ids = torch.randint(-1, experts + 1, (tokens, top_k), generator=torch.Generator().manual_seed(tokens)).to(dtype)
    for routing in (ids, torch.zeros_like(ids), torch.full_like(ids, experts)):
        want, got = layout.routing_layout(routing, experts), triton_layout.routing_layout(routing, experts)
        assert torch.equal(got.order_S, want.order_S)
        assert torch.equal(got.inverse_S, want.inverse_S)
        assert torch.equal(got.offsets_E1, want.offsets_E1)
        for block_m in (16, 64):
            tiles = layout.tile_map(want.offsets_E1, tokens * top_k, block_m)
            ours = triton_layout.tile_map(want.offsets_E1, tokens * top_k, block_m)
            assert torch.equal(ours.expert_L, tiles.expert_L) and torch.equal(ours.row_L, tiles.row_L)
