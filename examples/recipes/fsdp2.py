"""Full fine-tuning with FSDP2 on two processes (gloo, on CPUs), saved half way by every rank and resumed.

On GPUs leave out "gloo" and start it with torchrun.
"""

from __future__ import annotations

import shutil
import sys
from argparse import Namespace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from torch import multiprocessing
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load as load_sharded
from torch.distributed.checkpoint.state_dict_saver import save as save_sharded
from torch.distributed.fsdp import fully_shard

import moeify
from examples.recipes import common

RANKS = 2


def main() -> None:
    """Start the processes."""
    args = common.options(__doc__)
    with TemporaryDirectory() as folder:
        processes: Any = multiprocessing
        processes.start_processes(train, (args, folder), nprocs=RANKS, start_method="spawn")


def train(rank: int, args: Namespace, folder: str) -> None:
    """Train on this rank; then throw the model away, and go on with what was saved."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=RANKS)
    try:
        model, optimizer, tokenizer = sharded(args)
        losses = steps(rank, model, optimizer, tokenizer, range(args.steps))
        save(model, optimizer, folder)
        through = steps(rank, model, optimizer, tokenizer, range(args.steps, args.steps + 2))
        model, optimizer, tokenizer = sharded(args)
        resume(model, optimizer, folder)
        resumed = steps(rank, model, optimizer, tokenizer, range(args.steps, args.steps + 2))
        whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        if rank == 0:
            result = moeify.convert(common.dense_model(args.model)[0], common.CONFIG, args.layers)
            result.load_state_dict(whole)
            shutil.rmtree(args.out, ignore_errors=True)
            untyped: Any = result
            untyped.save_pretrained(args.out)
            print(f"loss: first step {losses[0]:.4f}, after {args.steps} steps {losses[-1]:.4f}")
            print(f"two steps more: {through[-1]:.6f}, resumed in a new model: {resumed[-1]:.6f}")
            sys.stdout.flush()
    finally:
        dist.destroy_process_group()


def sharded(args: Namespace) -> tuple[Any, torch.optim.Optimizer, Any]:
    """Convert, then wrap: each decoder layer is a unit, and so is the whole."""
    torch.manual_seed(0)
    model, tokenizer = common.dense_model(args.model)
    moeify.convert(model, common.CONFIG, args.layers)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    return model.train(), torch.optim.AdamW(model.parameters(), lr=1e-3), tokenizer


def steps(rank: int, model: Any, optimizer: torch.optim.Optimizer, tokenizer: Any, which: range) -> list[float]:
    """Train; each rank has rows of its own. Return the losses, of all ranks."""
    losses = []
    for step in which:
        loss = model(**common.batch(tokenizer, common.texts(8, start=8 * (RANKS * step + rank)))).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        mean = loss.detach()
        dist.all_reduce(mean)
        losses.append(float(mean) / RANKS)
    return losses


def save(model: Any, optimizer: torch.optim.Optimizer, folder: str) -> None:
    """Write the shards of all ranks."""
    weights, state = get_state_dict(model, optimizer)
    save_sharded({"model": weights, "optimizer": state}, checkpoint_id=Path(folder) / "half")


def resume(model: Any, optimizer: torch.optim.Optimizer, folder: str) -> None:
    """Read them into a model that is sharded alike."""
    weights, state = get_state_dict(model, optimizer)
    load_sharded({"model": weights, "optimizer": state}, checkpoint_id=Path(folder) / "half")
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)


if __name__ == "__main__":
    main()
