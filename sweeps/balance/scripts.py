"""Training scripts that know nothing of experts."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

tf: Any = transformers
STEPS, ROWS, LENGTH, RATE = 60, 8, 64, 1e-3
Script = Callable[[Any, Tensor, int, Path], None]
"""A model, rows of token ids, the micro-batches of a step, and a folder to write into."""


def loop(model: Any, rows: Tensor, accumulated: int, folder: Path) -> None:
    """Take the loss that the model returns."""
    _steps(model, rows, accumulated, lambda ids: model(input_ids=ids, labels=ids).loss)


def own_loss(model: Any, rows: Tensor, accumulated: int, folder: Path) -> None:
    """Compute the loss from the logits."""

    def loss(ids: Tensor) -> Tensor:
        logits = model(input_ids=ids).logits[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())

    _steps(model, rows, accumulated, loss)


def _steps(model: Any, rows: Tensor, accumulated: int, loss: Callable[[Tensor], Tensor]) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    model.train()
    for step in torch.split(rows, ROWS):
        for part in step.chunk(accumulated):
            (loss(part) / accumulated).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()


def accelerate(model: Any, rows: Tensor, accumulated: int, folder: Path) -> None:
    """Let accelerate accumulate."""
    accelerator = import_module("accelerate").Accelerator(cpu=True, gradient_accumulation_steps=accumulated)
    model, optimizer = accelerator.prepare(model.train(), torch.optim.AdamW(model.parameters(), lr=RATE))
    for part in torch.split(rows, ROWS // accumulated):
        with accelerator.accumulate(model):
            accelerator.backward(model(input_ids=part, labels=part).loss)
            optimizer.step()
            optimizer.zero_grad()


def trainer(model: Any, rows: Tensor, accumulated: int, folder: Path) -> None:
    """Use transformers' Trainer, without a callback."""
    data: Any = [{"input_ids": row, "labels": row} for row in rows]
    tf.Trainer(model, tf.TrainingArguments(**_arguments(accumulated, folder)), train_dataset=data).train()


def sft(model: Any, rows: Tensor, accumulated: int, folder: Path) -> None:
    """Use TRL's SFTTrainer."""
    trl, datasets = import_module("trl"), import_module("datasets")
    from sweeps.ecosystem.models import tokenizer

    data = datasets.Dataset.from_list([{"input_ids": row.tolist()} for row in rows])
    arguments = trl.SFTConfig(**_arguments(accumulated, folder), max_length=LENGTH)
    trl.SFTTrainer(model, args=arguments, train_dataset=data, processing_class=tokenizer()).train()


def _arguments(accumulated: int, folder: Path) -> dict[str, Any]:
    return {"output_dir": str(folder), "max_steps": STEPS, "per_device_train_batch_size": ROWS // accumulated,
            "gradient_accumulation_steps": accumulated, "learning_rate": RATE, "use_cpu": True, "bf16": False,
            "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "logging_strategy": "no"}  # fmt: skip


SCRIPTS: dict[str, Script] = {
    "loop": loop,
    "loop with a loss of its own": own_loss,
    "accelerate": accelerate,
    "Trainer": trainer,
    "SFTTrainer": sft,
}
