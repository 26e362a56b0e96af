"""Time the expert computation on one CPU thread beside everything transformers has, and beside a dense FFN.

    python -m benchmarks.experts_cpu            prints the table
    python -m benchmarks.experts_cpu --write    also writes it beside this file

Every candidate computes the same thing from the same tensors. Rounds are interleaved, so that a slow moment of the
machine hits all candidates alike; each figure is the median over rounds of the CPU time of the thread.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Callable
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from benchmarks.by_turns import cpu_milliseconds, medians
from moeify.kernels.ops import experts

HIDDEN, INTERMEDIATE, EXPERTS, TOP_K = 512, 1408, 8, 2
PEERS = ("eager", "grouped_mm", "batched_mm")
BATCHED_MM_LIMIT = 8  # it copies the weights of an expert per token: 1.5 GB at 64 tokens, fp32

Run = Callable[[Tensor], Tensor]


class Layer(nn.Module):
    """Expert weights, a routing, and every way to compute them."""

    def __init__(self, tokens: int, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        config = MixtralConfig(
            hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, num_local_experts=EXPERTS, num_experts_per_tok=TOP_K
        )
        self.mixtral = MixtralExperts(config).to(dtype)
        for p in self.mixtral.parameters():
            nn.init.normal_(p, std=HIDDEN**-0.5)
        self.dense_up = nn.Linear(HIDDEN, 2 * TOP_K * INTERMEDIATE, bias=False, dtype=dtype)
        self.dense_down = nn.Linear(TOP_K * INTERMEDIATE, HIDDEN, bias=False, dtype=dtype)
        weights, self.ids = torch.randn(tokens, EXPERTS).softmax(-1).topk(TOP_K)
        self.weights = weights.to(dtype).requires_grad_()

    def ours(self, x: Tensor) -> Tensor:
        """The operator under test."""
        up, down = self.mixtral.gate_up_proj, self.mixtral.down_proj
        return experts(x, self.ids, self.weights, up, down, activation="silu", gated=True)

    def peer(self, implementation: str) -> Run:
        """One of transformers' implementations."""

        def run(x: Tensor) -> Tensor:
            config: Any = self.mixtral.config
            config._experts_implementation = implementation
            out: Tensor = self.mixtral(x, self.ids, self.weights)
            return out

        return run

    def dense(self, x: Tensor) -> Tensor:
        """A dense FFN of the same active FLOPs."""
        gate, up = self.dense_up(x).chunk(2, -1)
        out: Tensor = self.dense_down(F.silu(gate) * up)
        return out

    def matvecs(self, x: Tensor) -> Tensor:
        """The selected experts of one token, chosen ahead of time: the least work there is."""
        out = torch.zeros_like(x)
        for k, e in enumerate(self.ids[0].tolist()):
            gate, up = (self.mixtral.gate_up_proj[e] @ x[0]).chunk(2)
            out[0] += self.weights[0, k] * (self.mixtral.down_proj[e] @ (F.silu(gate) * up))
        return out


def timed(run: Run, x: Tensor, backward: bool, parameters: list[Tensor]) -> float:
    """Return the milliseconds of CPU time of one pass."""
    for p in parameters:
        p.grad = None
    if backward:
        return cpu_milliseconds(lambda: torch.autograd.backward(run(x).sum()))
    with torch.no_grad():
        return cpu_milliseconds(lambda: run(x))


def measure(tokens: int, dtype: torch.dtype, backward: bool, seconds: float) -> dict[str, float]:
    """Median milliseconds by candidate."""
    layer = Layer(tokens, dtype)
    x = torch.randn(tokens, HIDDEN, dtype=dtype).requires_grad_(backward)
    candidates: dict[str, Run] = {"moeify": layer.ours}
    candidates |= {p: layer.peer(p) for p in PEERS if p != "batched_mm" or tokens <= BATCHED_MM_LIMIT}
    candidates["dense"] = layer.dense
    if tokens == 1 and not backward:
        candidates["matvecs"] = layer.matvecs
    parameters = [x, layer.weights, *layer.parameters()]
    return medians({n: partial(timed, run, x, backward, parameters) for n, run in candidates.items()}, 5, seconds)


def table(seconds: float) -> str:
    """Every row, as a markdown table and a line of summary."""
    columns = ("moeify", *PEERS, "dense", "matvecs")
    lines = [
        "| dtype | pass | tokens | " + " | ".join(columns) + " | best peer / moeify | moeify / dense |",
        "|---" * (len(columns) + 5) + "|",
    ]
    gains = []
    for dtype in (torch.float32, torch.bfloat16):
        for backward in (False, True):
            for tokens in (1, 8, 64, 512, 2048):
                ms = measure(tokens, dtype, backward, seconds)
                gains.append(min(ms[p] for p in PEERS if p in ms) / ms["moeify"])
                cells = [f"{ms[c]:.2f}" if c in ms else "" for c in columns]
                name = str(dtype).removeprefix("torch.")
                label = "forward + backward" if backward else "forward"
                ratios = [f"{gains[-1]:.2f}", f"{ms['moeify'] / ms['dense']:.2f}"]
                lines.append(f"| {name} | {label} | {tokens} | " + " | ".join(cells + ratios) + " |")
                print(lines[-1], flush=True)
    geometric = prod(gains) ** (1 / len(gains))
    lines += ["", f"Best peer over moeify: geometric mean {geometric:.2f}, least {min(gains):.2f}."]
    return "\n".join(lines)


def main() -> None:
    """Measure, print and perhaps write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the table to experts_cpu.md")
    parser.add_argument("--seconds", type=float, default=4.0, help="least time for each row")
    options = parser.parse_args()
    torch.set_num_threads(1)
    text = table(options.seconds)
    print(text.rsplit("\n", 1)[-1])
    if options.write:
        head = (
            "# Expert computation on one CPU thread\n\n"
            f"Milliseconds, median. H={HIDDEN}, I={INTERMEDIATE}, E={EXPERTS}, k={TOP_K}, SwiGLU; "
            f"torch {torch.__version__}, {platform.processor() or platform.machine()}.\n"
            "`dense` is an FFN of the same active FLOPs; `matvecs` is the selected experts of one token alone.\n"
            "Made by `python -m benchmarks.experts_cpu --write`.\n\n"
        )
        Path(__file__).with_suffix(".md").write_text(head + text + "\n")


if __name__ == "__main__":
    main()
