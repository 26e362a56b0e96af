"""A rank that ends while the others wait for its tokens."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

from moeify.config import MoEConfig
from moeify.errors import MoeifyError
from moeify.parallel.dispatcher import ExpertParallel
from moeify.parallel.exchange import Link
from tests.moeify.layers import make
from tests.moeify.parallel import harness


def case_the_gradient_of_an_exchange_goes_back(rank: int, world: int) -> None:
    link = Link(_everyone(), ("layer",), 0)
    x = torch.arange(6.0, dtype=torch.float64).view(3, 2).add(10 * rank).requires_grad_()
    sent, received = ([3, 0], [3, 1]) if rank == 0 else ([1, 2], [0, 2])
    got = link.exchange(x, sent, received)
    assert got.shape[0] == (4 if rank == 0 else 2)
    assert got[:, 0].tolist() == ([0, 2, 4, 10] if rank == 0 else [12, 14])
    torch.autograd.backward(got.square().sum())
    assert x.grad is not None and x.grad.equal(2 * x.detach())


def alone_the_others_end_soon_and_say_where(rank: int, world: int) -> None:
    """The last rank ends without a word, as after a crash."""
    layer = make.layer(MoEConfig(4, 2))
    layer.dispatcher = ExpertParallel(Link(_everyone(), ("model.layers.1.mlp",), 0), 4 // world, 4 // world)
    dist.barrier()  # gloo connects all ranks first
    if rank == world - 1:
        harness.die()
    begin = time.monotonic()
    with pytest.raises(MoeifyError, match=r"layers\.1\.mlp: rank \d could not exchange tokens with ranks \[0, 1") as e:
        layer(make.inputs(2, 5))
    assert "\n" not in str(e.value) and "(" in str(e.value) and time.monotonic() - begin < 20


def _everyone() -> Any:
    return dist.group.WORLD


test_on_several_ranks = harness.on_several_ranks(__name__, 2)
