"""Ranks that end or hang, wherever the others wait for them: each says in one line where it was, and why it stops."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import moeify
from moeify.config import MoEConfig
from moeify.errors import CheckpointError, MoeifyError
from moeify.parallel.dispatcher import ExpertParallel
from moeify.parallel.exchange import Link
from tests.moeify.layers import make
from tests.moeify.parallel import harness, small
from tests.moeify.parallel.test_saving import converted

GLOBAL = MoEConfig(small.EXPERTS, 2, aux_loss=0.1, attach_losses=True, balance_level="global")


@contextmanager
def lost(rank: int, world: int, words: str, kind: type[MoeifyError] = MoeifyError) -> Iterator[None]:
    """End the last rank here, and hear what the others say; they were seen to end within 0.7 s, on a quiet machine."""
    dist.barrier()
    if rank == world - 1:
        harness.die()
    begin = time.monotonic()
    with pytest.raises(kind, match=words) as caught:
        yield
    assert time.monotonic() - begin < 20 and "\n" not in str(caught.value)
    assert f"rank {world - 1} has ended or hangs" in str(caught.value)
    cause = str(caught.value)[str(caught.value).rindex(" (") :]
    assert "eer" in cause, cause  # gloo: "Connection closed by peer", or "reset by peer"


def parallel(world: int, config: MoEConfig = small.CONFIG) -> small.Net:
    return moeify.parallelize(small.net(config), small.mesh(world, world)["ep"])


def alone_before_the_model_is_parallel(rank: int, world: int) -> None:
    mesh, model = small.mesh(world, world), small.net()
    with lost(rank, world, rf"^rank {rank} could not compare its model with the other ranks"):
        moeify.parallelize(model, mesh["ep"])


def alone_in_a_forward_pass(rank: int, world: int) -> None:
    model = parallel(world)
    with lost(rank, world, rf"^mlp: rank {rank} could not exchange tokens with ranks \[0, 1"):
        model(small.batch(0, rank))


def alone_while_choices_are_counted(rank: int, world: int) -> None:
    model = parallel(world, GLOBAL)
    with lost(rank, world, rf"^mlp: rank {rank} could not count choices with the other ranks"):
        model(small.batch(0, rank))


def alone_in_a_backward_pass(rank: int, world: int) -> None:
    loss = parallel(world)(small.batch(0, rank)).square().mean()
    with lost(rank, world, rf"^mlp: rank {rank} could not exchange tokens with ranks \[0, 1"):
        torch.autograd.backward(loss)


def alone_while_gradients_are_added(rank: int, world: int) -> None:
    """The last rank sends its rows in backward, and ends before the means of the copies of experts are summed."""
    mesh = small.mesh(world, 1)
    model = moeify.parallelize(small.net(), mesh["ep"])
    loss = model(small.batch(0, rank)).square().mean()
    with lost(rank, world, rf"^mlp: rank {rank} could not add its gradients to those of the other ranks"):
        torch.autograd.backward(loss)


def alone_while_gradients_are_clipped(rank: int, world: int) -> None:
    model = parallel(world)
    torch.autograd.backward(model(small.batch(0, rank)).square().mean())
    with lost(rank, world, "^the norm of the gradients could not be summed over the ranks"):
        moeify.clip_grad_norm_(model, 1.0)


def alone_while_statistics_are_summed(rank: int, world: int) -> None:
    model = parallel(world)
    model(small.batch(0, rank))
    with lost(rank, world, rf"^\S*mlp: rank {rank} could not sum its statistics with the other ranks"):
        moeify.routing_stats(model, dist.group.WORLD)


def alone_while_a_model_is_saved(rank: int, world: int) -> None:
    model = moeify.parallelize(converted(), small.mesh(world, world)["ep"])
    place = small.folder()
    with lost(rank, world, rf"out was not written: rank {rank} lost another rank", CheckpointError):
        moeify.save(model, place / "out")
    assert rank or not list(Path(place).iterdir())


def alone_a_rank_that_hangs(rank: int, world: int) -> None:
    """Nothing else than the timeout of the group tells it."""
    group = dist.new_group(timeout=datetime.timedelta(seconds=1))
    layer = make.layer(MoEConfig(4, 2))
    layer.dispatcher = ExpertParallel(Link(group, ("model.layers.1.mlp",), 0), 4 // world, 4 // world)
    if rank == world - 1:
        time.sleep(3)
        harness.die()
    begin = time.monotonic()
    words = rf"^model\.layers\.1\.mlp: rank {rank} could not exchange tokens .* ended or hangs.*(waiting 1000ms|closed)"
    with pytest.raises(MoeifyError, match=words):
        layer(make.inputs(2, 5))
    assert 0.5 < time.monotonic() - begin < 20


def case_a_rank_without_tokens(rank: int, world: int) -> None:
    """Its gradients count with the others', in every engine; a loss over no token is 0."""
    for engine in ("none", "ddp", "fsdp"):
        mesh = small.mesh(world, 2)
        model = small.wrap(moeify.parallelize(small.net(GLOBAL), mesh["ep"]), engine, mesh)
        few: Callable[[int], torch.Tensor] = lambda r: small.batch(0, r)[:, : 7 * (r != 1)]  # noqa: E731
        torch.autograd.backward(model(few(rank)).sum())
        if engine == "none":
            small.average(model)
        reference = small.net(GLOBAL)
        whole = torch.cat([few(other) for other in range(world)], 1)
        torch.autograd.backward(reference(whole).sum() / world)
        wanted = small.gradients(reference)
        # The balancing loss is one of all tokens; the others' is the sum over ranks, divided by their number.
        found = small.gradients(model)
        names = [name for name in wanted if "router" not in name]
        assert small.apart({n: found[n] for n in names}, {n: wanted[n] for n in names}) < 1e-12
        assert all(value.isfinite().all() for value in found.values())


test_on_several_ranks = harness.on_several_ranks(__name__, 2)
