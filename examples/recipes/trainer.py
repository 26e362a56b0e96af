"""Transformers' Trainer: an unchanged script trains a converted model balanced, and logs how its experts are used."""

from __future__ import annotations

from typing import Any

from transformers import Trainer, TrainingArguments

import moeify
from examples.recipes import common


def main() -> None:
    """Convert, train with checkpoints, resume from the last one, evaluate."""
    args = common.options(__doc__)
    model, tokenizer = common.dense_model(args.model)
    before = common.evaluate(moeify.convert(model, common.CONFIG, args.layers), tokenizer)
    rows = common.batch(tokenizer, common.texts(256))
    data: Any = [{name: values[i] for name, values in rows.items()} for i in range(256)]

    def trainer(steps: int) -> Trainer:
        settings: dict[str, Any] = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "logging_steps": 1}
        arguments = TrainingArguments(
            args.out, max_steps=steps, per_device_train_batch_size=8, gradient_accumulation_steps=2, learning_rate=1e-3,
            save_steps=max(1, args.steps // 2), **settings,
        )  # fmt: skip
        run = Trainer(model, arguments, train_dataset=data)
        run.add_callback(moeify.RoutingCallback(run))
        return run

    trainer(args.steps).train()
    run = trainer(args.steps + 2)
    run.train(resume_from_checkpoint=True)
    busiest = next(entry["moe_load_max"] for entry in reversed(run.state.log_history) if "moe_load_max" in entry)
    print(
        f"loss: converted {before:.4f}, trained {common.evaluate(model, tokenizer):.4f}; steps {run.state.global_step}"
    )
    print(f"busiest expert: {busiest:.0%}")


if __name__ == "__main__":
    main()
