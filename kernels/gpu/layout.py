"""Routing layout on the GPU: a stable counting sort in two launches, the tile map in one, and no waiting.

Where a token or a few are decoded, launches take longer than what they do: one does all of it.

Shape legend: S choices, E experts, P blocks of choices, X = E + 1 rounded up to a power of two (the extra bin is for
ids outside [0, E)), L tiles.
"""

# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator"

from __future__ import annotations

from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor

from moeify.kernels.layout import RoutingLayout, TileMap, max_tiles, wide_enough

FEW_BLOCKS = 4  # of choices, up to which one program that takes one after the other is faster than six launches


@triton.jit
def _hits(IDS, first, choices, E: tl.constexpr, X: tl.constexpr, BLOCK: tl.constexpr):
    """Return BLOCK numbers from `first` on, which of them are choices, and (BLOCK, X) a 1 at the bin of each.

    That of a choice without an expert is E.
    """
    choice = first + tl.arange(0, BLOCK)
    live = choice < choices
    ids = tl.load(IDS + choice, mask=live, other=0)
    ids = tl.where((ids < 0) | (ids >= E), E, ids).to(tl.int32)
    hits = (ids[:, None] == tl.arange(0, X)[None, :]) & live[:, None]
    return choice, live, hits.to(tl.int32)


@triton.jit
def _place(ORDER, INVERSE, choice, live, hits, starts):
    """Place each choice after those of its expert that come before it: `starts`, and those in the same block."""
    row = tl.sum((tl.cumsum(hits, 0) - 1 + starts[None, :]) * hits, 1)
    tl.store(ORDER + row, choice, mask=live)
    tl.store(INVERSE + choice, row, mask=live)


@triton.jit(do_not_specialize=["choices", "tiles"])
def route_kernel(
    IDS, ORDER, INVERSE, OFFSETS, TILE_EXPERT, TILE_ROW, choices, tiles,
    E: tl.constexpr, X: tl.constexpr, BLOCK: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Compute the routing layout of few choices and their tile map in one program. Grid: (1,)."""
    expert = tl.arange(0, X)
    counts = tl.zeros((X,), tl.int32)
    for first in range(0, choices, BLOCK):
        _, _, hits = _hits(IDS, first, choices, E, X, BLOCK)
        counts += tl.sum(hits, 0)
    starts = tl.cumsum(counts, 0) - counts
    tl.store(OFFSETS + expert, starts, mask=expert <= E)
    tiles_X = tl.where(expert < E, tl.cdiv(counts, BM), 0)
    before = tl.cumsum(tiles_X, 0) - tiles_X
    for i in range(0, tl.max(tiles_X, 0)):
        tl.store(TILE_EXPERT + before + i, expert, mask=i < tiles_X)
        tl.store(TILE_ROW + before + i, starts + i * BM, mask=i < tiles_X)
    used = tl.sum(tiles_X, 0)
    for tile in range(used, tiles):
        tl.store(TILE_EXPERT + tile, -1)
        tl.store(TILE_ROW + tile, 0)
    for first in range(0, choices, BLOCK):
        choice, live, hits = _hits(IDS, first, choices, E, X, BLOCK)
        _place(ORDER, INVERSE, choice, live, hits, starts)
        starts += tl.sum(hits, 0)


@triton.jit(do_not_specialize=["choices"])
def count_kernel(IDS, COUNTS, choices, E: tl.constexpr, X: tl.constexpr, BLOCK: tl.constexpr):
    """COUNTS_PX: how many choices of each block go to each expert. Grid: (P,)."""
    block = tl.program_id(0)
    _, _, hits = _hits(IDS, block * BLOCK, choices, E, X, BLOCK)
    tl.store(COUNTS + block.to(tl.int64) * X + tl.arange(0, X), tl.sum(hits, 0))


@triton.jit(do_not_specialize=["choices", "blocks"])
def place_kernel(IDS, STARTS, ORDER, INVERSE, choices, blocks, E: tl.constexpr, X: tl.constexpr, BLOCK: tl.constexpr):
    """Place each choice after those of its expert that come before it, in earlier blocks (STARTS_XP) or in its own."""
    block = tl.program_id(0)
    choice, live, hits = _hits(IDS, block * BLOCK, choices, E, X, BLOCK)
    starts = tl.load(STARTS + tl.arange(0, X).to(tl.int64) * blocks + block)
    _place(ORDER, INVERSE, choice, live, hits, starts)


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
    choices, (bins, block) = ids_S.shape[0], _bins(experts)
    blocks = max(triton.cdiv(choices, block), 1)
    counts_PX = ids_S.new_empty((blocks, bins), dtype=torch.int32)
    order_S, inverse_S = _pieces(ids_S, choices, choices)
    count_kernel[(blocks,)](ids_S, counts_PX, choices, E=experts, X=bins, BLOCK=block)
    ends_XP = counts_PX.t().reshape(-1).cumsum(0, dtype=torch.int32).view(bins, blocks)
    starts_XP = ends_XP.sub_(counts_PX.t())
    place_kernel[(blocks,)](ids_S, starts_XP, order_S, inverse_S, choices, blocks, E=experts, X=bins, BLOCK=block)
    return RoutingLayout(order_S, inverse_S, starts_XP[: experts + 1, 0].contiguous(), expert_ids_TK.shape[1])


def route(expert_ids_TK: Tensor, experts: int, block_m: int) -> tuple[RoutingLayout, TileMap]:
    """Return the routing layout and its tile map: for few choices, in one launch."""
    choices, (bins, block) = expert_ids_TK.numel(), _bins(experts)
    if choices > FEW_BLOCKS * block:
        layout = routing_layout(expert_ids_TK, experts)
        return layout, tile_map(layout.offsets_E1, choices, block_m)
    ids_S, tiles = wide_enough(expert_ids_TK).contiguous().view(-1), max_tiles(choices, experts, block_m)
    made = _pieces(ids_S, choices, choices, experts + 1, tiles, tiles)
    route_kernel[(1,)](ids_S, *made, choices, tiles, E=experts, X=bins, BLOCK=block, BM=block_m, num_warps=8)
    order_S, inverse_S, offsets_E1, expert_L, row_L = made
    return RoutingLayout(order_S, inverse_S, offsets_E1, expert_ids_TK.shape[1]), TileMap(expert_L, row_L, block_m)


def _bins(experts: int) -> tuple[int, int]:
    """Return how many counters a block of choices has, and how many choices: what one program holds in registers."""
    bins = triton.next_power_of_2(experts + 1)
    return bins, max(min(8192 // bins, 64), 16)


def _pieces(like: Tensor, *sizes: int) -> list[Tensor]:
    """Return int32 tensors from one allocation.

    Each starts at a multiple of 16 bytes: kernels are compiled for how their arguments are aligned, which must not
    follow the number of tokens.
    """
    ends = list(accumulate(-(-size // 4) * 4 for size in sizes))
    room = like.new_empty(ends[-1], dtype=torch.int32)
    return [room[start : start + size] for start, size in zip([0, *ends], sizes, strict=False)]


def tile_map(offsets_E1: Tensor, choices: int, block_m: int) -> TileMap:
    """The same as `moeify.kernels.layout.tile_map`, in one launch."""
    experts = offsets_E1.shape[0] - 1
    tiles = max_tiles(choices, experts, block_m)
    expert_L, row_L = _pieces(offsets_E1, tiles, tiles)
    bins = triton.next_power_of_2(experts)
    tile_map_kernel[(experts + 1,)](offsets_E1, expert_L, row_L, tiles, E=experts, X=bins, BM=block_m)
    return TileMap(expert_L, row_L, block_m)
