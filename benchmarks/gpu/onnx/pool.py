"""Exports, comparisons and captures of many models, side by side, each in a process of its own."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.process import BaseProcess
from typing import Any

import torch
import transformers

from benchmarks.gpu.onnx.jobs import export_and_check
from benchmarks.gpu.onnx.layers import BIG, LAYERS, write_graphs
from benchmarks.gpu.onnx.plan import JOBS
from benchmarks.gpu.run import Run

_torch: Any = torch  # for its untyped parts
_STARTED = 8  # seconds that a job needs to be worth its start
_LONGEST = 60  # seconds of one job
_MODELS = (  # imported once, before the pool forks
    "BertModel", "GPT2LMHeadModel", "GptOssForCausalLM", "MistralForCausalLM", "MixtralForCausalLM",
    "Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM",
)  # fmt: skip


@dataclass(frozen=True)
class Running:
    """A job that has been started."""

    name: str
    process: BaseProcess
    until: float


def stage(run: Run) -> None:
    """Run all jobs, the most important first; what is not reached is said."""
    if run.dry:
        for name in ("mixtral-cuda-float16-int4", "bert_exact-portable-float16"):
            one = replace(run, stage=name)
            one.attempt("job", export_and_check, one, name, 1)
        run.attempt("layers", write_graphs, run, next(iter(LAYERS)))
        return
    for name in _MODELS:
        getattr(transformers, name)
    cores = os.cpu_count() or 4
    width = min(12, max(2, cores * 3 // 4))
    threads = max(1, cores * 3 // 2 // width)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    names = list(JOBS)
    waiting = [*names[:2], *map(_layer, LAYERS), *names[2:6], *map(_layer, BIG), *names[6:]]
    run.put("pool", width=width, threads=threads, jobs=len(waiting), forks=not _torch.cuda.is_initialized())
    left = run_all(run, waiting, width, lambda one, name: _job(one, name, threads))
    if left:
        run.put("jobs not reached", jobs=left)


def run_all(run: Run, waiting: list[str], width: int, job: Callable[[Run, str], None]) -> list[str]:
    """Run named jobs in forked processes, `width` at a time, until the deadline; return those that were not started."""
    context, waiting = multiprocessing.get_context("fork"), list(waiting)
    running: list[Running] = []
    while running or (waiting and run.left() > _STARTED):
        while waiting and len(running) < width and run.left() > _STARTED:
            name, until = waiting.pop(0), min(run.until - 3, time.time() + _LONGEST)
            process = context.Process(target=_child, args=(replace(run, stage=name, until=until), job))
            process.start()
            running.append(Running(name, process, until))
        for one in list(running):
            if one.process.is_alive() and time.time() > one.until:
                one.process.kill()
            if not one.process.is_alive():
                one.process.join()
                running.remove(one)
                if one.process.exitcode:
                    run.put(one.name, failed=f"ended with {one.process.exitcode}")
        time.sleep(0.05)
    return waiting


def _layer(label: str) -> str:
    return f"layer:{label}"


def _job(run: Run, name: str, threads: int) -> None:
    kind, _, label = name.partition(":")
    if kind == "layer":
        write_graphs(run, label)
    else:
        export_and_check(run, name, threads)


def _child(run: Run, job: Callable[[Run, str], None]) -> None:
    """Run a job in a process that has imported everything and has not touched the GPU."""
    started = time.time()
    run.attempt("job", job, run, run.stage)
    run.put("job ended", seconds=time.time() - started)
    sys.stdout.flush()
    os._exit(0)
