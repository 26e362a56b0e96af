"""The programs that NVIDIA's tools run: small shapes for compute-sanitizer, one training step for ncu."""

from __future__ import annotations

import torch

from benchmarks.gpu.candidates import CANDIDATES
from benchmarks.gpu.layer import Step, make_inputs
from benchmarks.gpu.run import Run
from benchmarks.gpu.shapes import SHAPES, TINY
from moeify.kernels.tools.selfcheck import CASES, check_experts
from moeify.measure import relative_difference


def every_height(run: Run) -> None:
    """Run every height of a tile, forward and backward, with biases and ids outside."""
    for case in CASES:
        found = list(check_experts(case, torch.bfloat16, run.device, relative_difference))
        run.put(f"experts {case}", worst=max(check.difference for check in found))


def step(run: Run) -> None:
    """Run one forward and backward pass."""
    inputs = make_inputs(TINY["tiny"] if run.dry else SHAPES["Qwen3-30B-A3B"], run.device)
    Step(CANDIDATES["moeify"], inputs).both()
