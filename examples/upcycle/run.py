"""Upcycle a small trained language model and go on: against going on dense, and against an MoE trained from scratch."""

from __future__ import annotations

import copy
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch.optim import AdamW

import moeify
from examples import small_lm as lm

HERE = Path(__file__).parent
CONFIG = moeify.MoEConfig(experts=8, top_k=2, aux_loss=0.01)


def main() -> None:
    """Train the models, write the table and the plot."""
    args = lm.options(__doc__)
    text, steps = lm.Text(lm.reference_text()), round(400 * args.steps)
    dense = lm.dense_model()
    optimizer = lm.optimizer_for(dense)
    first = lm.train("dense, first half", dense, optimizer, text, steps, seed=args.seed)
    spent, seed = lm.end_of(first), args.seed + 1
    config = replace(CONFIG, seed=args.seed)

    def split() -> tuple[Any, AdamW]:
        model = copy.deepcopy(dense)
        fresh = lm.optimizer_for(model)
        fresh.load_state_dict(optimizer.state_dict())
        return model, fresh

    model, state = split()
    curves = [lm.train("dense, going on", model, state, text, steps, seed=seed, start=spent)]
    model, state = split()
    moeify.convert(model, config, optimizer=state)
    curves.append(lm.train("upcycled, optimizer carried over", model, state, text, steps, seed=seed, start=spent))
    model, _ = split()
    moeify.convert(model, config)
    fresh = lm.optimizer_for(model)
    curves.append(lm.train("upcycled, new optimizer", model, fresh, text, steps, seed=seed, start=spent))
    scratch = lm.moe_from_scratch(config)
    curves.append(lm.train("MoE from scratch", scratch, lm.optimizer_for(scratch), text, 2 * steps, seed=args.seed))
    write(first, curves, args)


def write(first: lm.Curve, curves: list[lm.Curve], args: Namespace) -> None:
    """Write the table and the plot."""
    rows = [
        [c.name, f"{c.losses[0]:.3f}", f"{c.losses[1]:.3f}", f"{c.losses[-1]:.3f}", f"{c.tokens[-1] / 1e6:.2f} M",
         f"{c.flops[-1] / 1e12:.2f}", f"{c.seconds:.0f}"]
        for c in [first, *curves]
    ]  # fmt: skip
    header = ["model", "loss at its start", "after 50 steps", "at the end", "tokens in all", "TFLOPs in all", "seconds"]
    lm.write_table(HERE, args, header, rows)
    shown = [first, *curves]
    lm.plot(
        HERE / "loss.png",
        args,
        ("tokens", [(c.name, c.tokens, c.losses) for c in shown]),
        ("training FLOPs", [(c.name, c.flops, c.losses) for c in shown]),
        y="held-out loss, nats per byte",
        top=1.15 * first.losses[-1],
    )


if __name__ == "__main__":
    main()
