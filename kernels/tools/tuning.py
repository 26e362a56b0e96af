"""Time a few tiles for each kernel on this machine's GPU: the table's tile and its neighbors, less those that spill.

Shape legend as in `moeify.kernels.gpu.experts`.
"""

# mypy: disable-error-code="import-untyped"

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import torch
import triton
from torch import Tensor

from moeify.kernels.gpu import experts, tiles
from moeify.kernels.gpu.target import architecture, has_tma
from moeify.kernels.gpu.tiles import Tile
from moeify.kernels.inputs import ExpertInputs, Kept
from moeify.kernels.layout import sort_by_expert
from moeify.kernels.tools.cases import tile_faults
from moeify.kernels.tools.trials import Launch, try_tiles

SHARES = (16, 32, 128, 2048)  # rows of an expert, one for each height of a tile of rows: decoding to training
DTYPES = (torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Shape:
    """The experts to tune for: by default Qwen3-30B-A3B's, which other kernels publish."""

    hidden: int = 2048
    intermediate: int = 768
    experts: int = 128
    top_k: int = 8


@dataclass(frozen=True)
class Timed:
    """The fastest tile of one kernel, and the milliseconds of all that were timed, the table's own first."""

    kernel: str
    itemsize: int
    tile: Tile
    times: dict[Tile, float]


def milliseconds(launch: Launch) -> float:
    """Return the median time of a launch on the device."""
    return float(triton.testing.do_bench(launch, warmup=10, rep=50, return_mode="median"))


def tune(
    shape: Shape,
    device: torch.device,
    dtypes: tuple[torch.dtype, ...] = DTYPES,
    shares: tuple[int, ...] = SHARES,
    timer: Callable[[Launch], float] = milliseconds,
    until: float = float("inf"),
    wrong: Callable[[Tensor, Tensor], str] | None = None,
) -> Iterator[Timed]:
    """Time the candidates of every kernel, for types of two and four bytes and each height of a tile of rows.

    Args:
        shape: Of the experts.
        device: A GPU with memory for a training step of the largest share: 10 GB in fp32 at the default shape.
        dtypes: One for each size of an element.
        shares: Rows per expert.
        timer: Returns the milliseconds of a launch.
        until: When to stop, by `time.time()`; what was timed by then counts.
        wrong: See `try_tiles`.

    Yields:
        The fastest tile of each kernel, size of an element and height. Where every tile is refused nothing is yielded,
        and the table's tile stays in use.
    """
    for dtype in dtypes:
        for share in sorted(shares, reverse=True):  # what is worth most comes first
            if time.time() > until:
                return
            m = tiles.row_tile(share * shape.experts, shape.experts)
            for kernel, launch in _by_entry(shape, launches(shape, share, dtype, device)).items():
                if kernel == "weights" and m != 128:
                    continue  # its tiles do not follow the share
                trials = try_tiles(launch, _survivors(kernel, m, dtype.itemsize), timer, until, wrong)
                times = {trial.tile: trial.milliseconds for trial in trials if trial.milliseconds is not None}
                if times:
                    yield Timed(kernel, dtype.itemsize, min(times, key=times.__getitem__), times)


def _by_entry(shape: Shape, made: dict[str, Launch]) -> dict[str, Launch]:
    """Return one launch for each entry of the table: the first that uses it."""
    found: dict[str, Launch] = {}
    for name, launch in made.items():
        found.setdefault(entry_of(name, shape), launch)
    return found


def entry_of(name: str, shape: Shape) -> str:
    """Return the entry in the table of tiles that the launch of this name uses."""
    return tiles.entry(name.partition(",")[0], summed(name, shape))


def summed(name: str, shape: Shape) -> int:
    """Return how many elements the launch of this name sums, but for "weights", which sums rows."""
    return {"rows": shape.intermediate, "rows, gradient of x": 2 * shape.intermediate}.get(name, shape.hidden)


def _survivors(kernel: str, m: int, itemsize: int) -> Iterable[Tile]:
    """Return those of the table's tile and its neighbors that neither spill nor fail to fit."""
    short = kernel == "short_rows"
    base = tiles.choose("rows" if short else kernel, architecture(), m, 1 << 20, tiles.SHORT << (not short), itemsize)
    near = [
        base,
        replace(base, n=base.n * 2),
        replace(base, n=base.n // 2),
        replace(base, n=base.n // 2, stages=base.stages - 1),
        replace(base, k=base.k // 2, stages=base.stages + 1),
        replace(base, warps=12 - base.warps),  # 4 and 8
        replace(base, stages=base.stages + 1),
        *([replace(base, tma=not base.tma)] if has_tma() and itemsize == 2 else []),
        *([replace(base, persistent=True)] if base.tma and kernel.endswith("rows") else []),
    ]
    sane = (t for t in near if 16 <= t.n <= 256 and t.k >= 16)
    return (tile for tile in sane if not tile_faults(kernel, architecture(), tile, itemsize))


def launches(shape: Shape, share: int, dtype: torch.dtype, device: torch.device) -> dict[str, Launch]:
    """Return one launch of each kernel as a training step makes it, and other uses, with tokens spread at random.

    Args:
        shape: Of the experts.
        share: Rows per expert.
        dtype: Of everything but the routing.
        device: A GPU, or the meta device to compile and not launch.
    """
    tokens = max(1, share * shape.experts // shape.top_k)
    choices = tokens * shape.top_k
    generator = None if device.type == "meta" else torch.Generator(device).manual_seed(0)

    def new(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device, dtype=dtype)

    ids_TK = new(tokens, shape.experts).topk(shape.top_k).indices
    x_TH, weights_TK = new(tokens, shape.hidden), new(tokens, shape.top_k)
    up_EJH = new(shape.experts, 2 * shape.intermediate, shape.hidden)
    down_EHI = new(shape.experts, shape.hidden, shape.intermediate)
    inputs = ExpertInputs(x_TH, ids_TK, weights_TK, up_EJH, down_EHI, None, None, "silu", True)
    kept = Kept(new(choices, 2 * shape.intermediate), *sort_by_expert(ids_TK, shape.experts))
    a_SI, offsets_E1 = new(choices, shape.intermediate), kept.offsets_E1
    cut = experts.cut(offsets_E1, choices)
    routing, x_SH = (*kept[1:], cut), experts.launch_gather(x_TH, *kept[1:], shape.top_k)
    return {
        "up": lambda: experts.launch_up(inputs, *routing, keep=True),
        "up, inference": lambda: experts.launch_up(inputs, *routing, keep=False),
        "rows": lambda: experts.launch_rows(a_SI, down_EHI.transpose(1, 2), None, offsets_E1, cut),
        "rows, gradient of x": lambda: experts.launch_rows(kept.z_SJ, up_EJH, None, offsets_E1, cut),
        "down_backward": lambda: experts.launch_down_backward(x_TH, inputs, kept, cut),
        "weights": lambda: experts.launch_weights(kept.z_SJ, x_SH, offsets_E1),
        "weights, down": lambda: experts.launch_weights(x_SH, a_SI, offsets_E1),
    }
