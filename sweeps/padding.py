"""How many products and bytes padding costs the forward pass: exact counts, as a table in docs/kernels.md.

    python -m sweeps.padding

Three arrangements of the same work are compared: tiles of rows without padding (ours), every expert's rows padded to a
multiple of 128 (MegaBlocks, arXiv:2211.15841), and a fixed capacity (GShard, arXiv:2006.16668). Elements have two
bytes. Activations count once for each kernel that reads or writes them, weights once for each expert that has rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from moeify.kernels.gpu.tiles import row_tile

PAGE = Path(__file__).resolve().parent.parent / "docs/kernels.md"
START, END = "<!-- padding: start -->", "<!-- padding: end -->"
HIDDEN, INTERMEDIATE = 2048, 768  # of Qwen3-30B-A3B
SHAPES = ((128, 8, 64), (128, 8, 4096), (128, 8, 32768), (8, 2, 4096))  # experts, top-k, tokens
ELEMENT = 2


@dataclass(frozen=True)
class Cost:
    """The cost of one arrangement.

    Attributes:
        flops: Multiplications and additions issued, padding included.
        bytes: Moved to and from memory.
        dropped: Choices that are not computed.
    """

    flops: int
    bytes: int
    dropped: int


def tiled(counts: Sequence[int], tokens: int, hidden: int, intermediate: int, block_m: int) -> Cost:
    """Return our cost: the gather is part of the up projection, and the activation too; only last tiles are ragged."""
    choices, rows = sum(counts), sum(_round_up(n, block_m) for n in counts)
    up = choices * hidden + choices * 3 * intermediate  # read x; write z and a
    down = choices * intermediate + choices * hidden  # read a; write y
    combine = choices * hidden + tokens * hidden
    moved = up + down + combine + _weights(counts, hidden, intermediate)
    return Cost(_flops(rows, hidden, intermediate), ELEMENT * moved, 0)


def padded(counts: Sequence[int], tokens: int, hidden: int, intermediate: int, block: int = 128) -> Cost:
    """Return the cost of MegaBlocks: copy and pad, sdd, activation, dsd, copy back, sum."""
    choices, rows = sum(counts), sum(_round_up(n, block) for n in counts)
    gather = choices * hidden + rows * hidden
    up = rows * hidden + rows * 2 * intermediate
    activate = rows * 3 * intermediate
    down = rows * intermediate + rows * hidden
    scatter = 2 * choices * hidden + choices * hidden + tokens * hidden
    moved = gather + up + activate + down + scatter + _weights(counts, hidden, intermediate)
    return Cost(_flops(rows, hidden, intermediate), ELEMENT * moved, 0)


def capacity(counts: Sequence[int], tokens: int, hidden: int, intermediate: int, factor: float = 1.25) -> Cost:
    """Return the cost of a fixed capacity: every expert computes the same number of rows, and the rest is dropped."""
    slots = int(-(-sum(counts) * factor // len(counts)))
    rows, kept = slots * len(counts), sum(min(n, slots) for n in counts)
    moved = (2 * kept + 3 * rows + tokens) * hidden + 6 * rows * intermediate
    moved += _weights([1] * len(counts), hidden, intermediate)
    return Cost(_flops(rows, hidden, intermediate), ELEMENT * moved, sum(counts) - kept)


def _flops(rows: int, hidden: int, intermediate: int) -> int:
    return 2 * rows * hidden * 3 * intermediate


def _weights(counts: Sequence[int], hidden: int, intermediate: int) -> int:
    return 3 * hidden * intermediate * sum(n > 0 for n in counts)


def _round_up(n: int, block: int) -> int:
    return -(-n // block) * block


def table(hidden: int, intermediate: int) -> str:
    """Return a Markdown table of the three arrangements, each number over that of the line's best possible."""
    names = ("tiles", "128-padding", "capacity 1.25")
    head = ["experts, top-k, tokens", "routing", *(cell for name in names for cell in (f"{name}: products", "bytes"))]
    lines = ["| " + " | ".join([*head, "dropped"]) + " |", "|---" * 9 + "|"]
    for experts, top_k, tokens in SHAPES:
        for name, counts in routings(experts, tokens * top_k).items():
            block = row_tile(tokens * top_k, experts)
            costs = [tiled(counts, tokens, hidden, intermediate, block)]
            costs += [cost(counts, tokens, hidden, intermediate) for cost in (padded, capacity)]
            least = tiled(counts, tokens, hidden, intermediate, 1)
            cells = [f"{cost.flops / least.flops:.2f} | {cost.bytes / least.bytes:.2f}" for cost in costs]
            dropped = f"{costs[-1].dropped / sum(counts):.0%}"
            lines.append("| " + " | ".join((f"{experts}, {top_k}, {tokens}", name, *cells, dropped)) + " |")
    return "\n".join(lines)


def routings(experts: int, choices: int) -> dict[str, list[int]]:
    """Return rows per expert: even; each choice at random; and by Zipf's law."""
    generator = torch.Generator().manual_seed(0)
    zipf = 1 / torch.arange(1, experts + 1, dtype=torch.float64)
    samples = {
        "uniform": torch.randint(0, experts, (choices,), generator=generator),
        "Zipf": torch.multinomial(zipf, choices, replacement=True, generator=generator),
    }
    even = [choices // experts + (e < choices % experts) for e in range(experts)]
    return {"even": even} | {n: torch.bincount(ids, minlength=experts).tolist() for n, ids in samples.items()}


def main() -> None:
    """Write the table into the page."""
    before, _, rest = PAGE.read_text().partition(START)
    text = table(HIDDEN, INTERMEDIATE)
    PAGE.write_text(f"{before}{START}\n\n{text}\n\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main()
