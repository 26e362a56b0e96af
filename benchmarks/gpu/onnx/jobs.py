"""One job of the pool: a model exported with its proof, compared on the provider under test, and captured."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import moeify
from benchmarks.gpu.onnx.capture import capture
from benchmarks.gpu.onnx.models import (
    CONVERTED,
    build,
    forward,
    in_pieces,
    is_decoder,
    round_experts,
    text_inputs,
)
from benchmarks.gpu.onnx.plan import JOBS, Job
from benchmarks.gpu.onnx.sessions import Bound, Session, executed, open_session
from benchmarks.gpu.run import Run
from moeify.export.targets import TARGETS
from moeify.runtime import session

FLOORS = {"float32": 2e-4, "float16": 6e-3, "bfloat16": 5e-2}  # what a token may be off by, root mean squares
OFF = 0.05  # a token that is off by more has probably gone to another expert
SHAPES = (  # batch, pieces, padding: shapes that the trace never saw
    (2, (7, 1, 3), 0), (3, (33, 1, 1), 3), (8, (1, 1), 0), (1, (512, 1), 0), (2, (300, 17, 1), 150),
)  # fmt: skip


def model_path(run: Run, name: str) -> Path:
    """Return where a job leaves its file."""
    return models_folder(run) / f"{name}.onnx"


def models_folder(run: Run) -> Path:
    """Return the folder of exported models: gigabytes, which are not results."""
    folder = Path(os.environ.get("ONNX_MODELS", run.out / "models"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def export_and_check(run: Run, name: str, threads: int) -> None:
    """Run one job; each step that fails is a record.

    Args:
        run: Of the pool, with the job's name as its stage.
        name: In `JOBS`.
        threads: Of the proof.
    """
    job, path = JOBS[name], model_path(run, name)
    model = run.attempt("build", build, job.model, run.dry)
    if model is None:
        return
    model = model.to(getattr(torch, job.dtype))
    with proof_threads(threads):
        report = run.attempt("export", moeify.export_onnx, model, path, job.target, job.quantize, overwrite=True)
    if report is None:
        return
    run.put("export", relative=report.relative, rounding=report.rounding, operators=report.operators)
    opened = run.attempt("session", open_session, run, path, profile=path.with_suffix(".profile"))
    if opened is None:
        return
    run.attempt("check", check, run, opened, job, model)
    run.put("where", **(run.attempt("where", executed, opened) or {}))
    run.attempt("graph", capture, run, path)


@contextmanager
def proof_threads(threads: int) -> Iterator[None]:
    """Inside the block the proof takes few cores, because a dozen run side by side."""
    with mock.patch("moeify.export.pipeline.open_session", partial(session.open_session, threads=threads)):
        yield


def check(run: Run, opened: Session, job: Job, model: Any) -> None:
    """Compare with PyTorch in float32, and say what PyTorch itself loses in this dtype."""
    same = copy.deepcopy(model)
    if job.quantize:
        operator = TARGETS[job.target].forms[job.quantize].operator
        assert operator is not None and operator.bits is not None
        round_experts(same, job.model, operator.bits, operator.block)
    reference = copy.deepcopy(same).float()
    # moeify's own GPU kernels are not the reference here, so its experts are computed on the CPU.
    device = torch.device("cpu") if job.model in CONVERTED else run.device
    models: dict[str, nn.Module] = {"reference": reference.to(device), "torch": same.to(device)}
    for each in models.values():
        eager: Any = getattr(each, "set_experts_implementation", None)
        if eager is not None and job.model not in CONVERTED:
            eager("eager")
    taken = {argument.name for argument in opened.get_inputs()}  # GPT-2 accepts token types, which its graph does not
    for batch, pieces, padding in SHAPES[: 2 if run.dry else None]:
        inputs = text_inputs(batch, sum(pieces), padding, seed=batch)
        inputs = {name: value for name, value in inputs.items() if name in taken}
        if is_decoder(opened):
            got = in_pieces(run, opened, inputs, pieces)
        else:
            got = next(iter(Bound(run, opened, inputs).run().values())).float()
        case = f"{batch} x {'+'.join(map(str, pieces))}, padding {padding}"
        _compare(run, case, job, models, inputs, got)


def _compare(
    run: Run, case: str, job: Job, models: dict[str, nn.Module], inputs: dict[str, Tensor], got: Tensor
) -> None:
    live = inputs["attention_mask"].bool()
    want = forward(models["reference"], inputs).cpu()[live]
    found = {"ort": _difference(got.cpu()[live], want)}
    torch_logits = run.attempt("torch in this dtype", forward, models["torch"], inputs)
    if torch_logits is not None:
        found["torch"] = _difference(torch_logits.cpu()[live], want)
    # A token whose expert changes by rounding is far off in PyTorch too, so the token in the middle decides.
    limit = FLOORS[job.dtype] * (2 if job.quantize else 1)
    if "torch" in found:
        limit = max(limit, 2 * found["torch"]["median"])
    ok = found["ort"]["rms"] < float("inf") and found["ort"]["median"] <= limit
    run.put("compared", case=case, ok=ok, limit=limit, **found)


def _difference(got: Tensor, want: Tensor) -> dict[str, float]:
    """Return how far tokens are off, by the root mean square of what is expected."""
    off = (got - want).square().mean(-1).sqrt() / want.square().mean().sqrt()
    return {
        "rms": off.square().mean().sqrt().item(),
        "median": off.median().item(),
        "max": off.max().item(),
        "top1": (got.argmax(-1) == want.argmax(-1)).double().mean().item(),
        "off": (off > OFF).double().mean().item(),
    }
