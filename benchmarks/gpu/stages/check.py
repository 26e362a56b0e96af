"""Every kernel against float64: all heights of a tile, dtypes, activations, ids outside, fresh memory full of NaN."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks.gpu.run import Run
from benchmarks.gpu.shapes import Shape, route
from moeify.kernels import reference
from moeify.kernels.activations import ACTIVATIONS
from moeify.kernels.ops import experts
from moeify.kernels.tools.selfcheck import Case, check_experts, self_check
from moeify.measure import TOLERANCE, relative_difference

Kind = Literal["bfloat16", "float16", "float32", "tf32"]
PRECISION: dict[Kind, tuple[torch.dtype, str]] = {
    "bfloat16": (torch.bfloat16, "ieee"),
    "float32": (torch.float32, "ieee"),
    "tf32": (torch.float32, "tf32"),
    "float16": (torch.float16, "ieee"),
}
LIMITS = {**TOLERANCE, "tf32": TOLERANCE["float16"]}  # both have ten bits after the point
CASES = (
    Case(1024, 2, 2, 256, 384),  # 128 rows, whole tiles
    Case(1500, 2, 3, 264, 136),  # 128 rows, ragged widths: masks in the loops
    Case(700, 1, 1, 200, 72),  # 128 rows, one expert
    Case(120, 2, 8, 256, 128),  # 32 rows
    Case(130, 3, 16, 72, 40),  # 32 rows, ragged
    Case(600, 2, 8, 384, 256),  # 64 rows
    Case(5, 2, 8, 128, 256),  # 16 rows
    Case(1, 8, 128, 256, 96),  # a decoding step
)
FAR = Shape(180_000, 2048, 768, 16, 8)  # its pre-activation has more than 2**31 elements


def stage(run: Run) -> None:
    """Run the library's own self-check, then what it leaves out."""
    kinds: tuple[Kind, ...] = ("float32", "float16", "bfloat16")
    for kind in kinds:
        run.attempt(f"self_check {kind}", _self_check, run, kind)
    plan = list(planned(run.dry))
    bad, done = [], 0
    for case, kind in plan:
        if run.left() < 12:
            break
        done += 1
        if not run.attempt(f"{case} {kind}", _check, run, case, kind):
            bad.append(f"{case} {kind}")
    run.put("checks", done=done, planned=len(plan), bad=len(bad), which=bad[:6])
    if not run.dry and run.left() > 10:
        run.attempt("past 2^31", _past_2_31, run)


def planned(dry: bool) -> Iterator[tuple[Case, Kind]]:
    """Yield the cases in every dtype, without a gate, and with every activation."""
    if dry:
        yield from zip(CASES[3:], PRECISION, strict=False)
        return
    yield from ((case, kind) for kind in PRECISION for case in CASES)
    yield from ((replace(case, activation="gelu", gated=False), "bfloat16") for case in CASES)
    yield from ((replace(case, activation="gelu_tanh"), "bfloat16") for case in CASES)
    yield from ((replace(CASES[1], activation=name), "bfloat16") for name in ACTIVATIONS)


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Inside the block fresh memory holds NaN, so that a row which nobody writes shows."""
    deterministic: Any = torch.utils.deterministic
    torch.use_deterministic_algorithms(True, warn_only=True)
    before, deterministic.fill_uninitialized_memory = deterministic.fill_uninitialized_memory, True
    try:
        yield
    finally:
        deterministic.fill_uninitialized_memory = before
        torch.use_deterministic_algorithms(False)


def _self_check(run: Run, kind: Kind) -> None:
    found = list(self_check(run.device, PRECISION[kind][0], relative_difference))
    wrong = [f"{check.name} {check.difference:.1e}" for check in found if not check.difference <= LIMITS[kind]]
    worst = max(check.difference for check in found)
    run.put(f"self_check {kind}", checks=len(found), worst=worst, wrong=wrong)


def _check(run: Run, case: Case, kind: Kind) -> bool:
    """Check one case; two runs with equal bits differ by 0 there, others by infinity."""
    dtype, precision = PRECISION[kind]
    matmul: Any = torch.backends.cuda.matmul
    matmul.fp32_precision = precision
    try:
        with poisoned_memory():
            found = list(check_experts(case, dtype, run.device, relative_difference))
    finally:
        matmul.fp32_precision = "ieee"
    worst = max(found, key=lambda check: (check.difference != check.difference, check.difference))
    ok = worst.difference <= LIMITS[kind]
    run.put(f"experts {case} {kind}", ok=ok, worst=worst.difference, of=worst.name.rpartition(": ")[2])
    return ok


def _past_2_31(run: Run) -> None:
    """Compare the last tokens, whose rows lie past 2**31 elements, with float32."""
    generator = torch.Generator(run.device).manual_seed(0)

    def randn(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=run.device, dtype=torch.bfloat16)

    x, weights, grad = randn(FAR.tokens, FAR.hidden), randn(FAR.tokens, FAR.top_k), randn(FAR.tokens, FAR.hidden)
    up = randn(FAR.experts, 2 * FAR.intermediate, FAR.hidden) * FAR.hidden**-0.5
    down = randn(FAR.experts, FAR.hidden, FAR.intermediate) * FAR.intermediate**-0.5
    ids, last = route(FAR, run.device), slice(FAR.tokens - 256, FAR.tokens)
    leaves = [t.requires_grad_() for t in (x, weights)]
    few = [t[last].detach().float().requires_grad_() for t in leaves]
    out = experts(*(x, ids, weights, up, down), activation="silu", gated=True)
    got = [out, *torch.autograd.grad(out, leaves, grad)]
    exact = reference.experts(few[0], ids[last], few[1], up.float(), down.float(), None, None, "silu", True)
    want = [exact, *torch.autograd.grad(exact, few, grad[last].float())]
    worst = max(relative_difference(a[last], b) for a, b in zip(got, want, strict=True))
    elements = 2 * FAR.tokens * FAR.top_k * FAR.intermediate
    run.put("past 2^31", elements=elements, ok=worst <= LIMITS["bfloat16"], worst=worst)
