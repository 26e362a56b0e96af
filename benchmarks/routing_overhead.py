"""What routing costs beside the experts: router, capacity, losses and bookkeeping, forward and backward, on one thread.

    python -m benchmarks.routing_overhead

CPU time, medians of alternating runs, at T=2048, H=512, I=1408, 8 experts, top-2 (the preset's own k where it has one).
Record and page are written beside this file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import nn

from benchmarks.by_turns import cpu_milliseconds, samples
from benchmarks.measure import key
from benchmarks.record import Record, keep, measured, rounded
from moeify.config import MoEConfig
from moeify.layers import Experts, SparseMoE

TOKENS, HIDDEN, INTERMEDIATE, EXPERTS, REPEATS = 2048, 512, 1408, 8, 9
CODE = ("moeify/layers", "moeify/routing", "moeify/routers")
CONFIGS = {
    "softmax top-2, balance and z loss": MoEConfig(EXPERTS, 2, z_loss=1e-3, attach_losses=True),
    "the same, capacity 1.25": MoEConfig(EXPERTS, 2, z_loss=1e-3, attach_losses=True, capacity_factor=1.25),
    "switch": MoEConfig.switch(EXPERTS, attach_losses=True),
    "gshard": MoEConfig.gshard(EXPERTS, attach_losses=True),
    "noisy_topk": MoEConfig.noisy_topk(EXPERTS, 2, attach_losses=True),
    "deepseek_v3": MoEConfig.deepseek_v3(EXPERTS, 2, router={"n_group": 4, "topk_group": 2}, attach_losses=True),
    "expert_choice": MoEConfig.expert_choice(EXPERTS),
}


class Nothing(nn.Module):
    """Experts that cost nothing: they hand the routing weights on, so that their gradient flows."""

    def forward(self, x: torch.Tensor, expert_ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Return the input, plus the weights' sum times zero."""
        result: torch.Tensor = x + 0 * weights.sum()
        return result


def measure(config: MoEConfig) -> dict[str, list[float]]:
    """Return the milliseconds of a layer, of one without experts, and of nothing, round by round."""
    x = torch.randn(1, TOKENS, HIDDEN, requires_grad=True)
    layer = make(config)
    modules = {"layer": layer, "routing": SparseMoE(layer.router, Nothing()), "nothing": nn.Identity()}
    timed = {n: partial(cpu_milliseconds, partial(run, module, x)) for n, module in modules.items()}
    return rounded(samples(timed, REPEATS))


def summary(runs: Mapping[str, Mapping[str, Sequence[float]]]) -> dict[str, Any]:
    """Return the medians of each setting."""
    found = {}
    for name, ms in runs.items():
        layer, routing = median(ms["layer"]), median(ms["routing"]) - median(ms["nothing"])
        found[key(name)] = {"name": name, "layer_ms": layer, "routing_ms": routing, "share": routing / layer}
    return found


def page(record: Record) -> str:
    """Return the page of a record."""
    lines = [
        "# What routing costs beside the experts\n",
        f"{record.what}; CPU time, medians of alternating runs.",
        f"{record.line()}\n",
        "| routing | layer, ms | routing alone, ms | share |",
        "|---|--:|--:|--:|",
    ]
    rows = record.summary.values()
    lines += ["| {name} | {layer_ms:.0f} | {routing_ms:.1f} | {share:.1%} |".format(**row) for row in rows]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure each setting."""
    torch.set_num_threads(1)
    runs = {name: measure(config) for name, config in CONFIGS.items()}
    what = f"Forward and backward of T={TOKENS}, H={HIDDEN}, I={INTERMEDIATE}, {EXPERTS} experts, one thread"
    keep(__file__, measured(what, "the whole layer", CODE, summary(runs), runs), page)


def make(config: MoEConfig) -> SparseMoE:
    """A layer in training mode."""
    experts = Experts(HIDDEN, INTERMEDIATE, num_experts=config.experts, activation="silu", gated=True,
                      up_rows=2 * INTERMEDIATE)  # fmt: skip
    layer = SparseMoE(config.router.module(HIDDEN, config), experts)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=HIDDEN**-0.5)
    return layer.train()


def run(layer: nn.Module, x: torch.Tensor) -> None:
    """Forward, and backward from a sum."""
    x.grad = None
    torch.autograd.backward((layer(x) + 0.0).sum())


if __name__ == "__main__":
    main()
