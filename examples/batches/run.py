"""Batch and learning rate of fine-tuning: which does an MoE prefer, and which the dense model?"""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import moeify
from examples import small_lm as lm

HERE = Path(__file__).parent
CONFIG = moeify.MoEConfig(experts=8, top_k=2, aux_loss=0.01)
WINDOWS = 768  # of each run, however they are batched
BATCHES, RATES = (4, 16, 64), (1e-3, 3e-3, 9e-3)


def main() -> None:
    """Fine-tune at each batch and rate with equal tokens, write the table and the plot."""
    args = lm.options(__doc__)
    dense = lm.trained(args)
    moe = moeify.convert(copy.deepcopy(dense), replace(CONFIG, seed=args.seed))
    models = {"dense": lm.go_on("dense, going on", dense, args), "MoE": lm.go_on("MoE", moe, args)}
    source = lm.Text(lm.source_text(10_000 if args.quick else 700_000))
    rows, lines = [], []
    for kind, start in models.items():
        for batch in BATCHES:
            steps = 1 if args.quick else round(WINDOWS * args.steps / batch)
            taken = 2 if args.quick else batch
            losses = [fine_tune(start, source, steps, taken, rate, args.seed + 2) for rate in RATES]
            best = min(range(len(RATES)), key=losses.__getitem__)
            rows.append([kind, batch, *(f"{loss:.3f}" for loss in losses), f"{RATES[best]:g}"])
            lines.append((f"{kind}, {batch} windows", [1e3 * rate for rate in RATES], losses))
            print(*rows[-1], flush=True)
    lm.write_table(HERE, args, ["model", "windows in a step", *(f"rate {rate:g}" for rate in RATES), "best rate"], rows)
    top = max(sorted(losses)[1] for _, _, losses in lines) + 0.1
    lm.plot(HERE / "loss.png", args, ("learning rate, thousandths", lines), y="held-out loss, nats per byte", top=top)


def fine_tune(start: Any, text: lm.Text, steps: int, batch: int, rate: float, seed: int) -> float:
    """The held-out loss after so many steps."""
    model = copy.deepcopy(start)
    optimizer = lm.optimizer_for(model, rate)
    for windows in text.batches(steps, seed, batch):
        lm.update(model, optimizer, lm.loss_of(model, windows))
    return text.measure(model)


if __name__ == "__main__":
    main()
