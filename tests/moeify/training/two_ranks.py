"""One of two data-parallel ranks: accumulates two micro-batches, steps, saves its selection bias and a global loss."""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed as dist

import moeify
from moeify.config import MoEConfig
from tests.moeify.layers import make

GLOBAL = MoEConfig(5, 2, balance_level="global", divide_loss_by_top_k=True)


def main(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", world_size=2, rank=rank)
    step(rank, folder)  # what holds the group is gone when the group is destroyed
    dist.barrier()
    dist.destroy_process_group()


def step(rank: int, folder: str) -> None:
    model: Any = torch.nn.parallel.DistributedDataParallel(make.layer(make.CONFIGS["deepseek_v3"]))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    moeify.attach_bias_update(model, optimizer)
    with model.no_sync():
        torch.autograd.backward(model(make.inputs(2, 5, seed=10 + rank)).square().mean())
    torch.autograd.backward(model(make.inputs(3, 7, seed=rank)).square().mean())
    optimizer.step()
    torch.save(model.module.router.selection_bias, f"{folder}/{rank}.pt")
    layer = make.layer(GLOBAL)
    layer(make.inputs(3, 7, seed=rank))
    torch.save(layer.losses()["balance"].detach(), f"{folder}/loss{rank}.pt")


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
