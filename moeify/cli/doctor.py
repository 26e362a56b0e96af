"""`moeify doctor`: what this machine can run, and the kernels checked against the reference on it."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import sys
from typing import Any

import click

from moeify.cli.options import json_option

_PACKAGES = ("torch", "triton", "transformers", "safetensors", "gguf", "onnx", "onnxruntime", "onnxruntime-gpu")


@click.command()
@json_option
def doctor(as_json: bool) -> None:
    """Say what this machine can run, and check the kernels against a float64 reference on it.

    On a GPU the Triton kernels are checked, else the CPU path. Exit 1 when a check fails.
    """
    import torch

    from moeify.cli import display
    from moeify.kernels.selfcheck import self_check
    from moeify.tolerances import TOLERANCE

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    about = _about(device)
    worst: dict[str, float] = {}
    failed: list[str] = []
    for dtype in ("float32", "float16", "bfloat16"):
        try:
            checks = list(self_check(device, getattr(torch, dtype)))
        except Exception as error:  # whatever a driver or a compiler says belongs in this report
            failed.append(f"{dtype} was not checked: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
            continue
        worst[dtype] = max(check.difference for check in checks)
        wrong = [check for check in checks if not check.difference <= TOLERANCE[dtype]]
        failed += [f"{check.name} in {dtype}: {check.difference:.1e}" for check in wrong]
    if as_json:
        click.echo(json.dumps({**about, "worst": worst, "failed": failed}, indent=2))
    else:
        console = display.stdout()
        for name, value in about.items():
            console.print(f"{name:<18}{value}")
        for dtype, difference in worst.items():
            console.print(f"{dtype:<18}largest difference {difference:.1e}, tolerance {TOLERANCE[dtype]:.0e}")
        for line in failed:
            console.print(f"FAILED            {line}")
    sys.exit(1 if failed else 0)


def _about(device: Any) -> dict[str, str]:
    """Versions and hardware."""
    import torch

    about = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            about[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            about[package] = "not installed"
    about["cpu threads"] = str(torch.get_num_threads())
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        about["gpu"] = f"{properties.name}, {properties.total_memory / 1e9:.0f} GB"
        about["checked"] = "the Triton kernels, on the GPU; for their speed: benchmarks/experts_gpu.py"
    else:
        about["gpu"] = "none"
        about["checked"] = "the CPU path; the Triton kernels need a GPU"
    return about
