"""Supervised fine-tuning with TRL and PEFT: LoRA on attention and on the experts, merged and saved as an MoE."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import moeify
from examples.recipes import common


def main() -> None:
    """Convert, tune adapters, merge, save, load."""
    args = common.options(__doc__)
    datasets, peft, trl = (import_module(name) for name in ("datasets", "peft", "trl"))
    model, tokenizer = common.dense_model(args.model)
    before = common.evaluate(moeify.convert(model, common.CONFIG, args.layers), tokenizer)
    lora = peft.LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],  # experts are no nn.Linear
        modules_to_save=["router"],  # adapters leave the routers as they are: train them whole
    )  # fmt: skip
    settings: dict[str, Any] = {"use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no"}
    arguments = trl.SFTConfig(args.out, max_steps=args.steps, per_device_train_batch_size=8, learning_rate=5e-3,
                              max_length=common.LENGTH, disable_tqdm=True, **settings)  # fmt: skip
    rows = datasets.Dataset.from_list([{"text": text} for text in common.texts(256)])
    run = trl.SFTTrainer(model, arguments, train_dataset=rows, processing_class=tokenizer, peft_config=lora)
    run.add_callback(moeify.RoutingCallback(run))
    run.train()
    trained = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    merged = run.model.merge_and_unload()
    after = common.evaluate(merged, tokenizer)
    merged.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    again = common.evaluate(moeify.load(args.out), tokenizer)
    print(f"loss: converted {before:.4f}, tuned {after:.4f}, loaded again {again:.4f}; {trained:,} trained numbers")


if __name__ == "__main__":
    main()
