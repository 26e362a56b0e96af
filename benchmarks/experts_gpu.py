"""Check every kernel on this machine's GPU and time it beside torch's own ways to compute experts and other projects'.

    python -m benchmarks.experts_gpu              prints a table
    python -m benchmarks.experts_gpu --json FILE  also writes everything as JSON, to attach to a report

MegaBlocks, ScatterMoE, Liger and SonicMoE take part if they are installed. Each candidate must give the reference's
result before it is timed; one that does not is reported with the reason.

Shapes are those that other kernels publish. TFLOP/s count useful products only: 6*T*K*H*I forward, three times that
with the backward pass. The share is of a large dense product measured on the same device.
"""

# mypy: disable-error-code="import-untyped"

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_candidates import CANDIDATES, Candidate, Inputs, refusal
from moeify.kernels.tools.selfcheck import self_check
from moeify.measure import TOLERANCE, relative_difference

# Tokens, hidden, inner, experts, top-k.
SHAPES = {
    "Qwen3-30B-A3B (Liger)": (32768, 2048, 768, 128, 8),
    "fine-grained (SonicMoE)": (32768, 4096, 768, 128, 8),
    "Mixtral-8x7B": (8192, 4096, 14336, 8, 2),
    "MegaBlocks XS": (65536, 512, 2048, 64, 1),
    "decode, 1 token": (1, 2048, 768, 128, 8),
    "decode, 64 tokens": (64, 2048, 768, 128, 8),
}


def check(device: torch.device) -> list[dict[str, Any]]:
    """Every kernel against float64."""
    results = []
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        for found in self_check(device, dtype, relative_difference):
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


def measure(shape: tuple[int, ...], device: torch.device) -> dict[str, dict[str, Any]]:
    """By candidate: times and TFLOP/s in bf16, or why there are none."""
    inputs, results = make_inputs(shape, device), dict[str, dict[str, Any]]()
    for name, candidate in CANDIDATES.items():
        reason = refusal(candidate, inputs)
        results[name] = {"not timed": reason} if reason else timed(candidate, inputs)
        torch.cuda.empty_cache()
    return results


def make_inputs(shape: tuple[int, ...], device: torch.device) -> Inputs:
    """Tokens spread over experts by random scores, in bf16."""
    tokens, hidden, inner, count, top_k = shape

    def random(*size: int) -> Tensor:
        return torch.randn(size, device=device, dtype=torch.bfloat16)

    scores, ids = torch.randn(tokens, count, device=device).softmax(-1).topk(top_k)
    up, down = random(count, 2 * inner, hidden), random(count, hidden, inner)
    return Inputs(random(tokens, hidden), ids, scores.bfloat16(), up.mul_(hidden**-0.5), down.mul_(inner**-0.5))


def timed(candidate: Candidate, inputs: Inputs) -> dict[str, Any]:
    """Times and TFLOP/s, or why there are none: some shapes do not fit every candidate."""
    flops = 6 * inputs.ids.numel() * inputs.x.shape[1] * inputs.down.shape[2]
    leaves = [t.detach().requires_grad_() for t in (inputs.x, inputs.weights, *candidate.store(inputs.up, inputs.down))]
    x, weights, *stored = leaves
    grad = torch.randn_like(inputs.x)

    def forward() -> object:
        with torch.no_grad():
            return candidate.run(x, inputs.ids, weights, *stored)

    def both() -> object:
        return torch.autograd.grad(candidate.run(x, inputs.ids, weights, *stored), leaves, grad)

    try:
        times = milliseconds(forward), milliseconds(both)
    except Exception as error:  # another project's, of any kind
        return {"not timed": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"}
    return {
        "forward_ms": times[0],
        "both_ms": times[1],
        "forward_tflops": flops / times[0] / 1e9,
        "both_tflops": 3 * flops / times[1] / 1e9,
    }


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
            if "not timed" in found:
                print(f"{name:26}{candidate:12}not timed: {found['not timed']}")
                continue
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
