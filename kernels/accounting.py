"""Products issued and bytes moved by the forward pass, against what is useful: exact counts, for a given routing.

Three ways to arrange the same work: tiles of rows without padding (ours), every expert's rows padded to a multiple of
128 (MegaBlocks, arXiv:2211.15841), and a fixed capacity (GShard, arXiv:2006.16668). Activations have two bytes an
element and count once for each kernel that reads or writes them; weights count once for each expert that has rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

ELEMENT = 2


@dataclass(frozen=True)
class Cost:
    """What one arrangement of the work takes.

    Attributes:
        flops: multiplications and additions issued, padding included.
        bytes: moved to and from memory.
        dropped: pairs that are not computed at all.
    """

    flops: int
    bytes: int
    dropped: int


def useful_flops(counts: Sequence[int], hidden: int, inner: int) -> int:
    """Multiplications and additions that a gated FFN needs for these rows per expert."""
    return _flops(sum(counts), hidden, inner)


def tiled(counts: Sequence[int], tokens: int, hidden: int, inner: int, block_m: int) -> Cost:
    """Ours: the gather is part of the first product, the activation its epilogue; only last tiles are ragged."""
    pairs, rows = sum(counts), sum(_round_up(n, block_m) for n in counts)
    up = pairs * hidden + pairs * 3 * inner  # read x; write z and a
    down = pairs * inner + pairs * hidden  # read a; write y
    combine = pairs * hidden + tokens * hidden
    return Cost(_flops(rows, hidden, inner), ELEMENT * (up + down + combine + _weights(counts, hidden, inner)), 0)


def padded(counts: Sequence[int], tokens: int, hidden: int, inner: int, block: int = 128) -> Cost:
    """MegaBlocks: copy and pad, sdd, activation, dsd, copy back, sum."""
    pairs, rows = sum(counts), sum(_round_up(n, block) for n in counts)
    gather = pairs * hidden + rows * hidden
    up = rows * hidden + rows * 2 * inner
    activate = rows * 3 * inner
    down = rows * inner + rows * hidden
    scatter = 2 * pairs * hidden + pairs * hidden + tokens * hidden
    moved = gather + up + activate + down + scatter + _weights(counts, hidden, inner)
    return Cost(_flops(rows, hidden, inner), ELEMENT * moved, 0)


def capacity(counts: Sequence[int], tokens: int, hidden: int, inner: int, factor: float = 1.25) -> Cost:
    """Fixed capacity: every expert takes the same number of rows, empty or not; what does not fit is dropped."""
    slots = int(-(-sum(counts) * factor // len(counts)))
    rows, kept = slots * len(counts), sum(min(n, slots) for n in counts)
    moved = kept * hidden + 2 * rows * hidden + 6 * rows * inner + rows * hidden + kept * hidden + tokens * hidden
    everyone = [1] * len(counts)
    return Cost(_flops(rows, hidden, inner), ELEMENT * (moved + _weights(everyone, hidden, inner)), sum(counts) - kept)


def _flops(rows: int, hidden: int, inner: int) -> int:
    return 2 * rows * hidden * 3 * inner


def _weights(counts: Sequence[int], hidden: int, inner: int) -> int:
    return 3 * hidden * inner * sum(n > 0 for n in counts)


def _round_up(n: int, block: int) -> int:
    return -(-n // block) * block
