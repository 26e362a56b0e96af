"""Capacity against loss: how much is lost by dropping tokens, in training and in evaluation."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import moeify
from examples import small_lm as lm

HERE = Path(__file__).parent
FACTORS = (0.25, 0.5, 1.0, 1.5, None)


def main() -> None:
    """Continue one dense model as an MoE within each capacity, write the table and the plot."""
    args = lm.options(__doc__)
    text = lm.Text(lm.reference_text())
    dense = lm.dense_model()
    optimizer = lm.optimizer_for(dense)
    lm.train("dense", dense, optimizer, text, round(150 * args.steps), seed=args.seed)
    rows, shares, same, free = [], [], [], []
    for factor in FACTORS:
        model = copy.deepcopy(dense)
        state = lm.optimizer_for(model)
        state.load_state_dict(optimizer.state_dict())
        config = moeify.MoEConfig(
            8, 2, aux_loss=0.01, capacity_factor=factor, eval_capacity_factor=factor, seed=args.seed
        )
        moeify.convert(model, config, optimizer=state)
        dropped: list[float] = []

        def watch(m: Any, dropped: list[float] = dropped) -> None:
            dropped.append(share_dropped(m))

        name = "no limit" if factor is None else str(factor)
        curve = lm.train(name, model, state, text, round(100 * args.steps), seed=args.seed + 1, watch=watch)
        shares.append(sum(dropped[-50:]) / len(dropped[-50:]))
        same.append(curve.losses[-1])
        evaluated = share_dropped(model)
        moeify.set_capacity(model, None)
        free.append(text.measure(model))
        rows.append([name, f"{shares[-1]:.1%}", f"{evaluated:.1%}", f"{same[-1]:.3f}", f"{free[-1]:.3f}"])
    header = ["capacity factor", "dropped in training", "dropped in evaluation", "held-out loss", "without a limit"]
    lm.write_table(HERE, args, header, rows)
    lm.plot(HERE / "loss.png", args, ("share of choices dropped in training",
            [("evaluated within the same capacity", shares, same), ("evaluated without a limit", shares, free)]),
            y="held-out loss, nats per byte")  # fmt: skip


def share_dropped(model: Any) -> float:
    """Dropped choices of all, over the layers, in the last forward pass."""
    stats = moeify.routing_stats(model).values()
    return sum(layer.dropped for layer in stats) / sum(layer.choices for layer in stats)


if __name__ == "__main__":
    main()
