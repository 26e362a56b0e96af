"""Where the time of a training step goes: each kernel alone."""

from __future__ import annotations

import torch

from benchmarks.gpu.no_driver import compile_only
from benchmarks.gpu.run import Run
from benchmarks.gpu.shapes import Shape, route, shapes
from benchmarks.gpu.stages.environment import dense_tflops
from moeify.kernels.gpu import experts, layout
from moeify.kernels.tools.tuning import launches

NAMES = ("Qwen3-30B-A3B", "Mixtral-8x7B", "OLMoE", "DeepSeek-V2-Lite")
# How many projections each launch computes; the up projection of a gated FFN is two.
PROJECTIONS = {"up": 2, "up, inference": 2, "rows": 1, "rows, gradient of x": 2, "down_backward": 1, "weights": 2,
               "weights, down": 1}  # fmt: skip


def stage(run: Run) -> None:
    """Time every kernel at each shape; in a dry run compile it."""
    if run.dry:
        with compile_only():
            _products(run, "tiny", shapes(True)["tiny"], torch.device("meta"))
        return
    for name, shape in shapes(False, *NAMES).items():
        if run.left() < 8:
            return
        _products(run, name, shape, run.device)
        _others(run, name, shape)
        run.free_memory()


def _products(run: Run, name: str, shape: Shape, device: torch.device) -> None:
    dense = dense_tflops(run)
    for part, launch in launches(shape.for_tuning, shape.share, torch.bfloat16, device).items():
        ms = run.attempt(f"{name}: {part}", run.milliseconds, launch)
        if ms:
            tflops = PROJECTIONS[part] * shape.products / ms / 1e9
            run.put(f"{name}: {part}", ms=ms, tflops=tflops, of_dense=tflops / dense)


def _others(run: Run, name: str, shape: Shape) -> None:
    """Time the routing layout, the tile map and the combination, which move bytes and multiply nothing."""
    ids, choices = route(shape, run.device), shape.tokens * shape.top_k
    y = torch.randn(choices, shape.hidden, device=run.device, dtype=torch.bfloat16)
    weights = torch.rand(shape.tokens, shape.top_k, device=run.device, dtype=torch.bfloat16)
    order = layout.routing_layout(ids, shape.experts)
    offsets, inverse = order.offsets_E1, order.inverse_S
    run.put(f"{name}: routing", ms=run.milliseconds(lambda: layout.routing_layout(ids, shape.experts)))
    run.put(f"{name}: tile map", ms=run.milliseconds(lambda: layout.tile_map(offsets, choices, 128)))
    ms = run.milliseconds(lambda: experts.launch_combine(y, weights, inverse, offsets, shape.tokens))
    run.put(f"{name}: combine", ms=ms, tb_s=(choices + shape.tokens) * shape.hidden * 2 / ms / 1e9)
