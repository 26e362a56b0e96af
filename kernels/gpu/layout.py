"""Routing layout on the GPU: a stable counting sort in two launches, the tile map in one, and no waiting.

Shape legend: S choices, E experts, P blocks of choices, X = E + 1 rounded up to a power of two (the extra bin is for
ids outside [0, E)), L tiles.
"""

# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moeify.kernels.layout import RoutingLayout, TileMap, max_tiles, wide_enough


@triton.jit(do_not_specialize=["choices"])
def count_kernel(IDS, COUNTS, choices, E: tl.constexpr, X: tl.constexpr, BLOCK: tl.constexpr):
    """COUNTS_PX: how many choices of each block go to each expert. Grid: (P,)."""
    choice = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ids = tl.load(IDS + choice, mask=choice < choices, other=0)
    ids = tl.where((ids < 0) | (ids >= E), E, ids).to(tl.int32)
    expert = tl.arange(0, X)
    hits = (ids[:, None] == expert[None, :]) & (choice < choices)[:, None]
    tl.store(COUNTS + tl.program_id(0).to(tl.int64) * X + expert, tl.sum(hits.to(tl.int32), 0))


@triton.jit(do_not_specialize=["choices", "blocks"])
def place_kernel(IDS, STARTS, ORDER, INVERSE, choices, blocks, E: tl.constexpr, X: tl.constexpr, BLOCK: tl.constexpr):
    """Place each choice after those of its expert that come before it, in earlier blocks (STARTS_XP) or in its own."""
    choice = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = choice < choices
    ids = tl.load(IDS + choice, mask=live, other=0)
    ids = tl.where((ids < 0) | (ids >= E), E, ids).to(tl.int32)
    hits = ((ids[:, None] == tl.arange(0, X)[None, :]) & live[:, None]).to(tl.int32)
    rank = tl.sum(tl.cumsum(hits, 0) * hits, 1) - 1
    row = tl.load(STARTS + ids.to(tl.int64) * blocks + tl.program_id(0)) + rank
    tl.store(ORDER + row, choice, mask=live)
    tl.store(INVERSE + choice, row, mask=live)


@triton.jit(do_not_specialize=["tiles"])
def tile_map_kernel(OFFSETS, TILE_EXPERT, TILE_ROW, tiles, E: tl.constexpr, X: tl.constexpr, BM: tl.constexpr):
    """Program e writes the tiles of expert e; program E marks the tiles past the last one as dead. Grid: (E + 1,)."""
    expert = tl.program_id(0)
    experts = tl.arange(0, X)
    start = tl.load(OFFSETS + experts, mask=experts < E, other=0)
    count = tl.load(OFFSETS + experts + 1, mask=experts < E, other=0) - start
    before = tl.sum(tl.where(experts < expert, tl.cdiv(count, BM), 0), 0)
    if expert < E:
        row = tl.load(OFFSETS + expert)
        end = tl.load(OFFSETS + expert + 1)
        while row < end:
            tl.store(TILE_EXPERT + before, expert)
            tl.store(TILE_ROW + before, row)
            before += 1
            row += BM
    else:
        while before < tiles:
            tl.store(TILE_EXPERT + before, -1)
            tl.store(TILE_ROW + before, 0)
            before += 1


def routing_layout(expert_ids_TK: Tensor, experts: int) -> RoutingLayout:
    """The same as `moeify.kernels.layout.routing_layout`, in three launches."""
    ids_S = wide_enough(expert_ids_TK).contiguous().view(-1)
    choices, bins = ids_S.shape[0], triton.next_power_of_2(experts + 1)
    block = max(min(8192 // bins, 64), 16)  # what one program holds in registers: block x bins counters
    blocks = max(triton.cdiv(choices, block), 1)
    counts_PX = ids_S.new_empty((blocks, bins), dtype=torch.int32)
    order_S, inverse_S = ids_S.new_empty((2, choices), dtype=torch.int32).unbind()
    count_kernel[(blocks,)](ids_S, counts_PX, choices, E=experts, X=bins, BLOCK=block)
    ends_XP = counts_PX.t().reshape(-1).cumsum(0, dtype=torch.int32).view(bins, blocks)
    starts_XP = ends_XP.sub_(counts_PX.t())
    place_kernel[(blocks,)](ids_S, starts_XP, order_S, inverse_S, choices, blocks, E=experts, X=bins, BLOCK=block)
    return RoutingLayout(order_S, inverse_S, starts_XP[: experts + 1, 0].contiguous(), expert_ids_TK.shape[1])


def tile_map(offsets_E1: Tensor, choices: int, block_m: int) -> TileMap:
    """The same as `moeify.kernels.layout.tile_map`, in one launch."""
    experts = offsets_E1.shape[0] - 1
    tiles = max_tiles(choices, experts, block_m)
    expert_L, row_L = offsets_E1.new_empty((2, tiles), dtype=torch.int32).unbind()
    bins = triton.next_power_of_2(experts)
    tile_map_kernel[(experts + 1,)](offsets_E1, expert_L, row_L, tiles, E=experts, X=bins, BM=block_m)
    return TileMap(expert_L, row_L, block_m)
