"""TRL's SFTTrainer on two processes that share the experts (gloo, on CPUs), against one process with the same rows.

It runs under transformers' engine and under `moeify.parallelize`; on GPUs a script starts with torchrun, and has one.
"""

from __future__ import annotations

import json
import os
from argparse import Namespace
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from torch import multiprocessing
from torch.distributed.device_mesh import init_device_mesh
from transformers.distributed.configuration_utils import DistributedConfig

import moeify
from examples.recipes import common

RANKS, ROWS = 2, 8
CONFIG = replace(common.CONFIG, aux_loss=0.01, balance_level="global", attach_losses=True)


def main() -> None:
    """Convert and save; train alone, and on the ranks with each engine."""
    args = common.options(__doc__)
    import_module("trl.trainer.sft_trainer")  # once: the processes are forks
    processes: Any = multiprocessing
    with TemporaryDirectory() as folder:
        model, tokenizer = common.dense_model(args.model)
        converted: Any = moeify.convert(model, CONFIG, args.layers)
        converted.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        del model, converted
        for engine, ranks in (("one process", 1), ("transformers", RANKS), ("parallelize", RANKS)):
            processes.start_processes(train, (args, folder, engine, ranks), nprocs=ranks, start_method="fork")
    print(f"{RANKS} ranks: the losses of one process")


def train(rank: int, args: Namespace, folder: str, engine: str, ranks: int) -> None:
    """Train on this rank; the first one prints the losses."""
    torch.set_num_threads(1)
    if ranks > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "localhost",
                       "MASTER_PORT": "1"}  # fmt: skip
        dist.init_process_group("gloo", init_method=f"file://{folder}/{engine}", rank=rank, world_size=ranks)
    losses = tuned(load(folder, engine, ranks), args, folder, ROWS // ranks)
    if rank == 0:
        print(f"{engine}: {' '.join(f'{loss:.4f}' for loss in losses)}", flush=True)
        known = Path(folder) / "losses"
        if ranks == 1:
            known.write_text(json.dumps(losses))
        wanted = torch.tensor(json.loads(known.read_text()))
        torch.testing.assert_close(torch.tensor(losses), wanted, rtol=1e-5, atol=0.0)
    if ranks > 1:
        dist.barrier()


def load(folder: str, engine: str, ranks: int) -> Any:
    """Load the converted model, whole or this rank's part of it."""
    if engine == "transformers":
        sizes = DistributedConfig(fsdp_size=ranks, ep_size=ranks)
        return moeify.load(folder, dtype=torch.float32, distributed_config=sizes)
    model = moeify.load(folder, dtype=torch.float32)
    if engine == "parallelize":
        mesh = init_device_mesh("cpu", (1, ranks), mesh_dim_names=("efsdp", "ep"))
        moeify.parallelize(model, mesh["ep"])
    return model


def tuned(model: Any, args: Namespace, folder: str, rows: int) -> list[float]:
    """Train with TRL; return the loss of each step."""
    datasets, trl, tf = (import_module(name) for name in ("datasets", "trl", "transformers"))
    settings: dict[str, Any] = {"use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no"}
    arguments = trl.SFTConfig(args.out, max_steps=args.steps, per_device_train_batch_size=rows, learning_rate=0.05,
                              max_length=common.LENGTH, disable_tqdm=True, logging_steps=1, optim="sgd",
                              router_aux_loss_coef=0.0,  # TRL's own looks at one rank; the layers balance themselves
                              **settings)  # fmt: skip
    texts = datasets.Dataset.from_list([{"text": text[: 12 + 5 * i % 19]} for i, text in enumerate(common.texts(256))])
    tokenizer = tf.AutoTokenizer.from_pretrained(folder)
    run = trl.SFTTrainer(model, arguments, train_dataset=texts, processing_class=tokenizer)
    run.add_callback(moeify.RoutingCallback(run))
    run.train()
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


if __name__ == "__main__":
    main()
