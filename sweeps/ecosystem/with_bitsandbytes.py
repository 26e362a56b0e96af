"""bitsandbytes on the CPU: 8-bit optimizer state is for GPUs, 4-bit weights are not."""

from __future__ import annotations

from typing import Any

import torch

from sweeps.ecosystem.check import CONVERTED, NATIVE, Check
from sweeps.ecosystem.models import Subject, batch, library, logits
from sweeps.ecosystem.quantized import all_of, expert_linears, judge


def attention_in_4_bits(subject: Subject) -> None:
    """Load with 4-bit linear layers, and train an adapter on them: QLoRA."""
    peft = library("peft")

    expected = logits(subject.load())
    judge(subject.load(quantization_config=_config()), expected, 4)
    model = subject.load(quantization_config=_config())  # on CPUs, evaluating packs weights for good
    linear = {type(m).__name__ for path, m in model.named_modules() if path.endswith(("q_proj", "c_attn"))}
    assert linear == {"Linear4bit"}, f"attention is {linear}"
    targets = ["c_attn"] if subject.name == "gpt2" else ["q_proj", "v_proj"]
    wrapped: Any = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=targets))
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = wrapped.train()(**batch()).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0], f"the loss went from {losses[0]:.3f} to {losses[-1]:.3f}"


def experts_in_4_bits(subject: Subject) -> None:
    """Load with 4-bit experts."""
    expected = logits(subject.load())
    model = subject.load(quantization_config=_config())
    all_of(expert_linears(model).values(), "Linear4bit")
    judge(model, expected, 4)


def experts_in_4_bits_linearized(subject: Subject) -> None:
    """Save the experts as linear layers, and load those with 4-bit experts."""
    model = subject.linearized()
    expected = logits(model)
    model.save_pretrained(subject.scratch / "linear")
    model = subject.load(subject.scratch / "linear", quantization_config=_config())
    all_of(expert_linears(model).values(), "Linear4bit")
    judge(model, expected, 4)


def _config() -> Any:
    BitsAndBytesConfig = library("transformers").BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)


CHECKS = (
    Check("bitsandbytes", "`from_pretrained` in 4 bits (nf4), LoRA on top, twelve steps", attention_in_4_bits),
    Check("bitsandbytes", "`from_pretrained` in 4 bits (nf4), experts too", experts_in_4_bits, CONVERTED + NATIVE[:1],
          "moeify.linearize(model).save_pretrained(path), once", experts_in_4_bits_linearized,
          issue="bitsandbytes-foundation/bitsandbytes#1849"),
)  # fmt: skip
