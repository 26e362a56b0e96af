"""Messages of one size give what messages of the kept choices give, and make one graph."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import moeify
from moeify.config import MoEConfig
from moeify.errors import ConfigError, MoeifyError
from moeify.parallel.exchange import Link
from moeify.parallel.static import StaticExpertParallel
from moeify.routing.record import Routing
from tests.moeify.parallel import harness, small
from tests.moeify.parallel.test_dispatcher import HIDDEN, compare, counted, experts, routing, splits

WIDE = MoEConfig(small.EXPERTS, 2, capacity_factor=1.0, eval_capacity_factor=1.5, min_capacity=1, aux_loss=0.0)


def static(count: int, world: int, capacity: int) -> StaticExpertParallel:
    group: Any = dist.group.WORLD
    return StaticExpertParallel(Link(group, ("model.layers.1.mlp",), 0), count // world, capacity)


def case_outputs_and_gradients_are_equal_to_the_last_bit(rank: int, world: int) -> None:
    for dtype in (torch.float64, torch.float32):
        for count, top_k in ((8, 2), (4, 4)):
            for sizes in (*splits(world), [0] * world):
                compare(rank, world, sizes, count, top_k, dtype, "", static(count, world, 17))


def case_every_message_has_its_size_whatever_is_chosen(rank: int, world: int) -> None:
    local, seen = experts(8 // world, torch.float32), []
    for tokens in (5, 0, 9):
        chosen = replace(routing(tokens, 8, 2, torch.float32, rank), capacity=4)
        dispatcher, x = static(8, world, 9), torch.randn(tokens, HIDDEN, requires_grad=True)
        with counted(rank, world) as sent_bytes:
            sent = dispatcher.dispatch(x, chosen)
            torch.autograd.backward(dispatcher.combine(local(sent.x, sent.expert_ids, sent.weights), sent).sum())
        seen.append(sorted(sent_bytes))
    rows, ranks = 9 * 8 // world, world - 1
    row, weight, counts = rows * HIDDEN * 4, rows * 4, 8 * (1 + 8 // world)
    assert seen == [sorted([ranks * each for each in (row, row, row, row, weight, weight, counts)])] * 3


def case_it_compiles_to_one_graph(rank: int, world: int) -> None:
    dispatcher, local = static(8, world, 6), experts(8 // world, torch.float64)
    chosen = routing(13, 8, 2, torch.float64, rank)

    def run(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        sent = dispatcher.dispatch(x, Routing(ids, weights, x, x, capacity=6))
        return dispatcher.combine(local(sent.x, sent.expert_ids, sent.weights), sent)

    found = []
    for call in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(rank)
        x = torch.randn(13, HIDDEN, dtype=torch.float64, requires_grad=True)
        weights = chosen.weights_TK.detach().clone().requires_grad_()
        local.zero_grad()
        out = call(x, chosen.expert_ids_TK, weights)
        torch.autograd.backward(out.square().sum())
        found.append([out, x.grad, weights.grad, *(p.grad for p in local.parameters())])
    for eager, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-14, atol=1e-14)


def case_models_give_what_they_give_with_messages_of_the_kept_choices(rank: int, world: int) -> None:
    mesh = small.mesh(world, 2)
    models = [moeify.parallelize(small.net(WIDE), mesh["ep"], **how) for how in ({}, {"tokens": 20})]
    for few in (7, 3):
        x = small.batch(0, rank)[:, : few + rank]  # other numbers of tokens on each rank
        outs = [model(x) for model in models]
        for out in outs:
            torch.autograd.backward(out.square().sum())
        assert outs[0].equal(outs[1])
    assert any(float(layer.mlp.record.dropped) for layer in models[1].layers)  # type: ignore[union-attr, arg-type]
    assert small.apart(small.gradients(models[1]), small.gradients(models[0])) < 1e-14
    x[0, 0] = torch.nan if rank == 1 else 0.0
    with pytest.raises(MoeifyError, match=r"^rank 1: mlp: .* router logit that is NaN or infinite"):
        models[1](x)


def case_wrong_sizes_are_one_line(rank: int, world: int) -> None:
    mesh = small.mesh(world, 2)
    for tokens, config, words in (
        (0, WIDE, "tokens is 0: give the most tokens"),
        (9, MoEConfig(small.EXPERTS, 2), r"layers.0.mlp has no capacity factor"),
        (20 + 20 * rank, WIDE, r"rank 0 and rank 1 differ in the sizes of messages \(\[8, 8\] and \[15, 15\]\)"),
    ):
        with pytest.raises(ConfigError, match=words):
            moeify.parallelize(small.net(config), mesh["ep"], tokens=tokens)
    model = moeify.parallelize(small.net(WIDE), mesh["ep"], tokens=6)
    with pytest.raises(ConfigError, match=r"mlp: an expert has the capacity 4, and messages have rows for 3 choices"):
        model(small.batch(0, rank))


test_on_several_ranks = harness.on_several_ranks(__name__, 2)
