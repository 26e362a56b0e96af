"""A small model with two MoE layers, and training steps on one rank and on several."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel

from moeify.config import MoEConfig
from moeify.layers import Experts, SparseMoE

HIDDEN, INNER, EXPERTS = 8, 8, 8
CONFIG = MoEConfig(EXPERTS, 2, capacity_factor=1.0, shared_experts=1, aux_loss=0.0)


class Block(nn.Module):
    def __init__(self, config: MoEConfig) -> None:
        super().__init__()

        def experts(count: int) -> Experts:
            return Experts(HIDDEN, INNER, num_experts=count, activation="silu", gated=True, up_rows=2 * INNER)

        self.dense = nn.Linear(HIDDEN, HIDDEN)
        shared = experts(config.shared_experts) if config.shared_experts else None
        self.mlp = SparseMoE(config.router.module(HIDDEN, config), experts(config.experts), shared, path="mlp")

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dense(x).tanh()
        out: Tensor = x + self.mlp(x)
        return out


class Net(nn.Module):
    def __init__(self, config: MoEConfig = CONFIG) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(config), Block(config)])
        self.head = nn.Linear(HIDDEN, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        out: Tensor = self.head(x)
        return out


def net(config: MoEConfig = CONFIG, seed: int = 0) -> Net:
    made = Net(config).double()
    draw = torch.Generator().manual_seed(seed)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.3, generator=draw)
    return made


def batch(step: int, rank: int) -> Tensor:
    return torch.randn(2, 7, HIDDEN, generator=torch.Generator().manual_seed(100 * step + rank), dtype=torch.float64)


def mesh(world: int, ep: int) -> DeviceMesh:
    return init_device_mesh("cpu", (world // ep, ep), mesh_dim_names=("efsdp", "ep"))


def wrap(model: Any, engine: str, on: DeviceMesh) -> Any:
    if engine == "ddp":
        return DistributedDataParallel(model)
    if engine == "fsdp":
        everyone = on._flatten("dp")
        for layer in model.layers:
            fully_shard(layer.mlp.experts, mesh=on["efsdp"], shard_placement_fn=lambda _: Shard(1))
            fully_shard(layer.mlp.router, mesh=everyone, reshard_after_forward=False)
            fully_shard(layer, mesh=everyone)
        fully_shard(model, mesh=everyone)
    return model


def average(model: nn.Module) -> None:
    """What a script without DDP or FSDP does after backward."""
    for parameter in model.parameters():
        if parameter.grad is not None and not isinstance(parameter, DTensor):
            dist.all_reduce(parameter.grad)
            parameter.grad /= dist.get_world_size()


def full(tensor: Any) -> Tensor:
    whole: Tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole


def gradients(model: nn.Module) -> dict[str, Tensor]:
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    return {name: full(p.grad) for name, p in inner.named_parameters() if p.grad is not None}


def apart(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """The largest relative difference."""
    assert found.keys() == wanted.keys()
    return max(float((found[n] - wanted[n]).abs().max() / wanted[n].abs().max().clamp(min=1e-300)) for n in wanted)


def folder() -> Path:
    """One that all ranks know."""
    names: list[Any] = [tempfile.mkdtemp()]
    dist.broadcast_object_list(names)
    return Path(names[0])


def remove(place: Path) -> None:
    """Remove it when all ranks are done with it."""
    dist.barrier()
    shutil.rmtree(place, ignore_errors=True)
