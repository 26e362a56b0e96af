"""The freezing experiment: fine-tune an MoE on another text, training everything, only the MoE, or all but the MoE."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import moeify
from examples import small_lm as lm

HERE = Path(__file__).parent
CONFIG = moeify.MoEConfig(experts=8, top_k=2, aux_loss=0.01)
WAYS: dict[str, Any] = {
    "everything": None,
    "only the MoE layers": "non_moe",
    "all but the MoE layers": "moe",
    "only the experts": "dense",
}


def main() -> None:
    """Train on the reference, fine-tune on source code in four ways, write the table and the plot."""
    args = lm.options(__doc__)
    reference, source = lm.Text(lm.reference_text()), lm.Text(lm.source_text())
    dense = lm.dense_model()
    optimizer = lm.optimizer_for(dense)
    lm.train("dense", dense, optimizer, reference, round(200 * args.steps), seed=args.seed)
    base = moeify.convert(dense, replace(CONFIG, seed=args.seed), optimizer=optimizer)
    lm.train("MoE", base, optimizer, reference, round(80 * args.steps), seed=args.seed + 1)
    curves, rows = [], []
    for name, frozen in WAYS.items():
        model = copy.deepcopy(base)
        if frozen:
            moeify.freeze(model, frozen)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        fine = lm.optimizer_for(model, 1e-3)
        curve = lm.train(name, model, fine, source, round(120 * args.steps), seed=args.seed + 2)
        curves.append(curve)
        rows.append([name, f"{trained / 1e6:.2f} M", f"{curve.losses[0]:.3f}", f"{curve.losses[-1]:.3f}",
                     f"{reference.measure(model):.3f}", f"{curve.seconds:.0f}"])  # fmt: skip
    header = ["trained", "parameters", "source code, before", "after", "reference, after", "seconds"]
    lm.write_table(HERE, args, header, rows)
    lm.plot(HERE / "loss.png", args, ("tokens", [(c.name, c.tokens, c.losses) for c in curves]),
            y="held-out loss on source code, nats per byte")  # fmt: skip


if __name__ == "__main__":
    main()
