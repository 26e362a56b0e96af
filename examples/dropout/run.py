"""Dropout in fine-tuning an MoE on little text: none, the same everywhere, or more inside the experts."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

import moeify
from examples import small_lm as lm
from moeify.training.recipes import FineTuning

HERE = Path(__file__).parent
CONFIG = moeify.MoEConfig(experts=8, top_k=2, aux_loss=0.01)
LITTLE = 16_000  # bytes to fine-tune on
WAYS = {  # outside and inside the experts
    "none": FineTuning(dropout=0.0, expert_dropout=0.0),
    "0.1 everywhere": FineTuning(dropout=0.1, expert_dropout=0.1),
    "0.3 everywhere": FineTuning(dropout=0.3, expert_dropout=0.3),
    "0.1, and 0.4 inside the experts": FineTuning.switch(),
}


def main() -> None:
    """Fine-tune each way, write the table and the plot."""
    args = lm.options(__doc__)
    start = lm.go_on("MoE", moeify.convert(lm.trained(args), replace(CONFIG, seed=args.seed)), args)
    source = lm.source_text(18_000 if args.quick else 700_000)
    steps, rows, lines = round(120 * args.steps), [], []
    for name, way in WAYS.items():
        model = copy.deepcopy(start)
        way.prepare(model)
        drop_outside(model, way.dropout)
        found = fine_tune(model, lm.Text(source[:LITTLE]), lm.Text(source), steps, args.seed + 2)
        at, losses, trained = found["step"], found["held out"], found["trained on"]
        best = min(range(len(losses)), key=losses.__getitem__)
        rows.append([name, f"{losses[best]:.3f}", f"{at[best]:.0f}", f"{losses[-1]:.3f}", f"{trained[-1]:.3f}"])
        lines.append((name, at, losses))
        print(*rows[-1], flush=True)
    lm.write_table(HERE, args, ["dropout", "best held-out loss", "at step", "at the end", "on what is trained"], rows)
    low = min(min(losses) for _, _, losses in lines)
    lm.plot(HERE / "loss.png", args, ("step", lines), y="held-out loss, nats per byte", top=low + 0.35)


def drop_outside(model: Any, dropout: float) -> None:
    """Drop what attention and the MoE layers add to the residual stream, in training."""
    for block in model.model.layers:
        for inner in (block.self_attn, block.mlp):
            inner.register_forward_hook(partial(dropped, dropout))


def dropped(dropout: float, module: nn.Module, args: object, output: Any) -> Any:
    """What a hook makes of an output; that of attention is a tuple."""
    if isinstance(output, tuple):
        return (dropped(dropout, module, args, output[0]), *output[1:])
    return nn.functional.dropout(output, dropout, module.training)


def fine_tune(model: Any, little: lm.Text, whole: lm.Text, steps: int, seed: int) -> dict[str, list[float]]:
    """Train on little, measure on the end of the whole text."""
    optimizer, every = lm.optimizer_for(model), 20
    found: dict[str, list[float]] = {"step": [], "held out": [], "trained on": []}
    last: list[float] = []
    for step, windows in enumerate([*little.batches(steps, seed), None]):
        if step % every == 0 or windows is None:
            found["step"].append(step)
            found["held out"].append(whole.measure(model))
            found["trained on"].append(sum(last) / max(len(last), 1))
            last.clear()
        if windows is not None:
            loss = lm.loss_of(model, windows)
            last.append(float(loss.detach()))
            lm.update(model, optimizer, loss)
    return found


if __name__ == "__main__":
    main()
