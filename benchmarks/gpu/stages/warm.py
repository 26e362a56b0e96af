"""Triton's cache, filled by most cores while something else is measured: no driver, and tensors without data.

A kernel compiled so has the same key in the cache as one that is launched with real tensors.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from functools import partial
from multiprocessing import get_context
from typing import Any

import torch

from benchmarks.gpu.no_driver import compile_only
from benchmarks.gpu.run import Run, first_line
from benchmarks.gpu.shapes import DECODE_TOKENS, DECODED, SHAPES, Shape, shapes
from benchmarks.gpu.stages.check import CASES, PRECISION, Kind
from benchmarks.gpu.stages.quantized import TOKENS
from benchmarks.gpu.stages.tune import Trial, candidates
from moeify.kernels.gpu import experts, quantized, tuned_tiles
from moeify.kernels.inputs import ExpertInputs, Kept
from moeify.kernels.quantized import FORMATS, quantize
from moeify.kernels.tools import selfcheck, tuning

META = torch.device("meta")
Job = Callable[[], None]


def layers(run: Run) -> None:
    """Compile what the stages check, kernels, layers, decode and train launch."""
    jobs: list[Job] = [
        partial(compile_layer, shape, both) for shape in shapes(run.dry).values() for both in (False, True)
    ]
    jobs += [
        partial(compile_case, case, kind)
        for kind in ("bfloat16", "float32", "float16", "tf32")
        for case in CASES[: 1 if run.dry else None]
    ]
    if not run.dry:
        decoding = (SHAPES[name]._replace(tokens=tokens) for name in DECODED for tokens in DECODE_TOKENS)
        jobs += [partial(compile_layer, shape, False) for shape in decoding]
        jobs += [
            partial(compile_quantized, SHAPES[name]._replace(tokens=tokens), form)
            for name in DECODED
            for tokens in TOKENS
            for form in FORMATS
        ]
        jobs += [partial(compile_layer, Shape(8192, 1024, 2816, 8, 2), True)]
    compile_all(run, jobs[:3] if run.dry else jobs)


def tiles(run: Run) -> None:
    """Compile the candidates of the stage tune."""
    compile_all(run, [partial(compile_trial, trial) for trial in candidates(run.dry)][: 2 if run.dry else None])


def compile_all(run: Run, jobs: Sequence[Job]) -> None:
    """Run the jobs on most cores until the deadline, and say how far they came."""
    if run.dry:
        failed = [said for job in jobs if (said := attempt(job))]
        run.put("precompiled", jobs=len(jobs), of=len(jobs), failed=len(failed), first=failed[:3])
        return
    workers, context = max(2, (os.cpu_count() or 4) - 3), get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context)
    futures: list[Future[str | None]] = [pool.submit(attempt, job) for job in jobs]
    failed, done = [], 0
    try:
        for future in as_completed(futures, timeout=max(run.left(), 5)):
            done += 1
            failed += [said for said in [future.result()] if said]
    except TimeoutError:  # the rest is compiled when it is first launched
        processes: Any = pool._processes
        for process in processes.values():
            process.terminate()
    run.put("precompiled", jobs=done, of=len(jobs), failed=len(failed), first=failed[:3])
    sys.stdout.flush()
    os._exit(0)  # the pool would wait for what was stopped


def attempt(job: Job) -> str | None:
    """Run one job with no driver; return what went wrong."""
    try:
        with compile_only():
            job()
    except Exception as error:
        return f"{job}: {type(error).__name__}: {first_line(error)}"[:300]
    return None


def compile_layer(shape: Shape, backward: bool) -> None:
    """Compile what a layer of this shape launches in bf16."""

    def new(*size: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device=META)

    up = new(shape.experts, 2 * shape.intermediate, shape.hidden)
    down = new(shape.experts, shape.hidden, shape.intermediate)
    x, ids = new(shape.tokens, shape.hidden), new(shape.tokens, shape.top_k, dtype=torch.int64)
    weights = new(shape.tokens, shape.top_k)
    _compile(ExpertInputs(x, ids, weights, up, down, None, None, "silu", True), backward)


def compile_quantized(shape: Shape, form: str) -> None:
    """Compile what a layer of this shape launches with quantized weights."""
    up, down = (
        quantize(torch.empty(shape.experts, *sides, device=META), form)
        for sides in ((2 * shape.intermediate, shape.hidden), (shape.hidden, shape.intermediate))
    )
    x = torch.empty(shape.tokens, shape.hidden, dtype=torch.bfloat16, device=META)
    ids = torch.empty(shape.tokens, shape.top_k, dtype=torch.int64, device=META)
    weights = torch.empty(ids.shape, dtype=torch.bfloat16, device=META)
    inputs = ExpertInputs(x, ids, weights, up.values, down.values, None, None, "silu", True)
    quantized.quantized_experts(inputs, up.scales, down.scales)


def compile_case(case: selfcheck.Case, kind: Kind) -> None:
    """Compile what one case of the stage check launches."""
    dtype, precision = PRECISION[kind]
    matmul: Any = torch.backends.cuda.matmul
    matmul.fp32_precision = precision
    try:
        _compile(selfcheck.make_inputs(case, dtype, META), backward=True)
    finally:
        matmul.fp32_precision = "ieee"


def compile_trial(trial: Trial) -> None:
    """Compile one kernel with one tile."""
    with tuned_tiles.on_trial(trial.tile):
        tuning.launches(trial.shape.for_tuning, trial.shape.share, torch.bfloat16, META)[trial.launch]()


def _compile(inputs: ExpertInputs, backward: bool) -> None:
    if not backward:
        experts.experts_forward(inputs, keep=False)
        return
    _, kept = experts.experts_forward(inputs, keep=True)
    needs = [True, False, True, True, True, inputs.up_bias_EJ is not None, inputs.down_bias_EH is not None]
    experts.experts_backward(inputs.x_TH, inputs, Kept(*kept), needs)
