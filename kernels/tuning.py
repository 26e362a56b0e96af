"""Time a few tiles for each kernel on the GPU at hand: those beside the table's that the static report lets live.

Shape legend as in `moeify.kernels.triton_experts`.
"""

# mypy: disable-error-code="import-untyped"

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
import triton
from torch import Tensor

from moeify.kernels import tiles, triton_experts, tuned_tiles
from moeify.kernels.layout import sort_by_expert
from moeify.kernels.static_report import tile_faults
from moeify.kernels.tiles import Tile
from moeify.kernels.triton_target import architecture

Launch = Callable[[], object]
SHARES = (16, 32, 256, 2048)  # rows of an expert, one for each height of a tile of rows: decoding to training
DTYPES = (torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Shape:
    """The experts to tune for. The default is Qwen3-30B-A3B's, the shape that other kernels publish."""

    hidden: int = 2048
    inner: int = 768
    experts: int = 128
    top_k: int = 8


@dataclass(frozen=True)
class Timed:
    """The fastest tile of one kernel and class, and the milliseconds of all that were timed, the table's own first."""

    kernel: str
    itemsize: int
    tile: Tile
    times: dict[Tile, float]


def milliseconds(launch: Launch) -> float:
    """Median time of a launch on the device."""
    return float(triton.testing.do_bench(launch, warmup=10, rep=50, return_mode="median"))


def tune(
    shape: Shape,
    device: torch.device,
    dtypes: tuple[torch.dtype, ...] = DTYPES,
    shares: tuple[int, ...] = SHARES,
    timer: Callable[[Launch], float] = milliseconds,
) -> Iterator[Timed]:
    """Time the candidates of every kernel, for types of two and four bytes and each height of a tile of rows.

    Args:
        shape: of the experts.
        device: a GPU with memory for a training step of the largest share: 10 GB in fp32 at the default shape.
        dtypes: one for each size of an element.
        shares: rows per expert.
        timer: returns the milliseconds of a launch.

    Yields:
        The fastest tile of each kernel and class. A class of which no tile survives is left out: it keeps the table's.
    """
    for dtype in dtypes:
        for share in shares:
            m = tiles.row_tile(share * shape.experts, shape.experts)
            for kernel, launch in _launches(shape, share, dtype, device).items():
                if kernel == "weights" and m != 128:
                    continue  # its tiles do not follow the share
                times = {tile: _time(tile, launch, timer) for tile in _survivors(kernel, m, dtype.itemsize)}
                if times:
                    yield Timed(kernel, dtype.itemsize, min(times, key=times.__getitem__), times)


def _survivors(kernel: str, m: int, itemsize: int) -> list[Tile]:
    """The table's tile and its neighbours, one step in one direction, that neither spill nor fail to fit."""
    base = tiles.choose(kernel, architecture(), m, 1 << 20, 1 << 20, itemsize)
    near = [
        base,
        replace(base, n=base.n * 2),
        replace(base, n=base.n // 2),
        replace(base, k=base.k // 2, stages=base.stages + 1),
        replace(base, warps=12 - base.warps),  # 4 and 8
        replace(base, stages=base.stages + 1),
    ]
    sane = (t for t in near if 16 <= t.n <= 128 and t.k >= 16)
    return [tile for tile in sane if not tile_faults(kernel, architecture(), tile, itemsize)]


def _time(tile: Tile, launch: Launch, timer: Callable[[Launch], float]) -> float:
    with tuned_tiles.on_trial(tile):
        return timer(launch)


def _launches(shape: Shape, share: int, dtype: torch.dtype, device: torch.device) -> dict[str, Launch]:
    """One launch of each kernel as a training step makes it, tokens spread at random."""
    tokens = max(1, share * shape.experts // shape.top_k)
    generator = torch.Generator(device).manual_seed(0)

    def random(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device, dtype=dtype)

    ids_TK = random(tokens, shape.experts).topk(shape.top_k).indices
    order_S, offsets_E1 = sort_by_expert(ids_TK, shape.experts)
    x_TH, weights_TK = random(tokens, shape.hidden), random(tokens, shape.top_k)
    up_EJH = random(shape.experts, 2 * shape.inner, shape.hidden)
    down_EHI = random(shape.experts, shape.hidden, shape.inner)
    z_SJ, a_SI = random(len(order_S), 2 * shape.inner), random(len(order_S), shape.inner)
    routing = order_S, offsets_E1
    return {
        "up": lambda: triton_experts.launch_up(x_TH, up_EJH, None, *routing, shape.top_k, "silu", True, True),
        "rows": lambda: triton_experts.launch_rows(a_SI, down_EHI.transpose(1, 2), None, offsets_E1),
        "down_backward": lambda: triton_experts.launch_down_backward(
            x_TH, down_EHI, z_SJ, weights_TK, *routing, "silu", True
        ),
        "weights": lambda: triton_experts.launch_weights(z_SJ, x_TH, *routing, shape.top_k, gather="right"),
    }
