"""`moeify convert`: a dense checkpoint in, a proven MoE checkpoint out."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moeify.cli.options import example_inputs_option, source_options
from moeify.cli.settings import config_from, config_options
from moeify.errors import CheckpointError, ConfigError, VerificationError

if TYPE_CHECKING:
    from rich.console import Console

    from moeify.checkpoint.source import Source
    from moeify.config import MoEConfig
    from moeify.plan import Plan

Inputs = dict[str, Any]
_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


class Size(click.ParamType[int]):
    """A number of bytes such as 5GB or 500MB."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Parse the text."""
        if isinstance(value, int):
            return value
        found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?B)?", str(value).upper())
        size = int(float(found[1]) * _UNITS[found[2] or ""]) if found else 0
        if size < 1:
            self.fail(f"{value!r} is not a size: write 5GB, 500MB or a number of bytes", param, ctx)
        return size


@click.command()
@click.argument("src")
@click.argument("dst", required=False, type=click.Path(path_type=Path))
@config_options
@click.option("--layers", default="all", show_default=True, help="all, every:N, last:N, first:N, 0,3-7, or a regex.")
@click.option("--to", "target", default="auto", show_default=True, help="auto, moeify, or a native family.")
@click.option("--dtype", type=click.Choice(list(_DTYPES)), help="Store floating-point tensors in this dtype.")
@click.option("--plan", "plan_file", type=click.Path(path_type=Path, dir_okay=False), help="Do what a saved plan says.")
@click.option("--dry-run", is_flag=True, help="Show the plan and its cost; write nothing.")
@click.option("--json", "as_json", is_flag=True, help="With --dry-run: print the plan as JSON, for --plan.")
@click.option("--shard-size", type=Size(), default="5GB", show_default=True, help="Largest file of the output.")
@click.option("--resume", is_flag=True, help="Go on where an interrupted run stopped.")
@click.option("--overwrite", is_flag=True, help="Replace DST if it is a model folder.")
@click.option("--strict", is_flag=True, help="Refuse weights that hold NaN or Inf instead of warning.")
@click.option("--no-verify", is_flag=True, help="Do not compare logits with the dense model.")
@example_inputs_option
@source_options
def convert(
    src: str,
    dst: Path | None,
    layers: str,
    target: str,
    dtype: str | None,
    plan_file: Path | None,
    dry_run: bool,
    as_json: bool,
    shard_size: int,
    resume: bool,
    overwrite: bool,
    strict: bool,
    no_verify: bool,
    example_inputs: Path | None,
    allow_pickle: bool,
    trust_remote_code: bool,
    **settings: Any,
) -> None:
    """Convert the dense checkpoint SRC into a sparse MoE checkpoint DST.

    SRC is a folder in Hugging Face layout, a GGUF file, or a hub id; it is never changed. DST appears whole or not at
    all, after its logits were compared with those of SRC on a slice of the layers.
    """
    from moeify.checkpoint.source import open_source
    from moeify.cli import display
    from moeify.tracing.given_inputs import read_inputs

    if dst is None and not dry_run:
        raise click.UsageError("DST is missing: where should the MoE be written? (--dry-run needs none)")
    if as_json and not dry_run:
        raise click.UsageError("--json goes with --dry-run: the plan of a conversion is kept in DST/moeify.json")
    typed = [name for name, value in settings.items() if value not in (None, ())]
    if plan_file and typed:
        raise click.UsageError(f"{typed[0]} goes without --plan: the plan says how to convert")
    config = None if plan_file else config_from(settings)
    inputs = None if example_inputs is None else read_inputs(example_inputs)
    console = display.stderr()
    with open_source(src, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code) as source:
        if dry_run:
            plan = _plan(source, config, layers, target, plan_file, inputs)
            click.echo(plan.to_json(), nl=False) if as_json else _show(source, plan, inputs)
            return
        assert dst is not None
        _refuse_target(dst, overwrite)
        plan = _plan(source, config, layers, target, plan_file, inputs)
        console.print(
            f"{plan.model_type} → {plan.target}: {len(plan.sites)} FFNs become {plan.config.experts} experts, "
            f"top-{plan.config.top_k}"
        )
        _write(source, dst, plan, console, inputs, verified=not no_verify, strict=strict, shard_size=shard_size,
               dtype=_DTYPES[dtype] if dtype else None, resume=resume, overwrite=overwrite)  # fmt: skip
    console.print(f"written to {dst}")


