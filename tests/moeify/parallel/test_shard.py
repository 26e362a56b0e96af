"""Whole models: three steps on several ranks, under each engine, against one process that runs the ranks' chunks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

import moeify
from moeify.config import MoEConfig
from moeify.errors import ConfigError
from tests.moeify.parallel import harness, small

FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


def sizes(world: int) -> list[int]:
    return [2] if world == 2 else [2, 4]


def train(model: Any, reference: nn.Module, engine: str, rank: int, world: int) -> None:
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2) for m in (model, reference)]
    for step in range(3):
        loss = model(small.batch(step, rank)).square().mean()
        torch.autograd.backward(loss)
        if engine == "none":
            small.average(model)
        alone = torch.zeros((), dtype=torch.float64)
        for other in range(world):
            term = reference(small.batch(step, other)).square().mean() / world
            torch.autograd.backward(term)
            alone += term.detach()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        assert abs(mean / world - alone) <= 1e-14 * alone, (engine, step)
        wanted = {n: p.grad for n, p in reference.named_parameters() if p.grad is not None}
        # Ranks add up their means, one process the ranks' batches: ten times what that order was seen to change.
        assert (found := small.apart(small.gradients(model), wanted)) <= 1e-14, (engine, step, found)
        norm = moeify.clip_grad_norm_(model, 0.05)
        expected = nn.utils.clip_grad_norm_(reference.parameters(), 0.05)
        assert expected > 0.05 and abs(norm - expected) <= 1e-14 * expected, (engine, step)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def case_three_steps_under_each_engine(rank: int, world: int) -> None:
    for ep in sizes(world):
        for engine in ("none", "ddp", "fsdp"):
            mesh = small.mesh(world, ep)
            model = moeify.parallelize(small.net(), mesh["ep"])
            stack = model.layers[0].get_parameter("mlp.experts.down_proj")
            assert isinstance(stack, DTensor) and len(stack.to_local()) == small.EXPERTS // ep
            train(small.wrap(model, engine, mesh), small.net(), engine, rank, world)


def case_weights_may_come_later(rank: int, world: int) -> None:
    with torch.device("meta"):
        model: Any = small.Net().double()
    mesh = small.mesh(world, 2)
    model = small.wrap(moeify.parallelize(model, mesh["ep"]), "fsdp", mesh)
    model.to_empty(device="cpu")
    whole = small.net()
    set_model_state_dict(model, whole.state_dict(), options=StateDictOptions(full_state_dict=True))
    x = small.batch(0, rank)
    torch.testing.assert_close(model(x), whole(x), rtol=1e-13, atol=1e-13)


def case_a_bfloat16_model_keeps_its_routers(rank: int, world: int) -> None:
    mesh = small.mesh(world, 2)
    model = small.wrap(moeify.parallelize(small.net().bfloat16(), mesh["ep"]), "fsdp", mesh)
    torch.autograd.backward(model(small.batch(0, rank).bfloat16()).square().mean())
    found = {name: gradient.dtype for name, gradient in small.gradients(model).items()}
    assert found.pop("layers.0.mlp.router.weight") == found.pop("layers.1.mlp.router.weight") == torch.float32
    assert set(found.values()) == {torch.bfloat16}


def case_a_checkpoint_fits_other_ranks(rank: int, world: int) -> None:
    """torch.distributed.checkpoint: parameters and AdamW's state, written under one division and read under others."""

    def made(engine: str, ep: int, seed: int) -> tuple[Any, torch.optim.Optimizer]:
        mesh = small.mesh(world, ep)
        model = small.net(seed=seed)
        model = small.wrap(moeify.parallelize(model, mesh["ep"]), engine, mesh) if ep > 1 else model
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        torch.autograd.backward(model(small.batch(0, rank)).square().mean())
        if engine == "none":
            small.average(model)
        optimizer.step()
        return model, optimizer

    def state(model: Any, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        return dict(zip(("model", "optimizer"), get_state_dict(model, optimizer, options=FLAT), strict=True))

    place = small.folder()
    written = state(*made("fsdp", 2, seed=0))
    save(written, checkpoint_id=place)
    others = [("fsdp", world), ("ddp", 2), ("none", 1)]
    for engine, ep in others:
        model, optimizer = made(engine, ep, seed=7)
        read = state(model, optimizer)
        load(read, checkpoint_id=place)
        set_state_dict(
            model, optimizer, model_state_dict=read["model"], optim_state_dict=read["optimizer"], options=FLAT
        )
        now = state(model, optimizer)
        for part, values in written.items():
            assert values.keys() == now[part].keys()
            for name, value in values.items():
                there, back = small.full(value), small.full(now[part][name])
                same = there.equal(back) if isinstance(there, torch.Tensor) else there == back
                assert same, (engine, ep, name)
    small.remove(place)


def case_noise_differs_between_ranks_and_not_in_a_replay(rank: int, world: int) -> None:
    config = MoEConfig.noisy_topk(small.EXPERTS, 2)
    model = moeify.parallelize(small.net(config), small.mesh(world, 2)["ep"])
    seen = []
    for _ in range(2):
        torch.manual_seed(7)  # as a trainer seeds every rank
        model(small.batch(0, 0))
        seen.append(model.layers[0].mlp.record.routing.logits_TE.detach())  # type: ignore[union-attr, operator]
    assert seen[0].equal(seen[1])
    everyone = [torch.empty_like(seen[0]) for _ in range(world)]
    dist.all_gather(everyone, seen[0])
    assert not any(everyone[0].equal(other) for other in everyone[1:])


def case_unequal_ranks_balance_as_one_process(rank: int, world: int) -> None:
    """The level "global", with other numbers of tokens on each rank; statistics are summed."""
    config = MoEConfig(small.EXPERTS, 2, aux_loss=0.1, attach_losses=True, balance_level="global")
    model = moeify.parallelize(small.net(config), small.mesh(world, 2)["ep"])
    xs = [torch.cat([small.batch(0, r)] * (r + 1))[:, : 7 - r] for r in range(world)]
    torch.autograd.backward(model(xs[rank]).sum() * 0)
    small.average(model)
    alone = small.net(config)
    torch.autograd.backward(alone(torch.cat([x.reshape(1, -1, small.HIDDEN) for x in xs], 1)).sum() * 0)
    router = "layers.1.mlp.router.weight"
    wanted = {router: small.gradients(alone)[router]}
    assert wanted[router].any()
    assert small.apart({router: small.gradients(model)[router]}, wanted) < 1e-12
    together, one = moeify.routing_stats(model, dist.group.WORLD), moeify.routing_stats(alone)
    for path, stats in one.items():
        assert together[path].load == stats.load and together[path].tokens == stats.tokens
        assert together[path].entropy == pytest.approx(stats.entropy, rel=1e-12)


def case_wrong_use_is_one_line_on_every_rank(rank: int, world: int) -> None:
    mesh = small.mesh(world, world)
    wrong: Any = small.net()

    def refused(match: str, model: Any, on: Any) -> None:
        with pytest.raises(ConfigError, match=match) as caught:
            moeify.parallelize(model, on)
        assert "\n" not in str(caught.value)

    refused("no dimension 'ep'", wrong, mesh["efsdp"])
    refused("a NoneType has no dimension 'ep'", wrong, None)
    refused("model is a str: expected a torch.nn.Module", "my-moe", mesh["ep"])
    refused("cannot share evenly", small.net(MoEConfig(world + 1, 1)), mesh["ep"])
    refused("nothing to shard", nn.Linear(3, 3), mesh["ep"])
    refused("rank 1 differ in the settings", small.net(MoEConfig(8, 1 + (rank == 1))), mesh["ep"])
    refused("rank 1 differ in layers.0.dense.weight", small.net(seed=int(rank == 1)), mesh["ep"])
    refused("rank 1: Linear has no MoE", nn.Linear(3, 3) if rank == 1 else small.net(), mesh["ep"]) if rank != 1 else (
        refused("Linear has no MoE", nn.Linear(3, 3), mesh["ep"])
    )
    refused("along which ranks share tokens", wrong,
            init_device_mesh("cpu", (1, world), mesh_dim_names=("tp", "ep"))["ep"])  # fmt: skip
    optimizer = torch.optim.AdamW(wrong.parameters())
    refused("an optimizer holds the experts already", wrong, mesh["ep"])
    del optimizer
    once = moeify.parallelize(small.net(), mesh["ep"])
    refused("parallel already", once, mesh["ep"])
    refused("wrapped already", small.wrap(small.net(), "ddp", mesh), mesh["ep"])
    refused("sharded already", small.wrap(small.net(), "fsdp", mesh), mesh["ep"])
    part = init_device_mesh("cpu", (1, world // 2), mesh_dim_names=("efsdp", "ep"))
    refused(rf"has {world // 2} of the {world} ranks", wrong, part)


test_on_several_ranks = harness.on_several_ranks(__name__, 2, 4)
