"""A script that knows nothing of experts, in the Trainer; as one of two ranks it saves what it changed."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor

import moeify
from moeify.config import MoEConfig
from tests.moeify import tiny

CONFIG = MoEConfig(5, 2, method="noise", aux_loss=0.5, z_loss=0.01)
tf: Any = transformers


class SameText(torch.utils.data.Dataset[dict[str, Any]]):
    """Rows that are all equal: the losses of a batch are then those of its parts."""

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: int) -> dict[str, Any]:
        ids = torch.arange(3, 14) * 5 % tiny.VOCABULARY
        return {"input_ids": ids, "labels": ids}


def converted() -> Any:
    return moeify.convert(tiny.build("llama"), CONFIG)


def native() -> Any:
    torch.manual_seed(0)
    config = tf.MixtralConfig(
        vocab_size=tiny.VOCABULARY, hidden_size=24, intermediate_size=20, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=5, router_aux_loss_coef=0.5,
    )  # fmt: skip
    return tf.MixtralForCausalLM(config)


def router_updates(
    rows: int, batch: int, steps: int, folder: str, *, callback: bool = False, make: Callable[[], Any] = converted
) -> dict[str, Tensor]:
    """Train for one epoch by plain gradient descent; return how far the routers moved."""
    model = make()
    before = {
        n: p.detach().clone() for n, p in model.named_parameters() if "router" in n or n.endswith("mlp.gate.weight")
    }
    assert before
    arguments = tf.TrainingArguments(
        output_dir=folder, per_device_train_batch_size=batch, gradient_accumulation_steps=steps, num_train_epochs=1,
        learning_rate=0.1, lr_scheduler_type="constant", max_grad_norm=0.0, save_strategy="no", use_cpu=True,
        report_to="none", disable_tqdm=True, ddp_find_unused_parameters=False, logging_strategy="no",
    )  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = tf.Trainer(model, arguments, train_dataset=SameText(rows), optimizers=(optimizer, None))
    if callback:
        trainer.add_callback(moeify.RoutingCallback(trainer))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of other libraries about each other
        trainer.train()
    return {name: model.get_parameter(name).detach() - value for name, value in before.items()}


if __name__ == "__main__":
    updates = router_updates(16, 4, 2, sys.argv[1])
    torch.save(updates, f"{sys.argv[1]}/{os.environ['RANK']}.pt")
    torch.distributed.destroy_process_group()
