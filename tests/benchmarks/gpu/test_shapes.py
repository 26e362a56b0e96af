from __future__ import annotations

import torch

from benchmarks.gpu.layer import make_inputs
from benchmarks.gpu.shapes import SHAPES, TINY, Shape, route, shapes
from benchmarks.gpu.stages.tune import candidates
from moeify.kernels.gpu import tiles
from moeify.kernels.gpu.tiles import Tile

CPU = torch.device("cpu")


def test_choices_of_a_token_are_distinct_and_zipfs_law_is_uneven() -> None:
    even, zipf = Shape(4000, 8, 8, 16, 4), Shape(4000, 8, 8, 16, 4, zipf=True)
    for shape in (even, zipf):
        ids = route(shape, CPU)
        assert ids.shape == (4000, 4) and all(len(set(row)) == 4 for row in ids.tolist())
    uneven, flat = (route(shape, CPU).flatten().bincount() for shape in (zipf, even))
    assert flat.max() < 1.2 * flat.min() and uneven[0] > 4 * uneven[-1]


def test_a_dry_run_has_tiny_shapes() -> None:
    assert shapes(True) == TINY and list(shapes(True, "OLMoE", "Mixtral-8x7B")) == ["tiny"]
    assert shapes(False, "OLMoE") == {"OLMoE": SHAPES["OLMoE"]} and shapes(False) == SHAPES


def test_inputs_are_as_large_as_a_layers() -> None:
    inputs = make_inputs(TINY["tiny"], CPU)
    assert {t.dtype for t in (inputs.x, inputs.weights, inputs.up, inputs.down)} == {torch.bfloat16}
    assert inputs.up.shape == (6, 96, 64) and 0.8 < float(inputs.up.float().std()) * 8 < 1.2


def test_candidates_begin_with_the_tables_tile_and_may_fit() -> None:
    trials, first = list(candidates(False)), dict[tuple[int, str], Tile]()
    for trial in trials:
        first.setdefault((trial.shape.share, trial.launch), trial.tile)
        kernel = trial.launch.partition(",")[0]
        assert tiles.least_shared(kernel, trial.tile, 2) <= 200_000
    for (share, use), tile in first.items():
        height = tiles.row_tile(share * 128, 128)
        table = tiles.TILES["sm_90"]
        own = table["short_rows"] if use == "rows" and height == 128 else table[use.partition(",")[0]]
        assert tile == own[height]
    assert {trial.tile.n for trial in trials} == {32, 64, 128, 256} and len(set(trials)) == len(trials)
