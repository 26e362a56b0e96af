"""More tiles than `moeify doctor --tune` tries, in bf16: each against the table's own tile.

The winners go to a file that kernels read.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby, product
from statistics import mean

import torch
from torch import Tensor

from benchmarks.gpu.candidates import CANDIDATES
from benchmarks.gpu.layer import make_inputs, timed
from benchmarks.gpu.no_driver import compile_only
from benchmarks.gpu.run import Run
from benchmarks.gpu.shapes import SHAPES, TINY, Shape, shapes
from benchmarks.gpu.stages.environment import dense_tflops
from moeify.kernels.gpu import tiles, tuned_tiles
from moeify.kernels.gpu.tiles import Tile
from moeify.kernels.tools.trials import try_tiles
from moeify.kernels.tools.tuning import entry_of, launches, summed
from moeify.measure import TOLERANCE, relative_difference

FILE = "tiles.json"
SHARES = (2048, 128, 16, 32)  # rows of an expert, by what is worth most: training, then decoding
USES = ("up", "rows", "rows, gradient of x", "down_backward", "weights", "weights, down")
DEEP = ((64, 3), (64, 4), (64, 5), (32, 5), (128, 3))  # summed elements and stages of tall tiles
SHALLOW = ((64, 4), (64, 6), (128, 3))
SHARED, ACCUMULATORS = 200_000, 128  # bytes of a block, and registers of a thread, that a candidate may take
Times = dict[Tile, float]


@dataclass(frozen=True)
class Trial:
    """One kernel's use with one tile."""

    shape: Shape
    launch: str
    tile: Tile


def candidates(dry: bool) -> Iterator[Trial]:
    """Yield what is tried, the most valuable first and the table's own tile before its rivals."""
    base = TINY["tiny"] if dry else SHAPES["Qwen3-30B-A3B"]
    for share in SHARES[:1] if dry else SHARES:
        shape = base._replace(tokens=max(1, share * base.experts // base.top_k))
        height = tiles.row_tile(share * base.experts, base.experts)
        for use in USES:
            kernel = use.partition(",")[0]
            if kernel == "weights" and height != 128:
                continue
            table = tiles.choose(kernel, "sm_90", height, 1 << 20, summed(use, shape.for_tuning), 2)
            near = dict.fromkeys(
                tile for tile in _near(table, kernel == "rows" and height == 128) if _may_fit(kernel, tile)
            )
            yield from (Trial(shape, use, tile) for tile in near)


def _near(table: Tile, rows: bool) -> Iterator[Tile]:
    yield table
    yield replace(table, tma=not table.tma)
    if rows:
        yield replace(table, tma=True, persistent=True)
    tall = table.m >= 64
    for n, warps, (k, stages) in product((64, 128, 256) if tall else (32, 64, 128), (4, 8), DEEP if tall else SHALLOW):
        yield replace(table, n=n, k=k, warps=warps, stages=stages)
    if table.m == 128:
        yield from (replace(table, group_m=group) for group in (1, 4, 16))


def _may_fit(kernel: str, tile: Tile) -> bool:
    halves = 2 if kernel == "up" else 1
    accumulators = tile.m * tile.n * halves / (32 * tile.warps)
    limit = ACCUMULATORS // 2 if kernel == "down_backward" else ACCUMULATORS  # its epilogue holds as much again
    return tiles.least_shared(kernel, tile, 2) <= SHARED and accumulators <= limit


def stage(run: Run) -> None:
    """Time the candidates of each use, and write the best file so far after each."""
    groups = [(key, list(trials)) for key, trials in groupby(candidates(run.dry), lambda t: (t.shape, t.launch))]
    if run.dry:
        with compile_only():
            for (shape, use), trials in groups[:1]:
                launch = launches(shape.for_tuning, shape.share, torch.bfloat16, torch.device("meta"))[use]
                _times(run, use, launch, [trial.tile for trial in trials[:3]])
        return
    found: dict[tuple[str, int], list[Times]] = defaultdict(list)
    for shape, group in groupby(groups, lambda item: item[0][0]):
        run.free_memory()
        made = launches(shape.for_tuning, shape.share, torch.bfloat16, run.device)
        for (_, use), trials in group:
            if run.left() < 6:
                run.put("tuning cut short", at=f"{use} {shape.share}")
                return
            times = _times(run, use, made[use], [trial.tile for trial in trials])
            if times:
                _report(run, use, shape, trials[0].tile, times)
                first = times.get(trials[0].tile)
                found[entry_of(use, shape.for_tuning), trials[0].tile.m].append(
                    {tile: ms / (first or ms) for tile, ms in times.items()}
                )
                _write(run, found)


def _times(run: Run, use: str, launch: Callable[[], object], tried: list[Tile]) -> Times:
    """Return the milliseconds of each tile whose result is that of the first."""
    times = Times()
    check = None if run.dry else _wrong
    for trial in try_tiles(launch, tried, lambda one: run.milliseconds(one, 5, 25), run.until - 3, check):
        if trial.milliseconds is not None:
            times[trial.tile] = trial.milliseconds
        else:
            run.put(f"no {use}", tile=str(trial.tile), error=trial.fault[:120])
    return times


def _wrong(got: Tensor, want: Tensor) -> str:
    difference = relative_difference(got, want)
    return "" if difference <= TOLERANCE["bfloat16"] else f"off by {difference:.1e}"


def _report(run: Run, use: str, shape: Shape, table: Tile, times: Times) -> None:
    ranked = sorted(times.items(), key=lambda item: item[1])
    own, (best, fastest) = times.get(table, float("nan")), ranked[0]
    top = [
        f"{t.n}x{t.k} w{t.warps} s{t.stages} g{t.group_m}{' tma' * t.tma}{' persistent' * t.persistent} {ms:.3f}"
        for t, ms in ranked[:5]
    ]
    run.put(
        f"tuned {use}, {table.m} rows", rows=shape.share, table_ms=own, best_ms=fastest, gain=own / fastest,
        best=str(best), top=top,
    )  # fmt: skip


def _write(run: Run, found: dict[tuple[str, int], list[Times]]) -> None:
    """Write, for each kernel and height, the tile that is best on average over the uses it was timed in."""
    table = {}
    for (kernel, height), uses in found.items():
        everywhere = [tile for tile in uses[0] if all(tile in times for times in uses)]
        if everywhere:
            best = min(everywhere, key=lambda tile: mean(times[tile] for times in uses))
            table[kernel, height, 2] = best
    (run.out / FILE).write_text(tuned_tiles.text_of(table))


def tuned(run: Run) -> None:
    """Time the layer again with the tiles in the file."""
    if not (run.out / FILE).exists():
        run.put("no file of tiles")
        return
    os.environ["MOEIFY_TILES"] = str(run.out / FILE)
    for name, shape in list(shapes(run.dry).items())[:4]:
        if run.left() < 6:
            return
        inputs = make_inputs(shape, run.device)
        run.put(f"{name}: moeify tuned", **timed(run, CANDIDATES["moeify"], shape, inputs, dense_tflops(run)))