def _refuse_target(dst: Path, overwrite: bool) -> None:
    """Say at once what the writer would say after the plan was made."""
    if dst.exists() and not overwrite:
        raise CheckpointError(f"{dst} exists: choose another output folder, or pass --overwrite")


def _plan(
    source: Source, config: MoEConfig | None, layers: str, target: str, plan_file: Path | None, inputs: Inputs | None
) -> Plan:
    from moeify.conversion.checkpoint import check_plan, plan_checkpoint
    from moeify.plan import Plan

    if plan_file is None:
        assert config is not None
        return plan_checkpoint(source, config, layers, target, example_inputs=inputs)
    try:
        saved = Plan.from_json(plan_file.read_text())
    except OSError as error:
        raise ConfigError(f"--plan {plan_file} cannot be read: {error.strerror}") from error
    check_plan(source, saved, example_inputs=inputs)
    return saved


def _show(source: Source, plan: Plan, inputs: Inputs | None) -> None:
    """Print a plan and what it would cost."""
    from moeify.cli import display
    from moeify.conversion.cost import moe_cost
    from moeify.conversion.summary import dense_side

    dense, itemsize = dense_side(source, inputs)
    console = display.stdout()
    console.print(f"{plan.model_type} → {plan.target}, nothing is written")
    console.print(display.plan_table(plan))
    console.print()
    console.print(display.cost_table((("dense", dense), ("MoE", moe_cost(dense, plan, itemsize)))))


def _write(
    source: Source,
    dst: Path,
    plan: Plan,
    console: Console,
    inputs: Inputs | None,
    *,
    verified: bool,
    strict: bool,
    **options: Any,
) -> None:
    """Stream the conversion with a progress bar and, unless told otherwise, its proof."""
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    from moeify.conversion.checkpoint import Watch, convert_checkpoint

    speed = (DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    progress = Progress(TextColumn("{task.description}"), BarColumn(), *speed, console=console)
    task = progress.add_task("writing", total=None)

    def nonfinite(name: str) -> None:
        if strict:
            raise CheckpointError(f"{name} holds NaN or Inf (--strict): repair the source, or leave --strict out")
        console.print(f"warning: {name} holds NaN or Inf")

    def check(folder: Path) -> dict[str, Any] | None:
        progress.stop()
        return _prove(source, folder, plan, options["dtype"], inputs, console) if verified else None

    watch = Watch(
        total=lambda nbytes: progress.update(task, total=nbytes),
        written=lambda nbytes: progress.advance(task, nbytes),
        nonfinite=nonfinite,
        unused=lambda name: console.print(f"note: the model has no place for {name}; it is left out"),
    )
    try:
        with progress:
            convert_checkpoint(source, dst, plan, watch=watch, check=check, **options)
    except KeyboardInterrupt as stop:
        raise CheckpointError(f"interrupted; {dst} was not made: run again with --resume to go on") from stop


def _prove(
    source: Source, folder: Path, plan: Plan, dtype: str | None, inputs: Inputs | None, console: Console
) -> dict[str, Any]:
    from moeify.cli.quiet import quiet_transformers
    from moeify.proving.proof import verify_slice

    with quiet_transformers():
        report = verify_slice(source, folder, plan, cast_to=dtype, example_inputs=inputs)
    console.print(f"verified on a slice: {report.summary()}")
    if not report.passed:
        raise VerificationError(f"the MoE differs from the dense model: {report.summary()}; nothing was written")
    proof: dict[str, Any] = json.loads(json.dumps(report.to_dict()))
    return proof
