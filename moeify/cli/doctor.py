"""`moeify doctor`: what this machine can run, and the kernels checked against the reference on it."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import click

from moeify.cli.options import json_option
from moeify.errors import ConfigError, MoeifyError, first_line
from moeify.files.staging import write_whole

_DTYPES = ("bfloat16", "float32")
_HEIGHTS = ("16", "32", "64", "128")
_PACKAGES = ("torch", "triton", "transformers", "safetensors", "gguf", "onnx", "onnxruntime", "onnxruntime-gpu")

_REMEDY = ": another Triton or another tile (--tune) may do, set_experts_implementation('grouped_mm') does without"


@click.command()
@json_option
@click.option(
    "--tune",
    "tiles_file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="On a GPU: time a few tiles for every kernel and write the fastest; MOEIFY_TILES=FILE uses them.",
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
@click.option("--tune-seconds", type=click.IntRange(min=1), default=300, show_default=True, help="When tuning stops.")
@click.option("--tune-dtype", type=click.Choice(_DTYPES), multiple=True, help="To tune for; both if left out.")
@click.option("--tune-rows", type=click.Choice(_HEIGHTS), multiple=True, help="Heights of a tile; all if left out.")
def doctor(as_json: bool, tiles_file: Path | None, **tuning: Any) -> None:
    """Say what this machine can run, and check the kernels against a float64 reference on it.

    On a GPU the Triton kernels are checked, else the CPU path. Exit 1 when a check fails.
    """
    from moeify.cli import display
    from moeify.measure import TOLERANCE

    device, trouble = _device()
    if tiles_file is not None:
        _check_tuning(tiles_file, tuning["tune_shape"], device, trouble)
    about = _about(device, trouble)
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
        _tune(tiles_file, device, **tuning)
    sys.exit(1 if failed else 0)


def _device() -> tuple[Any, str]:
    """The GPU if it can be used, else the CPU; and what torch says of a GPU that it cannot use, say an old driver."""
    import torch

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        usable = torch.cuda.is_available()
    trouble = first_line(said[0].message) if said and isinstance(said[0].message, Warning) else ""
    return torch.device("cuda" if usable else "cpu"), trouble


def _about(device: Any, trouble: str) -> dict[str, str]:
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
        about["tiles"] = _tiles()
        about["checked"] = "the Triton kernels, on the GPU; for their speed: python -m benchmarks.gpu"
    else:
        about["gpu"] = f"none that can be used: {trouble}" if trouble else "none"
        about["checked"] = "the CPU path; the Triton kernels need a GPU"
    return about


def _tiles() -> str:
    """Where the tiles of the kernels come from on this GPU."""
    from moeify.kernels.gpu.target import architecture
    from moeify.kernels.gpu.tiles import TILES

    file, name = os.environ.get("MOEIFY_TILES"), architecture()
    if file:
        return f"of {file}, which MOEIFY_TILES names"
    return f"of the table, for {name}" if name in TILES else f"small ones: the table has none for {name}; try --tune"


def _check(device: Any) -> tuple[dict[str, float], list[str]]:
    """The largest difference by dtype, and what is wrong, in words."""
    import torch

    from moeify.kernels.tools.selfcheck import self_check, suspects
    from moeify.measure import TOLERANCE, relative_difference

    worst: dict[str, float] = {}
    failed: list[str] = []
    for dtype in ("float32", "float16", "bfloat16"):
        try:
            checks = list(self_check(device, getattr(torch, dtype), relative_difference))
        except Exception as error:  # whatever a driver or a compiler says belongs in this report
            line = _line_of(error)
            failed.append(f"{dtype} was not checked: {line}{_REMEDY if 'OutOfResources' in line else ''}")
            continue
        worst[dtype] = max(check.difference for check in checks)
        wrong = [check for check in checks if not check.difference <= TOLERANCE[dtype]]
        failed += [f"{check.name} in {dtype}: {check.difference:.1e}" for check in wrong]
        if wrong and device.type == "cuda":
            names = ", ".join(suspects(check.name for check in wrong))
            failed.append(f"keep away from the kernel {names} in {dtype}{_REMEDY}")
    return worst, failed


def _check_tuning(file: Path, shape: tuple[int, int, int, int], device: Any, trouble: str) -> None:
    """Raise before minutes are spent."""
    if device.type != "cuda":
        none = f"none that can be used ({trouble})" if trouble else "none"
        raise MoeifyError(
            f"--tune times kernels on a GPU and this machine has {none}: nothing was written; run it on one"
        )
    if not file.absolute().parent.is_dir():
        raise ConfigError(f"--tune {file}: its folder does not exist; make it first")
    if shape[3] > shape[2]:
        raise ConfigError(
            f"--tune-shape has {shape[2]} experts and {shape[3]} choices: expected at most as many choices"
        )


def _tune(
    file: Path, device: Any, *, tune_shape: tuple[int, int, int, int], tune_seconds: int, tune_dtype: tuple[str, ...],
    tune_rows: tuple[str, ...],
) -> None:  # fmt: skip
    """Write the fastest tiles after each that is found, saying on stderr what was."""
    import torch

    from moeify.cli import display
    from moeify.kernels.gpu import tuned_tiles
    from moeify.kernels.tools import tuning

    table, console, until = {}, display.stderr(), time.time() + tune_seconds
    dtypes = tuple(getattr(torch, name) for name in tune_dtype or _DTYPES)
    shares = tuple(n for h, n in zip(_HEIGHTS, tuning.SHARES, strict=True) if not tune_rows or h in tune_rows)
    try:
        for found in tuning.tune(tuning.Shape(*tune_shape), device, dtypes, shares, until=until, wrong=_off):
            table[found.kernel, found.tile.m, found.itemsize] = found.tile
            write_whole(file, tuned_tiles.text_of(table).encode())
            console.print(_line(found))
    except Exception as error:  # as above: out of memory, a compiler's complaint
        kept = f"{file} has what was found before" if table else f"{file} was not written"
        raise MoeifyError(f"tuning failed, {kept}: {_line_of(error)}") from error
    if not table:
        raise MoeifyError(f"no tile was timed in {tune_seconds} s, {file} was not written: give --tune-seconds more")
    cut = f"after {tune_seconds} s, " if time.time() > until else ""
    console.print(f"{file} written {cut}with {len(table)} tiles: MOEIFY_TILES={file} uses it")


def _off(got: Any, want: Any) -> str:
    """What is wrong with a tile's result beside that of the table's tile."""
    from moeify.measure import relative_difference, tolerance_of

    difference = relative_difference(got, want)
    return "" if difference <= tolerance_of(got.dtype) else f"off by {difference:.1e}"


def _line(found: Any) -> str:
    """The chosen tile beside the first that was timed."""
    first = next(iter(found.times.values()))
    name = f"{found.kernel}, {found.itemsize} bytes, {found.tile.m} rows"
    return f"{name:<32}{found.times[found.tile]:.3f} ms, the table's {first:.3f} ms: {found.tile}"


def _line_of(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"
