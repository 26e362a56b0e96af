"""Routing layout: the choices of all tokens, sorted by expert.

A choice is one (token, expert) pair chosen by the router. Shape legend: T tokens, K choices per token, S = T*K choices,
E experts, L tiles of rows. A trailing 1 is plus one: offsets_E1 is (E + 1,).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RoutingLayout:
    """The S = T*K choices, sorted by expert.

    Number `c` is choice `c % K` of token `c // K`. Sorting is stable: within an expert, choices keep their order.
    Choices whose expert id is outside [0, E) come last, from row `offsets_E1[-1]` on; nothing computes them.

    Attributes:
        order_S: int32 (S,), the number of the choice at each sorted row.
        inverse_S: int32 (S,), the sorted row of each choice.
        offsets_E1: int32 (E + 1,), expert e owns sorted rows offsets[e] .. offsets[e + 1] - 1.
        top_k: K.
    """

    order_S: Tensor
    inverse_S: Tensor
    offsets_E1: Tensor
    top_k: int


def routing_layout(expert_ids_TK: Tensor, experts: int) -> RoutingLayout:
    """Sort choices by expert, on the device of the ids and without waiting for it.

    Args:
        expert_ids_TK: Integers (T, K), K at least 1; ids outside [0, experts) are skipped.
        experts: E.

    Returns:
        The layout; all shapes depend on the shapes of the arguments only, never on their values.
    """
    order_S, offsets_E1 = sort_by_expert(expert_ids_TK, experts)
    return RoutingLayout(order_S, invert(order_S), offsets_E1, expert_ids_TK.shape[1])


def sort_by_expert(expert_ids_TK: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Return `(order_S, offsets_E1)` of `RoutingLayout`."""
    ids_S = wide_enough(expert_ids_TK).reshape(-1)
    ids_S = torch.where((ids_S < 0) | (ids_S >= experts), experts, ids_S)
    sorted_S, order_S = torch.sort(ids_S, stable=True)
    edges_E1 = torch.arange(experts + 1, device=ids_S.device, dtype=ids_S.dtype)
    offsets_E1 = torch.searchsorted(sorted_S, edges_E1, out_int32=True)  # the row where each expert starts
    return order_S.to(torch.int32), offsets_E1


def wide_enough(expert_ids: Tensor) -> Tensor:
    """Return the ids as int32 or int64; a narrower type may not hold the number of experts."""
    return expert_ids if expert_ids.dtype in {torch.int32, torch.int64} else expert_ids.long()


def invert(order_S: Tensor) -> Tensor:
    """Return the inverse of a permutation, int32 (S,)."""
    rows_S = torch.arange(order_S.shape[0], device=order_S.device, dtype=torch.int32)
    return torch.empty_like(rows_S).scatter(0, order_S.long(), rows_S)


@dataclass(frozen=True)
class TileMap:
    """The sorted rows, cut into tiles of at most `block_m` rows of one expert each.

    Attributes:
        expert_L: int32 (L,), the expert of each tile; -1 for a dead tile, past the last one in use.
        row_L: int32 (L,), the first row of each tile.
        block_m: the height of a tile; the last one of an expert may have fewer rows.
    """

    expert_L: Tensor
    row_L: Tensor
    block_m: int


def max_tiles(choices: int, experts: int, block_m: int) -> int:
    """Return how many tiles the worst routing needs; this does not depend on the routing, so the host knows it."""
    if choices <= experts:
        return choices
    return (choices - experts + block_m) // block_m + experts - 1


def tile_map(offsets_E1: Tensor, choices: int, block_m: int) -> TileMap:
    """Cut `choices` sorted rows into `max_tiles` tiles, on the device of the offsets and without waiting for it."""
    counts_E = offsets_E1.diff()
    tiles_E = (counts_E + block_m - 1) // block_m
    ends_E = tiles_E.cumsum(0, dtype=torch.int32)
    tile_L = torch.arange(max_tiles(choices, counts_E.shape[0], block_m), device=offsets_E1.device, dtype=torch.int32)
    expert_L = torch.searchsorted(ends_E, tile_L, right=True, out_int32=True)
    live_L = tile_L < ends_E[-1]
    owner_L = expert_L.clamp(max=counts_E.shape[0] - 1).long()
    row_L = offsets_E1[owner_L] + (tile_L - ends_E[owner_L] + tiles_E[owner_L]) * block_m
    return TileMap(torch.where(live_L, expert_L, -1), torch.where(live_L, row_L, 0).to(torch.int32), block_m)
