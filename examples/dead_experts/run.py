"""Dead experts: an MoE trained from scratch without balancing, with a loss, with a strong loss, and with a bias."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import moeify
from examples import small_lm as lm

HERE = Path(__file__).parent
EXPERTS = 16
CONFIGS = {
    "no balancing": moeify.MoEConfig(EXPERTS, 1, renormalize=False, aux_loss=0.0),
    "aux_loss 0.01 (Switch)": moeify.MoEConfig(EXPERTS, 1, renormalize=False, aux_loss=0.01),
    "aux_loss 0.1": moeify.MoEConfig(EXPERTS, 1, renormalize=False, aux_loss=0.1),
    "selection bias (DeepSeek-V3)": moeify.MoEConfig(
        EXPERTS, 1, router=moeify.routers.Sigmoid(bias_rate=1e-2), renormalize=False, aux_loss=0.0
    ),
}
DEAD = 0.1 / EXPERTS  # an expert with less than a tenth of its share


def main() -> None:
    """Train a model for each setting, write the table and the plot."""
    args = lm.options(__doc__)
    text, steps = lm.Text(lm.reference_text()), round(150 * args.steps)
    curves, loads = [], {}
    for name, config in CONFIGS.items():
        torch.manual_seed(args.seed)
        model = lm.moe_from_scratch(replace(config, seed=args.seed))
        optimizer = lm.optimizer_for(model)
        if config.router.updates_bias:
            moeify.attach_bias_update(model, optimizer)
        history: list[float] = []
        curves.append(lm.train(name, model, optimizer, text, steps, seed=args.seed, watch=watch(history)))
        loads[name] = (history, held_out_load(model, text))
    rows = [
        [c.name, f"{c.losses[-1]:.3f}", f"{dead(loads[c.name][1])} of {lm.LAYERS * EXPERTS}",
         f"{max(max(layer) for layer in loads[c.name][1]) * EXPERTS:.1f} x"]
        for c in curves
    ]  # fmt: skip
    lm.write_table(HERE, args, ["balancing", "held-out loss", "dead experts", "busiest expert"], rows)
    lm.plot(
        HERE / "dead.png", args,
        ("step", [(n, list(range(len(h))), [sum(h[max(i - 9, 0) : i + 1]) / min(i + 1, 10) for i in range(len(h))])
                  for n, (h, _) in loads.items()]),
        y=f"dead experts of {lm.LAYERS * EXPERTS} (mean of 10 steps)",
    )  # fmt: skip


def watch(history: list[float]) -> Callable[[Any], None]:
    """Count the dead experts of each step."""

    def count(model: Any) -> None:
        history.append(dead([stats.load for stats in moeify.routing_stats(model).values()]))

    return count


def held_out_load(model: Any, text: lm.Text) -> list[tuple[float, ...]]:
    """Each layer's load on text that was not trained on."""
    text.measure(model)
    return [stats.load for stats in moeify.routing_stats(model).values()]


def dead(loads: list[tuple[float, ...]]) -> int:
    """How many experts get less than a tenth of their share."""
    return sum(share < DEAD for load in loads for share in load)


if __name__ == "__main__":
    main()
