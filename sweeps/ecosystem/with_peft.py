"""PEFT's adapters: on attention, experts and routers; saved, loaded in another process, merged."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from moeify.measure import TOLERANCE, relative_difference
from sweeps.ecosystem.check import CONVERTED, NATIVE, Check
from sweeps.ecosystem.models import Subject, batch, library, logits, run_python

ATTENTION = {"gpt2": ["c_attn"]}
UP = {"gpt2": "up_proj"}
ROUTERS = {"mixtral": "mlp.gate.weight", "qwen3_moe": "mlp.gate.weight"}


def lora(subject: Subject) -> None:
    """Train adapters on attention, experts and routers; reload them elsewhere; merge them."""
    attention = ATTENTION.get(subject.name, ["q_proj", "v_proj"])
    _round_trip(subject, target_modules=attention, target_parameters=_parameters(subject))


def lora_without_attention(subject: Subject) -> None:
    """Train adapters on experts and routers only."""
    _round_trip(subject, target_modules=[], target_parameters=_parameters(subject))


def saved_routers(subject: Subject) -> None:
    """Train routers whole beside adapters on attention, and reload both elsewhere."""
    routers = ROUTERS.get(subject.name, "mlp.router.weight").split(".")[1]
    _round_trip(subject, target_modules=ATTENTION.get(subject.name, ["q_proj", "v_proj"]), modules_to_save=[routers])


def _parameters(subject: Subject) -> list[str]:
    up, router = UP.get(subject.name, "gate_up_proj"), ROUTERS.get(subject.name, "mlp.router.weight")
    return [f"mlp.experts.{up}", "mlp.experts.down_proj", router]


def _round_trip(subject: Subject, **targets: Any) -> None:
    peft = library("peft")

    torch.manual_seed(0)
    model: Any = subject.load()
    before = logits(model)
    wrapped: Any = peft.get_peft_model(model, peft.LoraConfig(r=4, **targets))
    trained = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = wrapped.train()(**batch()).loss
        loss.backward()
        assert all(p.grad is not None for p in trained), "parts of the adapter got no gradient"
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0], f"the loss went from {losses[0]:.3f} to {losses[-1]:.3f}"
    adapted = logits(wrapped)
    assert relative_difference(adapted, before) > 1e-3, "the adapter changes nothing"
    wrapped.save_pretrained(subject.scratch / "adapter")
    there = subject.scratch / "logits.pt"
    run_python("sweeps.ecosystem.with_peft", subject.name, subject.path, subject.scratch / "adapter", there)
    assert relative_difference(torch.load(there), adapted) <= TOLERANCE["float32"], "reloaded, it computes otherwise"
    merged = wrapped.merge_and_unload()
    assert relative_difference(logits(merged), adapted) <= TOLERANCE["float32"], "merged, it computes otherwise"
    merged.save_pretrained(subject.scratch / "merged")
    loaded = subject.load(subject.scratch / "merged")
    assert relative_difference(logits(loaded), adapted) <= TOLERANCE["float32"], (
        "merged and saved, it computes otherwise"
    )


def elsewhere(name: str, path: Path, adapter: Path, result: Path) -> None:
    """Load a model and an adapter in a fresh process, and keep the logits."""
    peft = library("peft")

    model = Subject(name, path, adapter).load()
    torch.save(logits(peft.PeftModel.from_pretrained(model, adapter)), result)


CHECKS = (
    Check("peft", "LoRA on attention (`target_modules`), experts and routers (`target_parameters`): trained, saved, "
          "loaded in a fresh process, merged, saved", lora, CONVERTED + NATIVE,
          "peft.LoraConfig(target_modules=[], …): Conv1D cannot be in the adapter of parameters",
          lora_without_attention),
    Check("peft", "LoRA on attention and whole routers (`modules_to_save`), the same way", saved_routers),
)  # fmt: skip

if __name__ == "__main__":
    elsewhere(sys.argv[1], *map(Path, sys.argv[2:]))
