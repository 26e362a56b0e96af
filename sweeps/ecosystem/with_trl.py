"""TRL's trainers on small models."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch

from sweeps.ecosystem.check import CONVERTED, NATIVE, Check
from sweeps.ecosystem.models import Subject, library, words

COMMON = {"per_device_train_batch_size": 4, "logging_steps": 1, "learning_rate": 1e-2, "use_cpu": True, "bf16": False,
          "report_to": "none", "save_strategy": "no", "disable_tqdm": True}  # fmt: skip


def sft(subject: Subject) -> None:
    """Train two steps with the balancing loss that TRL's own option asks for."""
    datasets = library("datasets")
    trl = library("trl")

    arguments = trl.SFTConfig(
        str(subject.scratch), max_steps=2, gradient_accumulation_steps=2, router_aux_loss_coef=0.01, **COMMON
    )
    data = datasets.Dataset.from_list([{"text": text} for text in words()])
    logged = _train(trl.SFTTrainer, subject, arguments, data)
    assert all(0 < entry["aux_loss"] < 50 for entry in logged), "no aux_loss was logged"


def dpo(subject: Subject) -> None:
    """Take two steps of direct preference optimization."""
    datasets = library("datasets")
    trl = library("trl")

    arguments = trl.DPOConfig(str(subject.scratch), max_steps=2, router_aux_loss_coef=0.01, **COMMON)
    texts = words()
    data = [{"prompt": a, "chosen": f" {b}", "rejected": " w1 w2"} for a, b in pairwise(texts)]
    _train(trl.DPOTrainer, subject, arguments, datasets.Dataset.from_list(data))


def grpo(subject: Subject) -> None:
    """Generate, reward and take two steps."""
    datasets = library("datasets")
    trl = library("trl")

    arguments = trl.GRPOConfig(
        str(subject.scratch), max_steps=2, num_generations=4, max_completion_length=8, router_aux_loss_coef=0.01,
        **COMMON,
    )  # fmt: skip
    data = datasets.Dataset.from_list([{"prompt": text} for text in words()])
    _train(trl.GRPOTrainer, subject, arguments, data, reward_funcs=_reward)


def _reward(completions: list[str], **_: Any) -> list[float]:
    """Return a reward that differs between completions."""
    return [float(sum(map(ord, text)) % 7) for text in completions]


def _train(trainer: Any, subject: Subject, arguments: Any, data: Any, **options: Any) -> list[dict[str, float]]:
    """Train, and look whether the loss is finite and the routers learned."""
    model = subject.load()
    before = _routers(model)
    run = trainer(model, args=arguments, train_dataset=data, processing_class=subject.tokenizer(), **options)
    run.train()
    logged = [entry for entry in run.state.log_history if "loss" in entry]
    assert logged and all(math.isfinite(entry["loss"]) for entry in logged), "the loss is not finite"
    after = _routers(model)
    assert before and all(not torch.equal(after[name], value) for name, value in before.items()), "routers stayed"
    return logged


def _routers(model: Any) -> dict[str, torch.Tensor]:
    names = ("router.weight", "gate.weight")
    return {name: value.detach().clone() for name, value in model.named_parameters() if name.endswith(names)}


CHECKS = (
    Check("trl", "`SFTTrainer`, two steps, with `router_aux_loss_coef` and accumulation", sft, CONVERTED + NATIVE),
    Check("trl", "`DPOTrainer`, two steps, with `router_aux_loss_coef`", dpo),
    Check("trl", "`GRPOTrainer`, two steps of generation and training, with `router_aux_loss_coef`", grpo),
)
