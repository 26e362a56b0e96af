"""Time the expert computation on one CPU thread beside everything transformers has, and beside a dense FFN.

    python -m benchmarks.experts_cpu    some minutes; writes record and page beside this file

Every candidate computes the same thing from the same tensors. Rounds are interleaved, so that a slow moment of the
machine hits all candidates alike; each figure is the median over rounds of the CPU time of the thread.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import product
from math import prod
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from benchmarks.by_turns import cpu_milliseconds, samples
from benchmarks.record import Record, keep, measured, rounded
from moeify.kernels.ops import experts

HIDDEN, INTERMEDIATE, EXPERTS, TOP_K = 512, 1408, 8, 2
PEERS = ("eager", "grouped_mm", "batched_mm")
COLUMNS = ("moeify", *PEERS, "dense", "products")
TOKENS, ROUNDS = (1, 8, 64, 512, 2048), 5
CODE = ("kernels/cpu.py", "kernels/pages.py", "kernels/ops.py")
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

    def products(self, dtype: torch.dtype, backward: bool) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield what the chosen experts multiply, with room for each result: work that no implementation is without."""
        for e in sorted(set(self.ids.flatten().tolist())):
            rows, up, down = int((self.ids == e).sum()), self.mixtral.gate_up_proj[e], self.mixtral.down_proj[e]
            x, y = (torch.randn(rows, HIDDEN, dtype=dtype) for _ in range(2))
            z, a = (torch.randn(rows, wide * INTERMEDIATE, dtype=dtype) for wide in (2, 1))
            forward = (x, up.t(), z), (a, down.t(), y)
            inputs, weights = ((y, down, a), (z, up, x)), ((z.t(), x, up), (y.t(), a, down))
            for left, right, like in (*forward, *inputs, *weights) if backward else forward:
                yield left.detach(), right.detach(), torch.empty_like(like, requires_grad=False)


def timed(run: Run, x: Tensor, backward: bool, parameters: list[Tensor]) -> float:
    """Return the milliseconds of CPU time of one pass."""
    for p in parameters:
        p.grad = None
    if backward:
        return cpu_milliseconds(lambda: torch.autograd.backward(run(x).sum()))
    with torch.no_grad():
        return cpu_milliseconds(lambda: run(x))


def measure(tokens: int, dtype: torch.dtype, backward: bool, seconds: float) -> dict[str, list[float]]:
    """Return the milliseconds of each candidate, round by round."""
    layer = Layer(tokens, dtype)
    x = torch.randn(tokens, HIDDEN, dtype=dtype).requires_grad_(backward)
    candidates: dict[str, Run] = {"moeify": layer.ours}
    candidates |= {p: layer.peer(p) for p in PEERS if p != "batched_mm" or tokens <= BATCHED_MM_LIMIT}
    candidates["dense"] = layer.dense
    parameters = [x, layer.weights, *layer.parameters()]
    timed_by_name = {n: partial(timed, run, x, backward, parameters) for n, run in candidates.items()}
    work = list(layer.products(dtype, backward))
    timed_by_name["products"] = partial(cpu_milliseconds, lambda: [torch.mm(a, b, out=out) for a, b, out in work])
    return rounded(samples(timed_by_name, ROUNDS, seconds), digits=3)


def summary(runs: Mapping[str, Mapping[str, Sequence[float]]]) -> dict[str, Any]:
    """Return the medians of every row, and by how much the operator, and its products alone, beat the best peer."""
    rows = {name: {n: median(ms) for n, ms in of_row.items()} for name, of_row in runs.items()}
    gains, bounds = ([best_peer(row) / row[of] for row in rows.values()] for of in ("moeify", "products"))
    means = {name: prod(each) ** (1 / len(each)) for name, each in (("geometric_mean", gains), ("bound", bounds))}
    return {**means, "least": min(gains), "least_bound": min(bounds), "rows": rows}


def best_peer(row: Mapping[str, float]) -> float:
    """Return the milliseconds of the fastest of transformers' implementations."""
    return min(row[p] for p in PEERS if p in row)


def page(record: Record) -> str:
    """Return the page of a record."""
    lines = [
        "# Expert computation on one CPU thread\n",
        f"Milliseconds, median. {record.what}.",
        "`dense` is an FFN of the same active FLOPs. `products` is the matrix products of the chosen experts alone, as",
        "`torch.mm` computes them into memory that is there; nothing is sorted, and idle experts have no gradients.",
        f"{record.line()}\n",
        "| dtype | pass | tokens | "
        + " | ".join(COLUMNS)
        + " | best peer / moeify | best peer / products | moeify / dense |",
        "|---" * (len(COLUMNS) + 6) + "|",
    ]
    for name, ms in record.summary["rows"].items():
        cells = [f"{ms[c]:.2f}" if c in ms else "" for c in COLUMNS]
        best = best_peer(ms)
        ratios = [
            f"{a / b:.2f}" for a, b in ((best, ms["moeify"]), (best, ms["products"]), (ms["moeify"], ms["dense"]))
        ]
        lines.append("| " + " | ".join([*name.split(", "), *cells, *ratios]) + " |")
    said = "Best peer over {}: geometric mean {:.2f}, least {:.2f}."
    found = record.summary
    lines += ["", said.format("moeify", found["geometric_mean"], found["least"])]
    lines += [said.format("the products alone", found["bound"], found["least_bound"]), ""]
    return "\n".join(lines)


def main() -> None:
    """Measure every row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=4.0, help="least time for each row")
    seconds = parser.parse_args().seconds
    torch.set_num_threads(1)
    runs = {}
    for dtype, backward, tokens in product((torch.float32, torch.bfloat16), (False, True), TOKENS):
        label = "forward + backward" if backward else "forward"
        name = f"{str(dtype).removeprefix('torch.')}, {label}, {tokens}"
        runs[name] = measure(tokens, dtype, backward, seconds)
        print(name, flush=True)
    what = f"H={HIDDEN}, I={INTERMEDIATE}, E={EXPERTS}, k={TOP_K}, SwiGLU"
    against = "transformers' experts, and a dense FFN"
    keep(__file__, measured(what, against, CODE, summary(runs), runs), page)


if __name__ == "__main__":
    main()
