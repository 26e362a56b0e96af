from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import moeify
from moeify.config import MoEConfig
from moeify.errors import MoeifyError
from moeify.routers.sigmoid import updated_bias
from tests.moeify.layers import make

CONFIG = make.CONFIGS["deepseek_v3"]


def step(model: Any, optimizer: torch.optim.Optimizer, *batches: torch.Tensor) -> None:
    for x in batches:
        torch.autograd.backward(model(x).square().mean())
    optimizer.step()
    optimizer.zero_grad()


def test_an_optimizer_step_moves_the_bias_once_by_all_micro_batches() -> None:
    model = make.layer(CONFIG)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    handle = moeify.attach_bias_update(model, optimizer)
    first, second = make.inputs(3, 7, seed=1), make.inputs(2, 5, seed=2)
    counts = torch.zeros(6, dtype=torch.int64)
    for x in (first, second):
        counts += model.router(x.view(-1, make.HIDDEN)).expert_ids_TK.flatten().bincount(minlength=6)
    step(model, optimizer, first, second)
    expected = updated_bias(torch.zeros(6), counts, 1e-3)
    assert model.router.selection_bias.equal(expected)
    optimizer.step()  # nothing was routed since
    assert model.router.selection_bias.equal(expected)
    handle.remove()
    step(model, optimizer, first)
    assert model.router.selection_bias.equal(expected)


def test_the_bias_balances_a_collapsed_router() -> None:
    model = make.layer(MoEConfig(5, 1, router=moeify.routers.Sigmoid(bias_rate=0.02), aux_loss=0.0))
    with torch.no_grad():
        model.router.weight[3] = 0.5
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    moeify.attach_bias_update(model, optimizer)
    x = make.inputs(1, 400).abs()
    step(model, optimizer, x)
    before = max(moeify.routing_stats(model)[""].load)
    for _ in range(100):
        step(model, optimizer, x)
    assert before > 0.5
    assert max(moeify.routing_stats(model)[""].load) < 0.3


def test_a_model_without_such_a_router_is_told() -> None:
    model = make.layer(MoEConfig(5, 2))
    with pytest.raises(MoeifyError, match=r"moeify\.routers\.Sigmoid"):
        moeify.attach_bias_update(model, torch.optim.SGD(model.parameters(), lr=0.1))
    moeify.update_selection_bias(model)


def test_counts_of_all_ranks_are_added_before_the_bias_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    model = torch.nn.ModuleList(
        make.layer(MoEConfig(e, 2, router=moeify.routers.Sigmoid(bias_rate=0.5))) for e in (3, 4)
    )
    first, second = (layer.get_buffer("router.selection_bias") for layer in model)
    model[0].counts_E = torch.tensor([5, 3, 0])  # the second layer has not run on this rank
    others = torch.tensor([0, 3, 9, 1, 0, 3, 0])
    asked: list[object] = []

    def all_reduce(counts: torch.Tensor, group: object) -> None:
        asked.append(group)
        counts += others

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    group: Any = object()
    moeify.update_selection_bias(model, group)
    assert asked == [group]
    assert first.equal(updated_bias(torch.zeros(3), torch.tensor([5, 6, 9]), 0.5))
    assert second.equal(updated_bias(torch.zeros(4), torch.tensor([1, 0, 3, 0]), 0.5))
    assert first.any() and second.any() and model[0].counts_E is None


def test_data_parallel_ranks_count_what_all_of_them_chose(tmp_path: Path) -> None:
    root = str(Path(__file__).parents[3])
    program = [sys.executable, "-m", "tests.moeify.training.two_ranks"]
    ranks = [subprocess.Popen([*program, str(rank), str(tmp_path)], cwd=root) for rank in range(2)]
    assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    router = make.layer(CONFIG).router
    batches = [make.inputs(2, 5, seed=10), make.inputs(2, 5, seed=11), make.inputs(3, 7, seed=0), make.inputs(3, 7)]
    ids = torch.cat([router(x.view(-1, make.HIDDEN)).expert_ids_TK.flatten() for x in batches])
    expected = updated_bias(torch.zeros(6), ids.bincount(minlength=6), 1e-3)
    assert found[0].equal(found[1]) and found[0].equal(expected)
    layer = make.layer(MoEConfig(5, 2))
    routings = [layer.router(make.inputs(3, 7, seed=rank).view(-1, make.HIDDEN)) for rank in range(2)]
    shares = torch.cat([r.expert_ids_TK.flatten() for r in routings]).bincount(minlength=5) / (2 * 21 * 2)
    for rank, routing in enumerate(routings):
        loss = torch.load(tmp_path / f"loss{rank}.pt", weights_only=True)
        torch.testing.assert_close(loss, 5 * (shares * routing.scores_TE.mean(0)).sum().detach())
