"""A real model: SmolLM2-135M as an MoE, adapters on it that learn a text, and those adapters in another process."""

from __future__ import annotations

import pydoc_data.topics
from typing import Any

import torch

from moeify.measure import TOLERANCE, relative_difference
from sweeps.ecosystem.check import Check
from sweeps.ecosystem.models import Subject, library, logits, run_python

STEPS, LENGTH = 24, 64


def fine_tune(subject: Subject) -> None:
    """Fine-tune on a page of Python's help; the loss on the last quarter of the steps is below that on the first."""
    peft = library("peft")

    torch.manual_seed(0)
    model: Any = subject.load()
    tokenizer = subject.tokenizer()
    text = "\n".join(pydoc_data.topics.topics.values())
    ids = tokenizer(text[:60000], return_tensors="pt")["input_ids"][0]
    lora = peft.LoraConfig(
        r=8, target_modules=["q_proj", "v_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.router.weight"],
    )  # fmt: skip
    wrapped: Any = peft.get_peft_model(model, lora).train()
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for step in range(STEPS):
        rows = ids[2 * step * LENGTH : 2 * (step + 1) * LENGTH].view(2, LENGTH)
        optimizer.zero_grad()
        loss = wrapped(input_ids=rows, labels=rows, output_router_logits=True).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    quarter = STEPS // 4
    first, last = sum(losses[:quarter]) / quarter, sum(losses[-quarter:]) / quarter
    assert last < first - 0.1, f"the loss went from {first:.2f} to {last:.2f}"
    found = logits(wrapped)
    wrapped.save_pretrained(subject.scratch / "adapter")
    there = subject.scratch / "logits.pt"
    run_python("sweeps.ecosystem.with_peft", subject.name, subject.path, subject.scratch / "adapter", there)
    assert relative_difference(torch.load(there), found) <= TOLERANCE["float32"], "reloaded, it computes otherwise"


CHECKS = (
    Check("peft", f"LoRA on attention, experts and routers, {STEPS} steps on a text: the loss falls; the adapter loads "
          "in a fresh process with equal outputs", fine_tune, ("smollm2",)),
)  # fmt: skip
