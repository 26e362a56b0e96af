"""Transformers' Trainer on two ranks that share the experts, against one process, with rows of unequal lengths."""

from __future__ import annotations

import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from transformers.distributed.configuration_utils import DistributedConfig

import moeify
from moeify import routers
from moeify.config import MoEConfig
from tests.moeify import tiny
from tests.moeify.parallel import harness, small

tf: Any = transformers
ATTACHED = MoEConfig(8, 2, method="noise", aux_loss=0.5, z_loss=0.01, balance_level="global", attach_losses=True)
BIASED = MoEConfig(8, 2, method="noise", router=routers.Sigmoid(bias_rate=1e-2), aux_loss=0.1, balance_level="global")
# The settings, micro-batches of a step, and whether the losses are part of the model's.
RUNS = {"attached": (ATTACHED, 1, False), "accumulated": (ATTACHED, 2, False), "biased": (BIASED, 1, True)}


class Texts(torch.utils.data.Dataset[dict[str, Any]]):
    """Rows of 5 to 15 tokens, padded."""

    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> dict[str, Any]:
        ids = torch.randint(3, tiny.VOCABULARY, (15,), generator=torch.Generator().manual_seed(index))
        mask = torch.ones_like(ids)
        mask[15 - 5 * index % 11 :] = 0
        return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def saved(place: Path, config: MoEConfig) -> Path:
    torch.manual_seed(0)
    model: Any = moeify.convert(tiny.build("llama"), config)
    model.save_pretrained(place)
    return place


def logged(name: str, model: Any, rows: int) -> list[float]:
    """Train for three steps; return what the Trainer prints."""
    warnings.simplefilter("ignore")  # of other libraries about each other
    _, steps, part = RUNS[name]
    model.config.output_router_logits = part
    with tempfile.TemporaryDirectory() as folder:
        arguments = tf.TrainingArguments(
            output_dir=folder, per_device_train_batch_size=rows, gradient_accumulation_steps=steps, max_steps=3,
            logging_steps=1, seed=7, learning_rate=0.05, max_grad_norm=0.5, optim="sgd", save_strategy="no",
            use_cpu=True, report_to="none", disable_tqdm=True,
        )  # fmt: skip
        trainer = tf.Trainer(model=model, args=arguments, train_dataset=Texts())
        trainer.add_callback(moeify.RoutingCallback(trainer))
        trainer.train()
    names = ("loss", "grad_norm", "moe_load_max", "moe_entropy")
    return [entry[key] for entry in trainer.state.log_history for key in names if key in entry]


def before() -> dict[str, list[float]]:
    """What one process prints, with the rows of both ranks in a batch."""
    found = {}
    for name, (config, *_) in RUNS.items():
        with tempfile.TemporaryDirectory() as folder:
            found[name] = logged(name, moeify.load(saved(Path(folder), config), dtype=torch.float32), 4)
    return found


def compare(rank: int, world: int, engine: str) -> None:
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "1"}  # accelerate asks for them, and needs none
    for name, wanted in harness.found_before().items():
        place = small.folder()
        if rank == 0:
            saved(place, RUNS[name][0])
        dist.barrier()
        sizes = DistributedConfig(fsdp_size=world, ep_size=world) if engine == "transformers" else None
        model = moeify.load(place, dtype=torch.float32, distributed_config=sizes)
        if sizes is None:
            moeify.parallelize(model, small.mesh(world, world)["ep"])
        assert logged(name, model, 4 // world) == pytest.approx(wanted, rel=1e-5), (name, engine)
        small.remove(place)


if harness.HAS_EXPERT_PARALLEL:

    def case_under_transformers_engine(rank: int, world: int) -> None:
        compare(rank, world, "transformers")


def case_under_parallelize(rank: int, world: int) -> None:
    compare(rank, world, "moeify")


test_on_several_ranks = harness.on_several_ranks(__name__, 2)
