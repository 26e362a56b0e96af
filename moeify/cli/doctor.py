"""`moeify doctor`: what this machine can run, and the kernels checked against the reference on it."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import sys
from pathlib import Path
from typing import Any

import click

from moeify.cli.options import json_option
from moeify.errors import ConfigError, MoeifyError, first_line
from moeify.files.staging import write_whole

_PACKAGES = ("torch", "triton", "transformers", "safetensors", "gguf", "onnx", "onnxruntime", "onnxruntime-gpu")


@click.command()
@json_option
@click.option(
    "--tune",
    "tiles_file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="On a GPU: time a few tiles for every kernel (minutes) and write the fastest; MOEIFY_TILES=FILE uses them.",
)
@click.option(
    "--tune-shape",
    nargs=4,
    type=click.IntRange(min=1),
    default=(2048, 768, 128, 8),
    show_default=True,
    metavar="H I E K",
    help="Hidden and intermediate width, experts and choices per token to tune for.",
)
def doctor(as_json: bool, tiles_file: Path | None, tune_shape: tuple[int, int, int, int]) -> None:
    """Say what this machine can run, and check the kernels against a float64 reference on it.

    On a GPU the Triton kernels are checked, else the CPU path. Exit 1 when a check fails.
    """
    import torch

    from moeify.cli import display
    from moeify.measure import TOLERANCE

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if tiles_file is not None:
        _check_tuning(tiles_file, tune_shape, device)
    about = _about(device)
    worst, failed = _check(device)
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
    if tiles_file is not None and not failed:
        _tune(tiles_file, tune_shape, device)
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
        about["checked"] = "the Triton kernels, on the GPU; for their speed: python -m benchmarks.gpu"
    else:
        about["gpu"] = "none"
        about["checked"] = "the CPU path; the Triton kernels need a GPU"
    return about


def _check(device: Any) -> tuple[dict[str, float], list[str]]:
    """The largest difference by dtype, and what is wrong, in words."""
    import torch

    from moeify.kernels.tools.selfcheck import self_check
    from moeify.measure import TOLERANCE, relative_difference

    worst: dict[str, float] = {}
    failed: list[str] = []
    for dtype in ("float32", "float16", "bfloat16"):
        try:
            checks = list(self_check(device, getattr(torch, dtype), relative_difference))
        except Exception as error:  # whatever a driver or a compiler says belongs in this report
            failed.append(f"{dtype} was not checked: {_line_of(error)}")
            continue
        worst[dtype] = max(check.difference for check in checks)
        wrong = [check for check in checks if not check.difference <= TOLERANCE[dtype]]
        failed += [f"{check.name} in {dtype}: {check.difference:.1e}" for check in wrong]
    return worst, failed


def _check_tuning(file: Path, shape: tuple[int, int, int, int], device: Any) -> None:
    """Raise before minutes are spent."""
    if device.type != "cuda":
        raise MoeifyError("--tune times kernels on a GPU and this machine has none: nothing was written; run it on one")
    if not file.absolute().parent.is_dir():
        raise ConfigError(f"--tune {file}: its folder does not exist; make it first")
    if shape[3] > shape[2]:
        raise ConfigError(
            f"--tune-shape has {shape[2]} experts and {shape[3]} choices: expected at most as many choices"
        )


def _tune(file: Path, shape: tuple[int, int, int, int], device: Any) -> None:
    """Write the fastest tiles, saying on stderr what was found."""
    from moeify.cli import display
    from moeify.kernels.gpu import tuned_tiles
    from moeify.kernels.tools import tuning

    table, console = {}, display.stderr()
    try:
        for found in tuning.tune(tuning.Shape(*shape), device):
            table[found.kernel, found.tile.m, found.itemsize] = found.tile
            console.print(_line(found))
    except Exception as error:  # as above: out of memory, a compiler's complaint
        raise MoeifyError(f"tuning failed, {file} was not written: {_line_of(error)}") from error
    write_whole(file, tuned_tiles.text_of(table).encode())
    console.print(f"{file} written: MOEIFY_TILES={file} uses it")


def _line(found: Any) -> str:
    """The chosen tile beside the first that was timed."""
    first = next(iter(found.times.values()))
    name = f"{found.kernel}, {found.itemsize} bytes, {found.tile.m} rows"
    return f"{name:<32}{found.times[found.tile]:.3f} ms, the table's {first:.3f} ms: {found.tile}"


def _line_of(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"
