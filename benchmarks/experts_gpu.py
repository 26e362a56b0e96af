"""Check every kernel on this machine's GPU and time it beside torch's own ways to compute experts.

    python benchmarks/experts_gpu.py              prints a table
    python benchmarks/experts_gpu.py --json FILE  also writes everything as JSON, to attach to a report

Shapes are those that other kernels publish. TFLOP/s count useful products only: 6*T*K*H*I forward, three times that
with the backward pass. The share is of a large dense product measured on the same device.
"""

# mypy: disable-error-code="import-untyped"

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moeify.kernels.layout import routing_layout
from moeify.kernels.ops import combine, dispatch, experts
from moeify.kernels.selfcheck import self_check
from moeify.tolerances import TOLERANCE

# Tokens, hidden, inner, experts, top-k.
SHAPES = {
    "Qwen3-30B-A3B (Liger)": (32768, 2048, 768, 128, 8),
    "fine-grained (SonicMoE)": (32768, 4096, 768, 128, 8),
    "Mixtral-8x7B": (8192, 4096, 14336, 8, 2),
    "MegaBlocks XS": (65536, 512, 2048, 64, 1),
    "decode, 1 token": (1, 2048, 768, 128, 8),
    "decode, 64 tokens": (64, 2048, 768, 128, 8),
}

Run = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def ours(x: Tensor, ids: Tensor, weights: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """The operator under test."""
    return experts(x, ids, weights, up, down, activation="silu", gated=True)


def grouped_mm(x: Tensor, ids: Tensor, weights: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Gather, torch's grouped product, activation, grouped product, sum."""
    layout = routing_layout(ids, up.shape[0])
    ends = layout.offsets_E1[1:]
    gate, inner = F.grouped_mm(dispatch(x, layout), up.mT, offs=ends).chunk(2, -1)
    return combine(F.grouped_mm(F.silu(gate) * inner, down.mT, offs=ends), weights, layout)


def loop(x: Tensor, ids: Tensor, weights: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """One product per expert; waits for the device to know how many rows each has."""
    layout = routing_layout(ids, up.shape[0])
    rows, parts = dispatch(x, layout), []
    for e, (start, end) in enumerate(pairwise(layout.offsets_E1.tolist())):
        gate, inner = (rows[start:end] @ up[e].t()).chunk(2, -1)
        parts.append((F.silu(gate) * inner) @ down[e].t())
    return combine(torch.cat(parts), weights, layout)


CANDIDATES: dict[str, Run] = {"moeify": ours, "grouped_mm": grouped_mm, "loop": loop}


def check(device: torch.device) -> list[dict[str, Any]]:
    """Every kernel against float64."""
    results = []
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        for found in self_check(device, dtype):
            passed = found.difference <= TOLERANCE[name]
            results.append({"check": found.name, "dtype": name, "difference": found.difference, "passed": passed})
            if not passed:
                print(f"FAILED {name} {found.name}: {found.difference:.2e}")
    print(f"{sum(bool(r['passed']) for r in results)} of {len(results)} checks passed")
    return results


def milliseconds(run: Callable[[], object]) -> float:
    """Median time of a run on the device."""
    from triton.testing import do_bench

    return float(do_bench(run, warmup=50, rep=200, return_mode="median"))


def measure(shape: tuple[int, ...], device: torch.device) -> dict[str, dict[str, float]]:
    """Times and TFLOP/s by candidate, in bf16."""
    tokens, hidden, inner, count, top_k = shape
    x = torch.randn(tokens, hidden, device=device, dtype=torch.bfloat16).requires_grad_()
    up = torch.randn(count, 2 * inner, hidden, device=device, dtype=torch.bfloat16).mul_(hidden**-0.5).requires_grad_()
    down = torch.randn(count, hidden, inner, device=device, dtype=torch.bfloat16).mul_(inner**-0.5).requires_grad_()
    scores, ids = torch.randn(tokens, count, device=device).softmax(-1).topk(top_k)
    weights = scores.to(torch.bfloat16).requires_grad_()
    leaves, flops = [x, weights, up, down], 6 * tokens * top_k * hidden * inner
    results: dict[str, dict[str, float]] = {}
    for name, run in CANDIDATES.items():

        def forward(run: Run = run) -> Tensor:
            with torch.no_grad():
                return run(x, ids, weights, up, down)

        def both(run: Run = run) -> object:
            return torch.autograd.grad(run(x, ids, weights, up, down).sum(), leaves)

        try:
            times = milliseconds(forward), milliseconds(both)
        except (RuntimeError, NotImplementedError) as error:
            print(f"{name}: not on this device ({str(error).splitlines()[0]})")
            continue
        results[name] = {
            "forward_ms": times[0],
            "both_ms": times[1],
            "forward_tflops": flops / times[0] / 1e9,
            "both_tflops": 3 * flops / times[1] / 1e9,
        }
    return results


def dense_peak(device: torch.device) -> float:
    """TFLOP/s of a large dense product in bf16."""
    a, b = torch.randn(2, 8192, 8192, device=device, dtype=torch.bfloat16)
    return 2 * 8192**3 / milliseconds(lambda: a @ b) / 1e9


def main() -> int:
    """Check, measure, print and perhaps write; exit code 1 if a check failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the results to this file")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("No GPU here: nothing was timed. Tests check numerics in the interpreter and machine code without one.")
        return 0
    device = torch.device("cuda")
    report: dict[str, Any] = {"device": torch.cuda.get_device_name(device), "torch": torch.__version__}
    report["checks"], report["dense_tflops"] = check(device), dense_peak(device)
    print(f"{report['device']}: dense bf16 {report['dense_tflops']:.0f} TFLOP/s")
    report["times"] = {}
    for name, shape in SHAPES.items():
        report["times"][name] = measure(shape, device)
        for candidate, found in report["times"][name].items():
            share = found["forward_tflops"] / report["dense_tflops"]
            print(
                f"{name:26}{candidate:12}{found['forward_ms']:9.3f} ms {found['forward_tflops']:7.1f} TFLOP/s"
                f" {share:4.0%}   with backward {found['both_ms']:9.3f} ms {found['both_tflops']:7.1f} TFLOP/s"
            )
    if options.json:
        options.json.write_text(json.dumps(report, indent=1))
    return 0 if all(c["passed"] for c in report["checks"]) else 1


if __name__ == "__main__":
    sys.exit(main())
