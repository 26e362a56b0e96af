"""Capacity against decimal arithmetic, and which choices are dropped against a queue served one choice at a time."""

from __future__ import annotations

import math
from decimal import ROUND_CEILING, Decimal
from typing import cast, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from moeify.config.settings import DropOrder
from moeify.errors import ConfigError
from moeify.routers.gshard import gshard
from moeify.routers.softmax import softmax_topk
from moeify.routing.capacity import drop_overflow, expert_capacity

ORDERS = get_args(DropOrder)


def routed(tokens: int, experts: int, top_k: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    logits = torch.randn(tokens, experts, generator=torch.Generator().manual_seed(seed))
    routing = softmax_topk(logits + torch.linspace(0, 2, experts), top_k)
    return routing.expert_ids_TK, routing.scores_TE


def serve(ids: list[list[int]], queue: list[tuple[int, int]], experts: int, capacity: int) -> list[list[int]]:
    """Choices (t, k) come one by one, and the expert takes them until it is full."""
    load, result = [0] * experts, [[experts] * len(row) for row in ids]
    for t, k in queue:
        expert = ids[t][k]
        if expert < experts and load[expert] < capacity:
            load[expert] += 1
            result[t][k] = expert
    return result


def choices(tokens: int, top_k: int) -> list[tuple[int, int]]:
    return [(t, k) for k in range(top_k) for t in range(tokens)]


@pytest.mark.parametrize("factor", [0.1, 1.0, 1.1, 1.25, 2.0, 1e-9, 1e6])
@pytest.mark.parametrize(
    ("tokens", "experts", "top_k"), [(100, 1, 1), (1024, 8, 2), (7, 8, 1), (1, 64, 4), (1000, 3, 3)]
)
def test_capacity_is_the_exact_ceiling(tokens: int, experts: int, top_k: int, factor: float) -> None:
    exact = Decimal(tokens) * top_k * Decimal(str(factor)) / experts
    expected = min(tokens, int(exact.to_integral_value(ROUND_CEILING)))
    assert expert_capacity(tokens, experts, top_k, factor) == expected >= 1


def test_capacity_rounds_up_the_decimal_and_not_its_binary_neighbour() -> None:
    assert math.ceil(100 * 1.1) == 111
    assert expert_capacity(1000, 10, 1, 1.1) == 110


def test_capacity_of_no_tokens_is_none() -> None:
    assert expert_capacity(0, 8, 2, 1.25) == 0


@pytest.mark.parametrize("factor", [0.0, -1.0, math.inf, math.nan])
def test_impossible_factors_are_refused(factor: float) -> None:
    with pytest.raises(ConfigError, match=r"capacity factor .* None for no limit"):
        expert_capacity(10, 2, 1, factor)


@pytest.mark.parametrize("order", ["position", "probability", "batch_prioritized"])
@pytest.mark.parametrize(
    ("tokens", "experts", "top_k", "capacity"), [(37, 5, 2, 9), (37, 5, 2, 1), (37, 5, 5, 20), (3, 8, 1, 0)]
)
def test_which_choices_are_dropped(order: DropOrder, tokens: int, experts: int, top_k: int, capacity: int) -> None:
    ids, scores = routed(tokens, experts, top_k)
    queue = choices(tokens, top_k)
    if order == "probability":
        queue.sort(key=lambda choice: -float(scores[choice[0], int(ids[choice])]))
    if order == "batch_prioritized":
        queue.sort(key=lambda choice: (choice[1], -float(scores[choice[0]].max())))
    new_ids, dropped = drop_overflow(ids, scores, capacity, order=order)
    assert new_ids.tolist() == serve(ids.tolist(), queue, experts, capacity)
    assert int(dropped) == int((new_ids == experts).sum())


def test_second_choices_queue_behind_all_first_choices() -> None:
    ids, scores = torch.tensor([[1, 0], [1, 0], [0, 1]]), torch.full((3, 2), 0.5)
    new_ids, dropped = drop_overflow(ids, scores, 2)
    assert new_ids.tolist() == [[1, 0], [1, 2], [0, 2]]
    assert int(dropped) == 2


def test_equal_priorities_are_served_by_position() -> None:
    ids, scores = torch.zeros(9, 1, dtype=torch.int64), torch.full((9, 3), 0.1)
    for order in ("position", "probability", "batch_prioritized"):
        new_ids, _ = drop_overflow(ids, scores, 4, order=order)
        assert new_ids[:, 0].tolist() == [0] * 4 + [3] * 5


def test_random_order_is_fair_and_reproducible() -> None:
    ids, scores = torch.zeros(10, 1, dtype=torch.int64), torch.full((10, 2), 0.5)
    kept = torch.zeros(10)
    for seed in range(1000):
        torch.manual_seed(seed)
        new_ids, dropped = drop_overflow(ids, scores, 3, order="random")
        assert int(dropped) == 7
        kept += new_ids[:, 0] == 0
    assert (kept - 300).abs().max() < 75  # five standard deviations
    torch.manual_seed(999)
    again, _ = drop_overflow(ids, scores, 3, order="random")
    assert torch.equal(again, new_ids)


@settings(deadline=None, max_examples=80)
@given(st.sampled_from(ORDERS), st.integers(0, 40), st.integers(2, 9), st.integers(0, 12), st.integers(0, 99))
def test_full_experts_are_exactly_full(order: DropOrder, tokens: int, experts: int, capacity: int, seed: int) -> None:
    # GShard drops choices before any capacity is applied.
    logits = torch.randn(tokens, experts, generator=torch.Generator().manual_seed(seed))
    torch.manual_seed(seed)
    routing = gshard(logits)
    ids = routing.expert_ids_TK
    new_ids, dropped = drop_overflow(ids, routing.scores_TE, capacity, order=order)
    wanted, served = (torch.bincount(i.flatten(), minlength=experts + 1)[:experts] for i in (ids, new_ids))
    assert torch.equal(served, wanted.clamp(max=capacity))
    assert int(dropped) == int((wanted - served).sum())
    assert bool(((new_ids == ids) | (new_ids == experts)).all())


def test_an_unknown_order_is_refused() -> None:
    ids, scores = routed(3, 2, 1)
    with pytest.raises(ConfigError, match="'last'"):
        drop_overflow(ids, scores, 1, order=cast(DropOrder, "last"))


@pytest.mark.parametrize("order", ORDERS)
def test_shapes_on_the_meta_device(order: DropOrder) -> None:
    ids, scores = torch.zeros(7, 2, dtype=torch.int64, device="meta"), torch.zeros(7, 3, device="meta")
    new_ids, dropped = drop_overflow(ids, scores, 2, order=order)
    assert (new_ids.shape, new_ids.dtype, dropped.shape) == ((7, 2), torch.int64, ())


class Capped(nn.Module):
    def __init__(self, order: DropOrder) -> None:
        super().__init__()
        self.order = order

    def forward(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        routing = softmax_topk(logits, 2)
        capacity = expert_capacity(logits.shape[0], logits.shape[1], 2, 1.1)
        return drop_overflow(routing.expert_ids_TK, routing.scores_TE, capacity, order=self.order)


@pytest.mark.parametrize("order", ["position", "probability", "batch_prioritized"])
def test_export_with_any_number_of_tokens(order: DropOrder) -> None:
    module = Capped(order)
    dynamic = ({0: torch.export.Dim("tokens", min=2)},)
    program = torch.export.export(module, (torch.randn(12, 5),), dynamic_shapes=dynamic)
    for tokens in (3, 47):
        logits = torch.randn(tokens, 5, generator=torch.Generator().manual_seed(tokens))
        for exported, eager in zip(program.module()(logits), module(logits), strict=True):
            assert torch.equal(exported, eager)
