"""The experts of a layer, forward and with gradients, beside what else computes them: each checked, then timed."""

# mypy: disable-error-code="import-untyped, import-not-found"

from __future__ import annotations

from typing import Any

from benchmarks.gpu.candidates import Candidate, Inputs, installed, refusal
from benchmarks.gpu.layer import make_inputs, timed
from benchmarks.gpu.run import Run
from benchmarks.gpu.shapes import DECODED, Shape, shapes
from benchmarks.gpu.stages.environment import dense_tflops

SLOW = {"loop": "Zipf"}  # a candidate, and the shapes that it is not timed at
# Of Liger's dozens of configurations those that its kernels choose from on Hopper: tuning over all takes minutes.
LIGER_HIDDEN = ((512, 4, 4), (256, 8, 4))
LIGER_ROWS = ((128, 128, 32, 8), (64, 128, 32, 4))
LIGER_COLUMNS = ((128, 64, 4, 3), (128, 64, 8, 3), (64, 64, 4, 4))


def stage(run: Run) -> None:
    """Time every candidate at every shape; Liger, which tunes itself first, comes last."""
    found = installed()
    liger = found.pop("Liger", None)
    for name, shape in shapes(run.dry).items():
        if run.left() < 15:
            run.put("shapes cut short", at=name)
            return
        compare(run, name, shape, {n: one for n, one in found.items() if SLOW.get(n, "-") not in name})
    if liger is not None:
        run.attempt("Liger", fewer_configurations, run)
        for name, shape in shapes(run.dry, *DECODED).items():
            if run.left() > 15:
                compare(run, name, shape, {"Liger": liger})


def compare(run: Run, name: str, shape: Shape, candidates: dict[str, Candidate]) -> None:
    """Time some candidates at one shape, on the same inputs."""
    inputs, dense = make_inputs(shape, run.device), dense_tflops(run)
    for label, candidate in candidates.items():
        if run.left() < 10:
            return
        what = f"{name}: {label}"
        run.attempt(what, _one, run, what, candidate, shape, inputs, dense)
        run.free_memory()


def _one(run: Run, what: str, candidate: Candidate, shape: Shape, inputs: Inputs, dense: float) -> None:
    reason = refusal(candidate, inputs)
    if reason:
        run.put(what, not_timed=reason)
    else:
        run.put(what, **timed(run, candidate, shape, inputs, dense))


def fewer_configurations(run: Run) -> None:
    """Leave Liger's kernels a few configurations to choose from."""
    import triton
    from liger_kernel.ops import fused_moe_kernels

    for name, kernel in vars(fused_moe_kernels).items():
        if isinstance(kernel, triton.runtime.Autotuner):
            kept = [one for one in kernel.configs if _is_kept(one)] or kernel.configs[:2]
            run.put(f"Liger {name}", configurations=len(kernel.configs), kept=len(kept))
            kernel.configs = kept


def _is_kept(configuration: Any) -> bool:
    sides, warps = configuration.kwargs, configuration.num_warps
    if "BLOCK_H" in sides:
        return (sides["BLOCK_H"], sides["BLOCK_K"], warps) in LIGER_HIDDEN
    if "BLOCK_M" in sides:
        return (sides["BLOCK_M"], sides["BLOCK_N"], sides["BLOCK_K"], warps) in LIGER_ROWS
    return (sides["BLOCK_N"], sides["BLOCK_K"], warps, configuration.num_stages) in LIGER_COLUMNS
