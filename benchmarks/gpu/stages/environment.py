"""Versions, the card as it was found, and its ceilings: dense products and a copy."""

# mypy: disable-error-code="import-untyped"

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch
import triton

from benchmarks.gpu.run import Run

PACKAGES = ("transformers", "numpy", "safetensors", "liger-kernel", "onnx", "onnxruntime", "click", "rich")
QUERY = "name,driver_version,memory.total,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu"
DENSE = "dense bf16"  # the record that others are held against
PRODUCTS = ((65536, 2048, 1536), (65536, 768, 2048), (16384, 4096, 28672))  # as experts have them: m, k, n
ASSUMED_DENSE = 798.0  # TFLOP/s of an H100 SXM, where the stage did not run


def stage(run: Run) -> None:
    """Write the versions and measure the ceilings."""
    run.put(
        "versions", python=platform.python_version(), torch=torch.__version__, triton=triton.__version__,
        cores=os.cpu_count(), commit=_commit(), dry=run.dry,
    )  # fmt: skip
    run.put("packages", **{name: _version(name) for name in PACKAGES})
    if not run.dry:
        run.attempt("nvidia-smi", _nvidia_smi, run)
        card: Any = torch.cuda.get_device_properties(0)
        memory, cache = card.total_memory / 2**30, card.L2_cache_size / 2**20
        run.put("gpu", name=card.name, sms=card.multi_processor_count, memory_gib=memory, l2_mib=cache)
    size = 256 if run.dry else 8192
    for name, dtype, precision in (
        (DENSE, torch.bfloat16, "ieee"),
        ("dense tf32", torch.float32, "tf32"),
        ("dense fp32", torch.float32, "ieee"),
    ):
        matmul: Any = torch.backends.cuda.matmul
        matmul.fp32_precision = precision
        run.attempt(name, _product, run, name, (size, size, size), dtype)
    matmul.fp32_precision = "ieee"
    for sides in () if run.dry else PRODUCTS:
        run.attempt(str(sides), _product, run, f"dense bf16 {sides}", sides, torch.bfloat16)
    run.attempt("copy", _copy, run)


def dense_tflops(run: Run) -> float:
    """Return what this stage measured for a dense product in bf16."""
    return float(next((r["tflops"] for r in run.records() if r["what"] == DENSE), ASSUMED_DENSE))


def bandwidth(run: Run) -> float:
    """Return the TB/s that this stage measured."""
    return float(next((r["tb_s"] for r in run.records() if r["what"] == "copy"), 3.0))


def _product(run: Run, name: str, sides: tuple[int, int, int], dtype: torch.dtype) -> None:
    m, k, n = sides
    a = torch.randn(m, k, device=run.device, dtype=dtype)
    b = torch.randn(n, k, device=run.device, dtype=dtype)
    ms = run.milliseconds(lambda: a @ b.t(), 25, 100)
    run.put(name, ms=ms, tflops=2 * m * k * n / ms / 1e9)


def _copy(run: Run) -> None:
    source = torch.zeros(2**20 if run.dry else 2**32, device=run.device, dtype=torch.uint8)
    target = torch.empty_like(source)
    ms = run.milliseconds(lambda: target.copy_(source), 25, 100)
    run.put("copy", ms=ms, tb_s=2 * source.numel() / ms / 1e9)


def _commit() -> str | None:
    """Return the commit of the checkout; a copy without its history has it in the file that prepare.sh left."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        left = Path(".whl/commit")
        return left.read_text().strip() if left.exists() else None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _nvidia_smi(run: Run) -> None:
    command = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    run.put("nvidia-smi", text=done.stdout.strip())
