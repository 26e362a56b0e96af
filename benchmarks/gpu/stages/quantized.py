"""Experts with quantized weights: whether they are right, and their time beside bf16, from one token to thousands.

The floor is the time to read the weights of the chosen experts once.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.candidates import CHECKED, Inputs
from benchmarks.gpu.layer import captured, make_inputs
from benchmarks.gpu.run import Run
from benchmarks.gpu.shapes import DECODED, Shape, shapes
from benchmarks.gpu.stages.environment import bandwidth
from moeify.kernels import reference
from moeify.kernels.ops import experts, quantized_experts
from moeify.kernels.quantized import FORMATS, Quantized, quantize
from moeify.measure import TOLERANCE, relative_difference

TOKENS = (1, 16, 256, 4096, 32768)
LIMITS = {"fp8": 5e-2, "int4": TOLERANCE["bfloat16"]}  # a number between two of e4m3 may go to either
BYTES = {"bf16": 2.0, "fp8": 1.0, "int4": 0.5}  # of a weight


def stage(run: Run) -> None:
    """Check and time each format at each number of tokens."""
    for name, shape in shapes(run.dry, *DECODED).items():
        tokens = TOKENS[:2] if run.dry else TOKENS
        full = make_inputs(shape._replace(tokens=max(tokens)), run.device)
        for form in ("bf16", *FORMATS):
            weights = None if form == "bf16" else (quantize(full.up, form), quantize(full.down, form))
            for count in tokens:
                if run.left() > 4:
                    few = Inputs(full.x[:count], full.ids[:count], full.weights[:count], full.up, full.down)
                    what = f"{name}: {count} tokens, {form}"
                    run.attempt(what, _time, run, what, form, shape, few, weights)
        run.free_memory()


def _time(run: Run, what: str, form: str, shape: Shape, inputs: Inputs, weights: Any) -> None:
    x, ids, factors, up, down = vars(inputs).values()
    work: Callable[[], Tensor] = partial(experts, x, ids, factors, up, down, activation="silu", gated=True)
    found: dict[str, object] = {}
    if weights is not None:
        work = partial(quantized_experts, x, ids, factors, *weights, activation="silu", gated=True)
        difference = relative_difference(work()[:CHECKED], _expected(inputs, *weights))
        found = {"ok": difference <= LIMITS[form], "worst": difference}
    with torch.no_grad():
        eager = run.milliseconds(work)
        if not run.dry:
            found["graph_ms"] = run.milliseconds(captured(work)[0].replay)
    read = ids.unique().numel() * 3 * shape.hidden * shape.intermediate * BYTES[form]
    run.put(what, eager_ms=eager, floor_ms=read / bandwidth(run) / 1e9, **found)


def _expected(inputs: Inputs, up: Quantized, down: Quantized) -> Tensor:
    """Return what the first tokens give, in float32."""
    x, ids, factors = inputs.x[:CHECKED].float(), inputs.ids[:CHECKED], inputs.weights[:CHECKED].float()
    return reference.experts(
        x, ids, factors, up.values, down.values, None, None, "silu", True, up.scales, down.scales
    )  # fmt: skip
