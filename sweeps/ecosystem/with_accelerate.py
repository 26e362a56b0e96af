"""accelerate: preparing, stepping, saving and loading the state; two processes with DDP, and with FSDP2."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch

from moeify.measure import TOLERANCE, relative_difference
from sweeps.ecosystem.check import Check
from sweeps.ecosystem.models import Subject, batch, library, logits, run_processes


def state(subject: Subject) -> None:
    """Prepare, step, save the state, step on, and step on again from the saved state."""
    Accelerator = library("accelerate").Accelerator

    accelerator = Accelerator(cpu=True)
    model: Any = subject.load().train()
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-3))

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        accelerator.backward(model(**batch(), output_router_logits=True).loss)
        optimizer.step()
        return logits(accelerator.unwrap_model(model))

    first = step()
    accelerator.save_state(str(subject.scratch / "state"), safe_serialization=True)
    second = step()
    accelerator.load_state(str(subject.scratch / "state"))
    again = step()
    assert relative_difference(second, first) > 1e-4, "a step changes nothing"
    assert relative_difference(again, second) <= TOLERANCE["float32"], "from the saved state it goes on otherwise"


def ddp(subject: Subject) -> None:
    """Take two steps in two processes and compare with one."""
    _two_processes(subject, "ddp")


def fsdp2(subject: Subject) -> None:
    """Take two steps in two processes that share the weights, and compare with one."""
    _two_processes(subject, "fsdp2")


def _two_processes(subject: Subject, way: str) -> None:
    run_processes(2, "sweeps.ecosystem.with_accelerate", way, subject.name, subject.path, subject.scratch)
    model: Any = subject.load().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        (sum(model(**part).loss for part in _halves()) / 2).backward()
        optimizer.step()
    there = torch.load(subject.scratch / "weights.pt")
    for name, value in model.state_dict().items():
        assert relative_difference(there[name], value) <= TOLERANCE["float32"], f"{name} is not that of one process"


def _halves() -> list[dict[str, torch.Tensor]]:
    whole = batch()
    return [{name: value.chunk(2)[rank] for name, value in whole.items()} for rank in range(2)]


def one_of_two(way: str, subject: Subject) -> None:
    """Do what one of the two processes does."""
    Accelerator = library("accelerate").Accelerator
    FullyShardedDataParallelPlugin = library("accelerate").FullyShardedDataParallelPlugin

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False,
        state_dict_type="FULL_STATE_DICT",
    ) if way == "fsdp2" else None  # fmt: skip
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    model: Any = subject.load().train()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    for _ in range(2):
        optimizer.zero_grad()
        accelerator.backward(model(**_halves()[accelerator.process_index]).loss)
        optimizer.step()
    weights = accelerator.get_state_dict(model)
    if accelerator.is_main_process:
        torch.save(weights, subject.scratch / "weights.pt")
    accelerator.wait_for_everyone()
    os._exit(0)  # without tearing gloo down, where the slower process may wait for the other for ever


CHECKS = (
    Check("accelerate", "`prepare`, a step, `save_state`, `load_state`, the same step again", state),
    Check("accelerate", "DDP in two processes (gloo), two steps: the weights of one process", ddp),
    Check("accelerate", "FSDP2 in two processes (gloo), two steps: the weights of one process", fsdp2),
)

if __name__ == "__main__":
    one_of_two(sys.argv[1], Subject(sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4])))
