"""Expert parallelism in FSDP2: four processes (gloo, on CPUs), of which each two share the experts.

On GPUs leave out "gloo" and start it with torchrun.
"""

from __future__ import annotations

import shutil
import sys
from argparse import Namespace
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from torch import multiprocessing
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard

import moeify
from examples.recipes import common
from moeify.layers import MoELayer

RANKS, SHARING = 4, 2


def main() -> None:
    """Convert once, save, and start the processes."""
    args = common.options(__doc__)
    with TemporaryDirectory() as folder:
        model, tokenizer = common.dense_model(args.model)
        converted: Any = moeify.convert(model, common.CONFIG, args.layers)
        converted.save_pretrained(folder)
        del model, converted
        processes: Any = multiprocessing
        processes.start_processes(train, (args, folder, tokenizer), nprocs=RANKS, start_method="fork")
        again = common.evaluate(moeify.load(args.out), tokenizer)
        print(f"loaded again {again:.4f}")


def train(rank: int, args: Namespace, folder: str, tokenizer: Any) -> None:
    """Train on this rank, and save with the others."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=RANKS)
    model = sharded(folder)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for step in range(args.steps):
        loss = model(**common.batch(tokenizer, common.texts(4, start=4 * (RANKS * step + rank)))).loss
        optimizer.zero_grad()
        loss.backward()
        moeify.clip_grad_norm_(model, 1.0)
        optimizer.step()
        dist.all_reduce(mean := loss.detach() / RANKS)
        losses.append(float(mean))
    trained = common.evaluate(model, tokenizer)
    if rank == 0:
        shutil.rmtree(args.out, ignore_errors=True)
    dist.barrier()
    moeify.save(model, args.out)
    if rank == 0:
        print(f"loss: first step {losses[0]:.4f}, last step {losses[-1]:.4f}, trained {trained:.4f}")
        sys.stdout.flush()
    dist.barrier()


def sharded(folder: str) -> Any:
    """Share the experts among ranks; then shard them over their copies, and everything else over all ranks."""
    model: Any = moeify.load(folder, dtype=torch.float32).train()
    mesh = init_device_mesh("cpu", (RANKS // SHARING, SHARING), mesh_dim_names=("efsdp", "ep"))
    moeify.parallelize(model, mesh["ep"])
    everyone = mesh._flatten("dp")
    for layer in model.model.layers:
        if isinstance(layer.mlp, MoELayer):
            fully_shard(layer.mlp.experts, mesh=mesh["efsdp"], shard_placement_fn=lambda _: Shard(1))
            fully_shard(layer.mlp.router, mesh=everyone, reshard_after_forward=False)
        fully_shard(layer, mesh=everyone)
    fully_shard(model, mesh=everyone)
    return model


if __name__ == "__main__":
    main()
